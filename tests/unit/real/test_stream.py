"""The framing of whole messages, byte by byte, without a socket."""

import asyncio
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from corral.real.stream import GREETING, MESSAGE_LIMIT, Stream
from corral.real.turn import Turn


class Wire(asyncio.Transport):
    """A transport that only remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.aborted = False
        self.closed = False
        self.paused = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Handler:
    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.breaks: list[str] = []

    def received(self, messages: list[bytes]) -> None:
        assert not self.breaks, "delivered after the break"
        self.batches.append(messages)

    def broken(self, reason: str) -> None:
        self.breaks.append(reason)

    @property
    def messages(self) -> list[bytes]:
        return [message for batch in self.batches for message in batch]


class Rig:
    """A stream of the listening side, accepted, with its greeting already written."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.bugs: list[BaseException] = []
        self.live: set[Stream] = set()
        self.wire = Wire()
        self.handler = Handler()
        self.stream = Stream(Turn(self.loop), lambda error, where: self.bugs.append(error), self.live)
        self.stream.connection_made(self.wire)
        self.stream.accept(lambda connection: self.handler)


async def turn() -> None:
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def with_rig(body: Callable[[Rig], Any]) -> None:
    async def main() -> None:
        rig = Rig()
        await turn()
        rig.wire.written.clear()
        await body(rig)
        assert rig.bugs == []

    asyncio.run(main())


def framed(*messages: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(message)) + message for message in messages)


def test_the_listening_side_greets_first() -> None:
    async def main() -> None:
        rig = Rig()
        await turn()
        assert rig.wire.written == [framed(GREETING)]

    asyncio.run(main())


def test_the_greeting_goes_before_what_the_owner_sends_on_accepting() -> None:
    async def main() -> None:
        stream, wire, handler = (
            Stream(Turn(asyncio.get_running_loop()), lambda error, where: None, set()),
            Wire(),
            Handler(),
        )
        stream.connection_made(wire)

        def accept(connection: Any) -> Handler:
            connection.send([b"welcome"])
            connection.close()
            return handler

        stream.accept(accept)
        await turn()
        assert wire.written == [framed(GREETING, b"welcome")]
        assert handler.breaks == ["closed by this side"]

    asyncio.run(main())


def test_one_loop_turn_is_one_write() -> None:
    async def body(rig: Rig) -> None:
        rig.stream.send([b"one", bytearray(b"two")])
        rig.stream.send([memoryview(b"three")])
        assert rig.wire.written == []
        assert rig.stream.pending == len(framed(b"one", b"two", b"three"))
        await turn()
        assert rig.wire.written == [framed(b"one", b"two", b"three")]
        assert rig.stream.pending == 0

    with_rig(body)


def test_messages_are_whole_however_the_bytes_are_cut() -> None:
    rng = Random(1)
    messages = [rng.randbytes(size) for size in (0, 1, 3, 4, 5, 100, 0, 70_000, 2)]
    stream = framed(*messages)

    async def body(rig: Rig) -> None:
        position = 0
        while position < len(stream):
            step = rng.choice((1, 2, 3, 4, 5, 17, 1000, 65_536))
            rig.stream.data_received(stream[position : position + step])
            position += step
        assert rig.handler.messages == messages

    with_rig(body)


def test_one_read_is_one_delivery() -> None:
    async def body(rig: Rig) -> None:
        rig.stream.data_received(framed(b"a", b"b", b"c") + b"\x05\x00")
        assert rig.handler.batches == [[b"a", b"b", b"c"]]

    with_rig(body)


def test_a_long_message_in_tiny_reads_stays_in_bounded_pieces() -> None:
    async def body(rig: Rig) -> None:
        for byte in framed(bytes(5000)):
            rig.stream.data_received(bytes((byte,)))
            assert len(rig.stream._chunks) <= 512
        assert rig.handler.messages == [bytes(5000)]

    with_rig(body)


def test_the_longest_message_passes_and_a_longer_one_breaks_before_it_is_buffered() -> None:
    async def body(rig: Rig) -> None:
        rig.stream.data_received(framed(bytes(MESSAGE_LIMIT)))
        rig.stream.data_received(framed(b"last good") + struct.pack("<I", MESSAGE_LIMIT + 1) + b"x")
        assert [len(message) for message in rig.handler.messages] == [MESSAGE_LIMIT, 9]
        assert rig.wire.aborted
        await turn()
        assert rig.handler.breaks == [
            f"the peer sent a message of {MESSAGE_LIMIT + 1} bytes, more than {MESSAGE_LIMIT}"
        ]

    with_rig(body)


