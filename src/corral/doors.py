"""`corral.connect()` and `corral.local()`: the cluster from an application's asyncio code.

    async with corral.connect() as cluster:
        space = await cluster.lockspace("orders")
        async with space.lock("invoice-42", corral.EX, timeout=5) as held:
            held.token, held.value

`local()` has the same lock API in one process, with nothing to start.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Generator
from types import TracebackType
from typing import Any, Final, final

from corral.api.cman import ViewChanged
from corral.api.dlm import VALUE_SIZE
from corral.base.view import View
from corral.providers.backends import SocketBackend
from corral.providers.client import CorraldClient
from corral.providers.local import LocalLocks
from corral.providers.locks import LockSpace
from corral.providers.page import PAGE_SIZE
from corral.real.world import RealWorld

DEFAULT_SOCKET: Final = "/run/corral/corrald.sock"
SOCKET_VARIABLE: Final = "CORRAL_SOCKET"

log = logging.getLogger("corral")


def _bug(error: BaseException, where: str) -> None:
    """A guest in somebody else's process: a bug of ours is told loudly, it does not end the application."""
    log.critical("a bug in corral, in %s: %s", where, error, exc_info=error)


def _guest_world() -> RealWorld:
    return RealWorld("/nonexistent", fatal=_bug, guest=True)  # no state is kept by a caller


@final
class Cluster:
    """A connection to this node's corrald. Opened by `connect()`; every method belongs to the loop that opened it."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._world: RealWorld
        self._client: CorraldClient
        self._page: memoryview
        self._spaces: dict[str, LockSpace] = {}

    async def _open(self) -> None:
        self._world = _guest_world()
        self._client = CorraldClient(self._world, self._socket)
        try:
            await self._client.open()
            self._page = self._world.page(self._client.identity.page, PAGE_SIZE, create=False)
        except BaseException:
            await self._world.close()
            raise

    @property
    def view(self) -> View | None:
        """The newest view this node has installed; None before the first."""
        return self._client.view

    @property
    def active(self) -> bool:
        """Whether services run in that view: every failed member is fenced."""
        return self._client.active

    def watch(self) -> AsyncIterator[ViewChanged]:
        """The present view and every change of it, until the connection ends. Raises Busy instead of leaving a gap."""
        return self._client.watch()

    async def ask(self, what: str, **arguments: Any) -> Any:
        """What the command line asks, as plain data: `await cluster.ask("cman.status")`."""
        return await self._client.ask(what, **arguments)

    async def lockspace(self, name: str, *, value_size: int = VALUE_SIZE, exclusive: bool = False) -> LockSpace:
        """Joins the lockspace; the same name gives the same object. `value_size`: bytes in a value block, a multiple
        of 8, the same on every node. `exclusive`: only if this node is not in it yet. Raises ClusterError when it
        cannot be had."""
        space = self._spaces.get(name)
        if space is not None and not space.backend.lost.done() and not exclusive:
            return space
        socket = self._client.identity.lock_socket
        backend = SocketBackend(self._world, socket, name, value_size, self._page, exclusive)
        await backend.open()
        space = self._spaces[name] = LockSpace(self._world, backend)
        return space

    async def close(self) -> None:
        """Gives every lock back and closes the connections."""
        for space in self._spaces.values():
            if not space.backend.lost.done():
                await space.close()
        self._spaces.clear()
        self._client.close()
        await self._world.close()


@final
class Connecting:
    """What `connect()` returns: `async with` it, or `await` it and `close()` the result."""

    def __init__(self, socket: str) -> None:
        self._cluster = Cluster(socket)

    def __await__(self) -> Generator[Any, Any, Cluster]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Cluster:
        await self._cluster._open()
        return self._cluster

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(self._cluster.close())


def connect(path: str | os.PathLike[str] | None = None) -> Connecting:
    """To the corrald whose Unix socket is at `path`, by default $CORRAL_SOCKET, else /run/corral/corrald.sock.
    Raises ClusterError when none answers there."""
    return Connecting(socket_path(path))


def socket_path(path: str | os.PathLike[str] | None) -> str:
    """Where corrald listens if nobody says otherwise."""
    return os.fspath(path) if path is not None else os.environ.get(SOCKET_VARIABLE, DEFAULT_SOCKET)


@final
class LocalCluster:
    """One process that is a cluster of itself: the same lock API, no daemon. Conflicts between its tasks are real."""

    def __init__(self) -> None:
        self._world: RealWorld
        self._locks: LocalLocks
        self._spaces: list[LockSpace] = []

    async def __aenter__(self) -> "LocalCluster":
        self._world = _guest_world()
        self._locks = LocalLocks(self._world)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def lockspace(self, name: str, *, value_size: int = VALUE_SIZE, exclusive: bool = False) -> LockSpace:
        space = await self._locks.lockspace(name, value_size=value_size, exclusive=exclusive)
        if space not in self._spaces:
            self._spaces.append(space)
        return space

    async def close(self) -> None:
        for space in self._spaces:
            if not space.backend.lost.done():
                await space.close()
        self._spaces.clear()
        await self._world.close()


def local() -> LocalCluster:
    """`async with corral.local() as cluster: space = await cluster.lockspace("x")`."""
    return LocalCluster()
