"""What the tests of the real World share: one-cluster credentials, a recording handler, and a runner on uvloop."""

import asyncio
import atexit
import functools
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvloop

from corral.real import pki
from corral.real.identity import Credentials
from corral.real.world import RealWorld

PATIENCE = 10.0  # seconds before a test that waits is called failed


def authority(cluster: str, serial: int = 0) -> str:
    """A directory with a CA and nodes 1 to 3; another serial is another CA of the same name. Made once per session."""
    return _authority(cluster, serial)


@functools.cache
def _authority(cluster: str, serial: int) -> str:
    directory = tempfile.TemporaryDirectory(prefix="corral-pki-")
    atexit.register(directory.cleanup)
    pki.create_authority(directory.name, cluster)
    for node in (1, 2, 3):
        pki.create_node(directory.name, node)
    return directory.name


def credentials(node: int, cluster: str = "home", serial: int = 0) -> Credentials:
    return pki.load(authority(cluster, serial), node)


class Recorder:
    """A ConnectionHandler that remembers, and can be waited on."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.breaks: list[str] = []
        self.after_break = 0
        self._changed = asyncio.Event()

    def received(self, messages: list[bytes]) -> None:
        self.after_break += bool(self.breaks)
        self.messages.extend(messages)
        self._changed.set()

    def broken(self, reason: str) -> None:
        self.breaks.append(reason)
        self._changed.set()

    async def until(self, condition: Callable[["Recorder"], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()

    async def wait_messages(self, count: int) -> list[bytes]:
        await self.until(lambda me: len(me.messages) >= count)
        return self.messages

    async def wait_broken(self) -> str:
        await self.until(lambda me: bool(me.breaks))
        return self.breaks[0]


class Acceptor:
    """An `accept` that remembers connections and gives each a Recorder."""

    def __init__(self) -> None:
        self.connections: list[Any] = []
        self.handlers: list[Recorder] = []

    def __call__(self, connection: Any) -> Recorder:
        self.connections.append(connection)
        self.handlers.append(Recorder())
        return self.handlers[-1]


class Bench:
    """Makes worlds and closes them; a `fatal` of any of them fails the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.worlds: list[RealWorld] = []
        self.bugs: list[tuple[BaseException, str]] = []

    def world(self, node: int | None = None, *, state: str = "", identity: Credentials | None = None) -> RealWorld:
        if node is not None and identity is None:
            identity = credentials(node)
        state = state or f"state-{len(self.worlds)}"
        world = RealWorld(str(self.directory / state), identity, fatal=lambda e, where: self.bugs.append((e, where)))
        self.worlds.append(world)
        return world

    def path(self, name: str) -> str:
        return str(self.directory / name)


async def eventually(condition: Callable[[], bool]) -> None:
    """For what another process or the kernel does; polls, so only where nothing can be waited on."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def on_loop(directory: Path, body: Callable[[Bench], Coroutine[Any, Any, Any]]) -> None:
    """Runs `body(bench)` on uvloop and closes every world it made."""

    async def main() -> None:
        bench = Bench(directory)
        try:
            async with asyncio.timeout(30):
                await body(bench)
        finally:
            for world in bench.worlds:
                await world.close()
        assert bench.bugs == []

    uvloop.run(main())
