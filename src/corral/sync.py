"""corral without asyncio: the same calls, blocking, from any thread.

    with corral.sync.connect() as cluster:
        space = cluster.lockspace("orders")
        with space.lock("invoice-42", corral.EX, timeout=5) as held:
            held.token, held.value

One event loop runs in a thread of its own; every call here hands a coroutine to it and waits. A body cannot be
cancelled from outside in a plain thread: losing a lock's guarantee raises LockLost when the body is left, and
`held.valid` tells it at once.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar, final

from corral import doors
from corral.api.dlm import EX, VALUE_SIZE
from corral.base.errors import LockLost
from corral.base.time import Seconds
from corral.base.view import View
from corral.providers.locks import HeldLock, LockSpace

T = TypeVar("T")


@final
class _Loop:
    """The thread that runs everything asynchronous of one cluster object."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="corral", daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@final
class Held:
    """A held lock, as `api.dlm.Lock`, its methods blocking."""

    def __init__(self, loop: _Loop, held: HeldLock) -> None:
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
        self._loop.call(self._held.unlock(value=value))

    def __enter__(self) -> "Held":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held._lost:
            raise LockLost(f"{self.resource!r}: its guarantee was lost while it was held") from error
        if self._held.mode >= 0:
            self._loop.call(self._held.unlock())


@final
class Space:
    """A lockspace, as `api.dlm.Lockspace`, its methods blocking."""

    def __init__(self, loop: _Loop, space: LockSpace) -> None:
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

        return Held(self._loop, self._loop.call(acquire()))


@final
class Cluster:
    """A connection to corrald (or a local cluster) for threads."""

    def __init__(self, loop: _Loop, cluster: "doors.Cluster | doors.LocalCluster") -> None:
        self._loop = loop
        self._cluster = cluster

    @property
    def view(self) -> View | None:
        """The newest view; None before the first, and always for a local cluster."""
        return self._cluster.view if isinstance(self._cluster, doors.Cluster) else None

    def ask(self, what: str, **arguments: Any) -> Any:
        if not isinstance(self._cluster, doors.Cluster):
            raise ValueError("a local cluster has no corrald to ask")
        return self._loop.call(self._cluster.ask(what, **arguments))

    def lockspace(self, name: str, *, value_size: int = VALUE_SIZE) -> Space:
        return Space(self._loop, self._loop.call(self._cluster.lockspace(name, value_size=value_size)))

    def close(self) -> None:
        self._loop.call(self._cluster.close())
        self._loop.close()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(connecting: Any) -> Cluster:
    loop = _Loop()
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
