"""The holder's side, upper half: what clients ask, checked, and begun as operations or completed at once.

The fast path (`lock_now`, `unlock_now`, `complete_now`) is for what concerns nobody else: a locally mastered resource
on which nobody waits. It decides by the same code as every other request and differs only in going neither through the
inbox nor out through `ready`. When it says no, nothing has happened.

Clients are numbered by whoever runs the engine, handles by the client.
"""

from corral.api.dlm import (
    CANCEL,
    ECANCEL,
    EUNLOCK,
    EX,
    FORCEUNLOCK,
    IV,
    NL,
    ORPHAN,
    VALBLK,
    Completion,
)
from corral.api.dlm import Request as Asked
from corral.base.ids import NAME_MAX
from corral.base.time import Instant
from corral.dlm.events import (
    Done,
)
from corral.dlm.extent import illegal
from corral.dlm.modes import (
    EBUSY,
    EEXIST,
    EINVAL,
    ENOENT,
    ENOMEM,
    ENOTCONN,
    check_conversion,
    check_convert,
    check_request,
    check_unlock,
)
from corral.dlm.operations import CANCELLED, FORCED, HANDLE_MAX, LOST, RUNNING
from corral.dlm.orphans import CLIENT_MAX
from corral.dlm.queries import Queries
from corral.dlm.recovery import CONVERT, REQUEST, UNLOCK
from corral.dlm.resource import USED_SINCE, Effects, Lock, Resource
from corral.dlm.space import LOCKS_MAX

_NO_EFFECTS: Effects = []  # for what cannot have any


