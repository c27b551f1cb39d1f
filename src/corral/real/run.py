"""Starts a process on the real World: uvloop, signals, the loop's pulse, an orderly end also after our own bugs."""

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from corral.real.identity import Credentials
from corral.real.pulse import Pulse
from corral.real.world import RealWorld

T = TypeVar("T")

log = logging.getLogger("corral.real")


class Stopped(Exception):
    """Our own bug stopped the process; the cause is chained. It was logged already."""


def run(
    main: Callable[[RealWorld], Coroutine[Any, Any, T]],
    *,
    state_directory: str,
    credentials: Credentials | None = None,
    signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM),
) -> T:
    """Runs `main(world)` to its end, closes the world and returns what main returned.

    The signals cancel `main`: asyncio.CancelledError leaves run unless main returns all the same. A bug anywhere
    (a spawned coroutine, a callback) cancels main too and raises Stopped.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_main(main, state_directory, credentials, signals))


async def _main(
    main: Callable[[RealWorld], Coroutine[Any, Any, T]],
    state_directory: str,
    credentials: Credentials | None,
    signals: tuple[signal.Signals, ...],
) -> T:
    loop = asyncio.get_running_loop()
    bugs: list[tuple[BaseException, str]] = []
    task: asyncio.Task[T] | None = None

    def fatal(error: BaseException, where: str) -> None:
        log.critical("stopped by a bug in %s: %s", where, error, exc_info=error)
        bugs.append((error, where))
        if task is not None:
            task.cancel()

    world = RealWorld(state_directory, credentials, fatal=fatal)
    world.pulse = Pulse(loop)
    task = loop.create_task(main(world), name="main")
    for number in signals:
        loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    finally:
        world.pulse.stop()
        await world.close()
        for number in signals:
            loop.remove_signal_handler(number)
        if bugs:
            error, where = bugs[0]
            raise Stopped(f"a bug in {where}: {error}") from error
