"""A lock manager small enough to be believed: one process, several clients, `api.dlm.Lockspace.submit` for each.

Grants, converts and waits as the dlm does, as far as glocks use it; answers come a step later, never during `submit`.
`kill(client)` is what fencing and the dlm's recovery amount to: its locks are gone and it hears nothing any more.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tests.unit.gfs.world import World

from corral.api.dlm import EUNLOCK, EX, NL, NOQUEUE, NOQUEUEBAST, Completion, Request

EAGAIN = -11
EDEADLK = -35
# COMPATIBLE[held][wanted], in the order NL CR CW PR PW EX
COMPATIBLE = (
    (1, 1, 1, 1, 1, 1),
    (1, 1, 1, 1, 1, 0),
    (1, 1, 1, 0, 0, 0),
    (1, 1, 0, 1, 0, 0),
    (1, 1, 0, 0, 0, 0),
    (1, 0, 0, 0, 0, 0),
)


class Lock:
    def __init__(self, handle: int, client: "Client", resource: bytes, blocking: Any) -> None:
        self.handle = handle
        self.client = client
        self.resource = resource
        self.blocking = blocking
        self.mode = -1  # not granted
        self.wanted = NL
        self.completed: Any = None


class Manager:
    def __init__(self, world: World) -> None:
        self.world = world
        self.locks: dict[int, Lock] = {}
        self.resources: dict[bytes, list[Lock]] = {}
        self.waiting: dict[bytes, list[Lock]] = {}
        self.next = 1
        self.blasts = 0

    def client(self) -> "Client":
        return Client(self)

    def holders(self, resource: bytes) -> list[tuple["Client", int]]:
        return [(lock.client, lock.mode) for lock in self.resources.get(resource, []) if lock.mode > NL]

    # --- the queues --------------------------------------------------------------------------------------------------

    def ask(self, lock: Lock, mode: int, flags: int, completed: Any) -> None:
        lock.wanted, lock.completed = mode, completed
        queue = self.waiting.setdefault(lock.resource, [])
        down = mode <= lock.mode
        if down or (self._fits(lock, mode) and not queue):
            lock.mode = mode
            self._answer(lock, 0)
            self._grant(lock.resource)
        elif flags & NOQUEUE:
            if flags & NOQUEUEBAST:
                self._blast(lock, mode)
            self._answer(lock, EAGAIN)
            if lock.mode < NL:
                self._forget(lock)
        elif any(not COMPATIBLE[max(lock.mode, NL)][other.wanted] for other in queue):
            self._answer(lock, EDEADLK)  # somebody ahead waits for what this one holds
        else:
            queue.append(lock)
            self._blast(lock, mode)

    def _fits(self, lock: Lock, mode: int) -> bool:
        return all(
            other is lock or other.mode < NL or COMPATIBLE[other.mode][mode]
            for other in self.resources.get(lock.resource, [])
        )

    def _blast(self, lock: Lock, mode: int) -> None:
        for other in self.resources.get(lock.resource, []):
            if other is not lock and other.mode >= NL and not COMPATIBLE[other.mode][mode]:
                self.blasts += 1
                self._tell(other, mode)

    def _tell(self, other: Lock, mode: int) -> None:
        def call() -> None:
            if other.client.alive and other.handle in self.locks and other.blocking is not None:
                other.blocking(other.handle, mode)

        other.client.soon(call)

    def _answer(self, lock: Lock, status: int) -> None:
        completed, handle, mode = lock.completed, lock.handle, max(lock.mode, NL)

        def call() -> None:
            if lock.client.alive:
                completed(handle, Completion(status, 0, mode, b"", False, 0))

        lock.client.soon(call)

    def _grant(self, resource: bytes) -> None:
        queue = self.waiting.get(resource, [])
        while queue and self._fits(queue[0], queue[0].wanted):
            lock = queue.pop(0)
            lock.mode = lock.wanted
            self._answer(lock, 0)
        if queue:
            self._blast(queue[0], queue[0].wanted)

    def _forget(self, lock: Lock) -> None:
        self.locks.pop(lock.handle, None)
        self.resources[lock.resource].remove(lock)

    def unlock(self, lock: Lock, completed: Any) -> None:
        lock.completed = completed
        self._forget(lock)
        self._answer(lock, EUNLOCK)
        self._grant(lock.resource)

    def kill(self, client: "Client") -> None:
        client.alive = False
        for queue in self.waiting.values():
            queue[:] = [lock for lock in queue if lock.client is not client]
        for lock in [lock for lock in self.locks.values() if lock.client is client]:
            self._forget(lock)
        for resource in sorted(self.waiting):
            self._grant(resource)


class Client:
    """One member's lockspace."""

    name = "test"

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.alive = True
        self._last = 0

    def soon(self, call: Callable[[], None]) -> None:
        """One client hears everything in order."""
        self._last = max(self._last, self.manager.world.soon_at())
        self.manager.world.call_at(self._last, call)

    def submit(
        self,
        requests: Sequence[Request],
        completed: Callable[[int, Completion], None],
        blocking: Callable[[int, int], None] | None = None,
    ) -> list[int]:
        manager = self.manager
        handles: list[int] = []
        if not self.alive:
            return [0 for _ in requests]
        for request in requests:
            if request.op == "lock":
                lock = Lock(manager.next, self, request.resource, blocking)
                manager.next += 1
                manager.locks[lock.handle] = lock
                manager.resources.setdefault(request.resource, []).append(lock)
            else:
                lock = manager.locks[request.lock]
            handles.append(lock.handle)
            if request.op == "unlock":
                manager.unlock(lock, completed)
            elif request.op in ("lock", "convert"):
                manager.ask(lock, request.mode, request.flags, completed)
        return handles

    def lock(self, *arguments: Any, **named: Any) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        if self.alive:
            self.manager.kill(self)


__all__ = ["EX", "Client", "Manager"]