class Requests(Queries):
    # --- the fast path ------------------------------------------------------------------------------------------------

    def lock_now(self, now: Instant, client: int, handle: int, name: bytes, mode: int, flags: int) -> Lock | None:
        """A new lock on a locally mastered name, if it can be granted at once; else nothing has happened."""
        if self.phase != RUNNING or now >= self.lease_until:
            return None
        if flags & ~VALBLK and (flags & ORPHAN or check_request(name, mode, flags)):
            return None
        space = self.space
        if not (NL <= mode <= EX and 0 < handle <= HANDLE_MAX and 0 <= client <= CLIENT_MAX):
            return None
        address = client << 32 | handle
        page = space.locks.page(address)
        if address in page or space.lock_count >= LOCKS_MAX:
            return None
        resource = space.resources.get(name)
        if resource is None:
            if not 0 < len(name) <= NAME_MAX or space.directory_of(name) != self.me or name in space.directory:
                return None
            resource = space.resources.make(name)
            space.become_master(resource, space.floor)
        elif not resource.complete:
            return None
        lock = Lock(address, resource, None, handle)
        lock.requested = mode
        lock.flags = flags
        if flags & VALBLK:
            lock.value = self._zeros
        if not resource.grant_now(lock):
            return None
        if resource.tossed:
            resource.tossed = USED_SINCE
        resource.processes += 1
        page[address] = lock
        space.lock_count += 1
        space.counters.granted += 1
        return lock

    def unlock_now(self, now: Instant, lock: Lock, flags: int, value: bytes | None) -> bool:
        """Ends a granted lock if it is mastered here and no other member has to hear of it; else nothing happened."""
        resource = lock.resource
        if (
            self.phase != RUNNING
            or now >= self.lease_until
            or not resource.complete
            or resource.converting
            or resource.waiting
            or lock.pending
            or lock.abandoned
            or (flags and (flags & CANCEL or check_unlock(flags)))
        ):
            return False
        if value is not None:
            if len(value) > self.value_size:
                return False
            lock.value = self._padded(value)
        elif flags & VALBLK and lock.value is None:
            lock.value = self._zeros
        if flags:
            resource.unlock(lock, flags, _NO_EFFECTS)
        else:
            lock.result_flags = 0
            resource.remove(lock)  # no value to write, and nobody to grant anything to
        self.space.drop_lock(now, lock)
        return True

    def complete_now(self, now: Instant, client: int, handle: int, asked: Asked) -> Completion | None:
        """`Submit` of one request, if it completes at once and concerns nobody else; else None and nothing happened.

        The same code decides as for `Submit`; only the ways through the inbox and out again are left out.
        """
        if asked.op == "lock":
            if asked.value is not None or asked.range is not None:
                return None
            lock = self.lock_now(now, client, handle, asked.resource, asked.mode, asked.flags)
            if lock is None:
                return None
            lock.owner = asked.owner or handle
            return self._completion(lock, 0)
        lock = self.space.locks.get(client << 32 | handle)
        if lock is None:
            return None
        if asked.op == "unlock":
            if not self.unlock_now(now, lock, asked.flags, asked.value):
                return None
            return self._completion(lock, EUNLOCK)
        if asked.op == "convert":
            return self._convert_now(now, lock, asked)
        return None

    def _convert_now(self, now: Instant, lock: Lock, asked: Asked) -> Completion | None:
        resource = lock.resource
        flags = asked.flags
        if (
            self.phase != RUNNING
            or now >= self.lease_until
            or not resource.complete
            or resource.converting
            or resource.waiting
            or len(resource.granted) != 1
            or lock.pending
            or lock.abandoned
            or resource.ranged
            or asked.range is not None
            or not NL <= asked.mode <= EX
            or (flags & ~VALBLK and check_convert(lock.granted, asked.mode, flags))
            or (asked.value is not None and len(asked.value) > self.value_size)
        ):
            return None
        lock.requested = asked.mode
        lock.flags = flags
        lock.result_flags = 0
        lock.answer = 0
        if flags & VALBLK:
            if asked.value is not None:
                lock.value = self._padded(asked.value)
            elif lock.value is None:
                lock.value = self._zeros
        assert resource.granted[0] is lock, "DLM-1"  # the only lock there is: any mode goes with those of the others
        resource.grant(lock)
        self.space.counters.granted += 1
        return self._completion(lock, 0)

    # --- through the inbox -------------------------------------------------------------------------------------------

    def _submit(self, now: Instant, client: int, handle: int, cookie: int, asked: Asked) -> None:
        op = asked.op
        error = 0
        if self.phase == LOST:
            error = ENOTCONN
        elif op == "lock":
            error = self._lock(now, client, handle, cookie, asked)
        elif op == "purge":
            error = self._purge(now, client, handle, cookie, asked)
        elif op == "query":
            error = self._query(now, client, handle, cookie, asked)
        else:
            lock = self.space.locks.get(client << 32 | handle)
            if lock is None or lock.abandoned:
                error = ENOENT
            elif op == "convert":
                error = self._convert(now, lock, cookie, asked)
            elif op == "unlock" and not asked.flags & CANCEL:
                error = self._unlock(now, lock, cookie, asked)
            elif op in ("cancel", "unlock"):
                error = self._cancel(now, lock, cookie, asked.flags)
            else:
                error = EINVAL
        if error:
            self._give(now, Done(client, handle, cookie, Completion(error, 0, IV, b"", False, 0)))

    def _lock(self, now: Instant, client: int, handle: int, cookie: int, asked: Asked) -> int:
        error = check_request(asked.resource, asked.mode, asked.flags)
        if error or illegal(asked.range) or (asked.value is not None and len(asked.value) > self.value_size):
            return EINVAL
        if asked.flags & ORPHAN:
            return self._adopt(now, client, handle, cookie, asked)
        if self.space.lock_count >= LOCKS_MAX:
            return ENOMEM
        resource = self.space.resource(asked.resource)
        lock = self._enter(client, handle, resource)
        if lock is None:
            if not resource.processes and not resource.copies:
                self.space.toss(now, resource)
            return EEXIST if client <= CLIENT_MAX and 0 < handle <= HANDLE_MAX else EINVAL
        self._load(lock, asked)
        lock.owner = asked.owner or handle
        lock.operation = 1
        self._begin(now, lock, REQUEST, cookie, asked.timeout_ns)
        return 0

    def _convert(self, now: Instant, lock: Lock, cookie: int, asked: Asked) -> int:
        if (
            check_conversion(asked.mode, asked.flags)
            or illegal(asked.range)
            or (asked.value is not None and len(asked.value) > self.value_size)
        ):
            return EINVAL
        if lock.pending:
            return EBUSY
        if check_convert(lock.granted, asked.mode, asked.flags):
            return EINVAL
        self._load(lock, asked)
        lock.operation += 1
        self._begin(now, lock, CONVERT, cookie, asked.timeout_ns)
        return 0

    def _unlock(self, now: Instant, lock: Lock, cookie: int, asked: Asked) -> int:
        if check_unlock(asked.flags) or (asked.value is not None and len(asked.value) > self.value_size):
            return EINVAL
        value = None if asked.value is None else self._padded(asked.value)
        if lock.pending:
            if lock.pending == UNLOCK or lock.overlap == FORCED:
                return EINVAL if asked.flags & FORCEUNLOCK else EBUSY
            if not asked.flags & FORCEUNLOCK:
                return EBUSY
            self._tell(now, lock, ECANCEL)
        self._end(now, lock, asked.flags, value, cookie)
        return 0

    def _cancel(self, now: Instant, lock: Lock, cookie: int, flags: int) -> int:
        if check_unlock(flags | CANCEL):
            return EINVAL
        if lock.pending == UNLOCK or lock.overlap in (CANCELLED, FORCED):
            return EINVAL
        if not lock.pending and lock.flags & CANCEL:
            return EINVAL  # cancelled already, and nothing asked for since
        # What became of the cancelled operation is that one's completion; this one says that the cancel is under way.
        self._give(now, Done(lock.address >> 32, lock.address & HANDLE_MAX, cookie, self._completion(lock, 0)))
        if lock.pending:
            self._withdraw(now, lock, CANCELLED)
        return 0

    def _enter(self, client: int, handle: int, resource: Resource) -> Lock | None:
        if not (0 <= client <= CLIENT_MAX and 0 < handle <= HANDLE_MAX):
            return None
        space = self.space
        address = client << 32 | handle
        page = space.locks.page(address)
        if address in page:
            return None
        lock = Lock(address, resource, None, handle)
        page[address] = lock
        space.lock_count += 1
        resource.processes += 1
        return lock

    def _load(self, lock: Lock, asked: Asked) -> None:
        lock.requested = asked.mode
        lock.wanted = lock.extent if asked.range is None else asked.range
        lock.flags = asked.flags
        lock.result_flags = 0
        lock.offered = None if asked.value is None or not asked.flags & VALBLK else self._padded(asked.value)

    def _padded(self, value: bytes) -> bytes:
        return value if len(value) == self.value_size else value.ljust(self.value_size, b"\0")
