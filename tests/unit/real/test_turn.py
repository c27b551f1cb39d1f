"""The end of a loop turn."""

import asyncio
from typing import Any

from corral.real.turn import Turn


def in_loop(body: Any) -> None:
    asyncio.run(body())


def test_all_of_a_turn_is_one_callback_of_the_loop() -> None:
    """Requests become messages and messages a write without another turn between them."""

    async def body() -> None:
        loop = asyncio.get_running_loop()
        turn = Turn(loop)
        heard: list[str] = []

        def requests() -> None:
            heard.append("requests")
            loop.call_soon(heard.append, "next turn")
            turn.at_end(lambda: heard.append("messages"))
            turn.at_end(lambda: heard.append("write"))

        turn.at_end(requests)
        turn.at_end(lambda: heard.append("others"))
        assert heard == []
        await asyncio.sleep(0)
        assert heard == ["requests", "others", "messages", "write"]
        await asyncio.sleep(0)
        assert heard[-1] == "next turn"
        await asyncio.sleep(0)
        assert len(heard) == 5, "each was called once"
        turn.at_end(lambda: heard.append("again"))
        await asyncio.sleep(0)
        assert heard[-1] == "again"

    in_loop(body)


def test_one_that_fails_takes_no_other_with_it() -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        escaped: list[BaseException] = []
        loop.set_exception_handler(lambda _, context: escaped.append(context["exception"]))
        turn = Turn(loop)
        heard: list[str] = []

        def fail() -> None:
            turn.at_end(lambda: heard.append("of the failed one"))
            raise RuntimeError("our bug")

        turn.at_end(lambda: heard.append("before"))
        turn.at_end(fail)
        turn.at_end(lambda: heard.append("after"))
        for _ in range(3):
            await asyncio.sleep(0)
        assert heard == ["before", "after", "of the failed one"]
        assert [str(error) for error in escaped] == ["our bug"]

    in_loop(body)
