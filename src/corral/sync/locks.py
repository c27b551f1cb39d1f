"""Lockspaces and locks for threads."""

import os
from collections.abc import Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, TypeVar, final

from corral import doors
from corral.api.dlm import EX, VALUE_SIZE, SpaceEvent, SpaceState
from corral.base.errors import LockLost
from corral.base.time import Seconds
from corral.base.view import View
from corral.providers.locks import HeldLock, LockSpace
from corral.sync.loop import Closing, LoopThread

T = TypeVar("T")


@final
class Held:
    """A held lock, as `api.dlm.Lock`, its methods blocking."""

    def __init__(self, loop: LoopThread, held: HeldLock) -> None:
        self._loop = loop
        self._held = held

    @property
    def resource(self) -> bytes:
        return self._held.resource

    @property
    def mode(self) -> int:
        return self._held.mode

    @property
    def value(self) -> bytes:
        return self._held.value

    @property
    def value_valid(self) -> bool:
        return self._held.value_valid

    @property
    def valid(self) -> bool:
        return self._held.valid

    @property
    def token(self) -> int:
        return self._held.token

    def convert(
        self, mode: int, *, wait: bool = True, value: bytes | None = None, timeout: Seconds | None = None
    ) -> None:
        self._loop.call(self._held.convert(mode, wait=wait, value=value, timeout=timeout))

    def unlock(self, *, value: bytes | None = None) -> None:
        self._loop.call(self._held.unlock(value=value), goes_on=True)

    def __enter__(self) -> "Held":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held._lost:
            raise LockLost(f"{self.resource!r}: its guarantee was lost while it was held") from error
        if self._held.mode >= 0:
            self._loop.call(self._held.unlock(), goes_on=True)


@final
class Space:
    """A lockspace, as `api.dlm.Lockspace`, its methods blocking."""

    def __init__(self, loop: LoopThread, space: LockSpace) -> None:
        self._loop = loop
        self._space = space

    @property
    def name(self) -> str:
        return self._space.name

    @property
    def asynchronous(self) -> LockSpace:
        """The same lockspace for coroutines that `call` runs."""
        return self._space

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs it in the thread of this cluster object, and waits for it."""
        return self._loop.call(coroutine)

    def lock(
        self,
        resource: bytes | str,
        mode: int = EX,
        *,
        wait: bool = True,
        timeout: Seconds | None = None,
        flags: int = 0,
        on_block: Callable[[int], None] | None = None,
    ) -> Held:
        """Returns when granted; use it in a `with`, or `unlock()` it. `on_block` is called from another thread."""

        async def acquire() -> HeldLock:
            return await self._space.lock(resource, mode, wait=wait, timeout=timeout, flags=flags, on_block=on_block)

        return Held(self._loop, self._loop.call(acquire(), self._space.give_back))

    @property
    def state(self) -> SpaceState:
        return self._space.state

    def watch(self) -> Iterator[SpaceEvent]:
        """As `api.dlm.Lockspace.watch`; each step waits for the next event."""
        it = self._loop.call(self._watching())
        try:
            while (event := self._loop.call(_next(it))) is not None:
                yield event
        finally:
            self._loop.call(it.aclose())

    async def _watching(self) -> Any:
        return self._space.watch()

    def release(self, force: int = 0) -> None:
        """As `api.dlm.Lockspace.release`."""
        self._loop.call(self._space.release(force))

    def close(self) -> None:
        self._loop.call(self._space.close(), goes_on=True)


@final
class Cluster(Closing):
    """A connection to corrald (or a local cluster) for threads."""

    def __init__(self, loop: LoopThread, cluster: "doors.Cluster | doors.LocalCluster") -> None:
        self._loop = loop
        self._cluster = cluster

    @property
    def view(self) -> View | None:
        """The newest view; None before the first, and always for a local cluster."""
        return self._cluster.view if isinstance(self._cluster, doors.Cluster) else None

    def ask(self, what: str, **arguments: Any) -> Any:
        if not isinstance(self._cluster, doors.Cluster):
            raise ValueError("a local cluster has no corrald to ask")
        cluster = self._cluster
        return self._loop.call(cluster.ask(what, **arguments))

    def lockspace(self, name: str, *, value_size: int = VALUE_SIZE, exclusive: bool = False) -> Space:
        async def opened() -> LockSpace:
            return await self._cluster.lockspace(name, value_size=value_size, exclusive=exclusive)

        return Space(self._loop, self._loop.call(opened()))

    def close(self) -> None:
        try:
            self._loop.call(self._cluster.close())
        finally:
            self._loop.close()


def _open(connecting: Any) -> Cluster:
    loop = LoopThread()
    try:
        return Cluster(loop, loop.call(connecting.__aenter__()))
    except BaseException:
        loop.close()
        raise


def connect(path: str | os.PathLike[str] | None = None) -> Cluster:
    """As `corral.connect`."""
    return _open(doors.connect(path))


def local() -> Cluster:
    """As `corral.local`."""
    return _open(doors.local())


async def _next(it: Any) -> SpaceEvent | None:
    event: SpaceEvent | None = await anext(it, None)
    return event
