"""A lock engine with nothing but locks: what bench/dlm.py holds the shipped engine against.

A request goes in, completions come out: of that request and of those it made grantable. Six modes, three queues,
conversions before newcomers, first come first served. No flags, tokens, values, counters, clients, members, directory
or lease, and no check of what it is asked. It is written in the style the engine is written in (slotted final classes,
int modes, tables), so that the difference is what the rules cost and not how they are put down.
"""

from typing import Final, final

IV: Final = -1

GRANTED: Final = 0
CONVERTING: Final = 1
WAITING: Final = 2

LOCK: Final = 0
CONVERT: Final = 1
UNLOCK: Final = 2

# COMPATIBLE[asked][held]; symmetrical.       NL     CR     CW     PR     PW     EX
COMPATIBLE: Final[tuple[tuple[bool, ...], ...]] = (
    (True, True, True, True, True, True),  # NL
    (True, True, True, True, True, False),  # CR
    (True, True, True, False, False, False),  # CW
    (True, True, False, True, False, False),  # PR
    (True, True, False, False, False, False),  # PW
    (True, False, False, False, False, False),  # EX
)


@final
class Request:
    __slots__ = ("handle", "mode", "name", "op")

    def __init__(self, op: int, handle: int, name: bytes, mode: int) -> None:
        self.op = op
        self.handle = handle
        self.name = name
        self.mode = mode


@final
class Completion:
    __slots__ = ("handle", "mode")

    def __init__(self, handle: int, mode: int) -> None:
        self.handle = handle
        self.mode = mode  # IV: unlocked


@final
class Lock:
    __slots__ = ("granted", "handle", "requested", "resource", "status")

    def __init__(self, handle: int, resource: "Resource", mode: int) -> None:
        self.handle = handle
        self.resource = resource
        self.status = WAITING
        self.granted = IV
        self.requested = mode


@final
class Resource:
    __slots__ = ("converting", "granted", "name", "waiting")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.granted: list[Lock] = []
        self.converting: list[Lock] = []
        self.waiting: list[Lock] = []

    def fits(self, lock: Lock) -> bool:
        """Whether its mode goes with those of all others."""
        compatible = COMPATIBLE[lock.requested]
        for queue in (self.granted, self.converting):
            for other in queue:
                if not compatible[other.granted] and other is not lock:
                    return False
        return True

    def grant(self, lock: Lock) -> None:
        lock.granted = lock.requested
        lock.requested = IV
        lock.status = GRANTED

    def grant_pending(self, done: list[Completion]) -> None:
        while self.converting and self.fits(self.converting[0]):
            self.pass_on(self.converting, done)
        while self.waiting and not self.converting and self.fits(self.waiting[0]):
            self.pass_on(self.waiting, done)

    def pass_on(self, queue: list[Lock], done: list[Completion]) -> None:
        lock = queue.pop(0)
        self.grant(lock)
        self.granted.append(lock)
        done.append(Completion(lock.handle, lock.granted))


@final
class Engine:
    def __init__(self) -> None:
        self.resources: dict[bytes, Resource] = {}
        self.locks: dict[int, Lock] = {}
        self.done: list[Completion] = []

    def step(self, request: Request) -> None:
        if request.op == LOCK:
            self.lock(request)
        elif request.op == UNLOCK:
            self.unlock(request)
        else:
            self.convert(request)

    def ready(self) -> list[Completion]:
        """What has been decided since it was last asked."""
        done, self.done = self.done, []
        return done

    def lock(self, request: Request) -> None:
        name = request.name
        resource = self.resources.get(name)
        if resource is None:
            self.resources[name] = resource = Resource(name)
        self.locks[request.handle] = lock = Lock(request.handle, resource, request.mode)
        if resource.converting or resource.waiting or not resource.fits(lock):
            resource.waiting.append(lock)
            return
        resource.grant(lock)
        resource.granted.append(lock)
        self.done.append(Completion(lock.handle, lock.granted))

    def convert(self, request: Request) -> None:
        lock = self.locks[request.handle]
        resource = lock.resource
        lock.requested = request.mode
        if not resource.fits(lock):
            resource.granted.remove(lock)
            lock.status = CONVERTING
            resource.converting.append(lock)
            return
        resource.grant(lock)
        self.done.append(Completion(lock.handle, lock.granted))
        if resource.converting or resource.waiting:
            resource.grant_pending(self.done)

    def unlock(self, request: Request) -> None:
        lock = self.locks.pop(request.handle)
        resource = lock.resource
        if lock.status == GRANTED:
            resource.granted.remove(lock)
        elif lock.status == CONVERTING:
            resource.converting.remove(lock)
        else:
            resource.waiting.remove(lock)
        self.done.append(Completion(lock.handle, IV))
        if resource.converting or resource.waiting:
            resource.grant_pending(self.done)
        elif not resource.granted:
            del self.resources[resource.name]