def test_sending_too_long_a_message_is_our_own_bug() -> None:
    async def body(rig: Rig) -> None:
        with pytest.raises(AssertionError):
            rig.stream.send([bytes(MESSAGE_LIMIT + 1)])

    with_rig(body)


def test_close_sends_what_is_queued_and_breaks_once() -> None:
    async def body(rig: Rig) -> None:
        rig.stream.send([b"last"])
        rig.stream.close()
        assert rig.wire.written == [framed(b"last")]
        assert rig.wire.closed
        assert rig.handler.breaks == [], "never from inside close"
        rig.stream.close()
        rig.stream.send([b"ignored"])
        rig.stream.data_received(framed(b"too late"))
        await turn()
        rig.stream.connection_lost(None)
        assert rig.handler.breaks == ["closed by this side"]
        assert rig.handler.messages == []
        assert rig.wire.written == [framed(b"last")]
        assert rig.stream.pending == 0

    with_rig(body)


@pytest.mark.parametrize(
    ("tail", "error", "reason"),
    [
        (b"", None, "closed by the peer"),
        (b"\x09\x00\x00\x00half", None, "closed by the peer in the middle of a message"),
    ],
)
def test_the_peers_close_is_reported_once_with_its_reason(tail: bytes, error: Exception | None, reason: str) -> None:
    async def body(rig: Rig) -> None:
        rig.stream.data_received(framed(b"x") + tail)
        rig.stream.eof_received()
        rig.stream.connection_lost(error)
        await turn()
        assert rig.handler.breaks == [reason]
        assert rig.live == set()

    with_rig(body)


def test_a_lost_connection_names_the_error() -> None:
    async def body(rig: Rig) -> None:
        rig.stream.connection_lost(ConnectionResetError(104, "Connection reset by peer"))
        assert rig.handler.breaks == ["Connection reset by peer"]

    with_rig(body)


def test_an_exception_in_a_handler_is_fatal_not_swallowed() -> None:
    async def main() -> None:
        rig = Rig()

        def fail(messages: list[bytes]) -> None:
            raise RuntimeError("our bug")

        rig.handler.received = fail  # type: ignore[method-assign]
        rig.stream.data_received(framed(b"x"))
        assert [str(error) for error in rig.bugs] == ["our bug"]

    asyncio.run(main())


class Caller:
    """A stream of the connecting side."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.handler = Handler()
        self.stream = Stream(Turn(asyncio.get_running_loop()), lambda error, where: None, set())
        self.stream.connection_made(self.wire)


def test_what_comes_with_the_greeting_waits_for_the_handler() -> None:
    async def main() -> None:
        caller = Caller()
        waiting = asyncio.ensure_future(caller.stream.greeting())
        await turn()
        caller.stream.data_received(framed(GREETING, b"first", bytes(100)))
        assert await waiting == GREETING
        assert caller.wire.paused
        caller.stream.open(caller.handler)
        assert caller.handler.messages == [], "whoever awaits connect has the connection first"
        await turn()
        assert caller.handler.messages == [b"first", bytes(100)]
        assert not caller.wire.paused

    asyncio.run(main())


def test_until_the_greeting_nothing_long_is_believed() -> None:
    async def main() -> None:
        caller = Caller()
        waiting = asyncio.ensure_future(caller.stream.greeting())
        await turn()
        caller.stream.data_received(struct.pack("<I", 65) + b"GET / HTTP/1.1")
        with pytest.raises(ConnectionAbortedError, match="65 bytes, more than 64"):
            await waiting

    asyncio.run(main())


def test_a_break_between_connect_and_the_first_turn_is_still_reported() -> None:
    async def main() -> None:
        caller = Caller()
        waiting = asyncio.ensure_future(caller.stream.greeting())
        await turn()
        caller.stream.data_received(framed(GREETING, b"first"))
        await waiting
        caller.stream.open(caller.handler)
        caller.stream.eof_received()
        caller.stream.connection_lost(None)
        await turn()
        assert caller.handler.breaks == ["closed by the peer"]

    asyncio.run(main())
