"""A lockspace on one member: the lock manager's door.

Every participant of a lockspace runs one of these; all are equal. A request goes to the member that masters its
resource, found through the directory (a pure function of the name and the members); a resource nobody uses yet is
mastered by the first to ask. Locally mastered resources cost no message, and `complete_now` no event either.

Life: *stopped* at first and after Stop; *recovering* from Start (`recovery.py`); *running* from Finish. While not
running, or while the lease has lapsed, held locks stay held; new requests and unlocks wait here, bounded by their
timeouts. Each lock has at most one operation under way (`pending`), kept until its answer; in each new round every
unanswered one is sent again under the same number.

Invariants: DLM-1 and DLM-2 (`resource.py`), DLM-5 (`recovery.py`); DLM-6 while now >= lease_until no grant, completion
or blocking callback leaves, local or remote; DLM-7 every request has exactly one completion, unless its client is gone.
Files: `resource.py` the rules, `space.py` the tables, `master.py` what peers ask, `recovery.py` rounds, `wire.py` the
messages, `events.py` what goes in and out.
Source: features 1.5; Linux `fs/dlm`. Deviations: a force unlock is one operation that overtakes the pending one; one
message type answers all operations; timeouts are the holder's business, a remote one is a Cancel.
"""

from heapq import heapify, heappop, heappush
from typing import Final, TypeAlias, final

from corral.api.dlm import (
    CANCEL,
    ECANCEL,
    EUNLOCK,
    EX,
    FORCEUNLOCK,
    IV,
    NL,
    ORPHAN,
    PERSISTENT,
    VALBLK,
    VALNOTVALID,
    VALUE_SIZE,
    Completion,
)
from corral.api.dlm import Request as Asked
from corral.base.engine import Ready, Received, Tick
from corral.base.ids import NAME_MAX, MemberId
from corral.base.time import FOREVER, Instant, Nanoseconds
from corral.dlm.events import (
    Blocked,
    ClientGone,
    Done,
    Finish,
    Lease,
    Lost,
    RoundDone,
    SpaceLost,
    Start,
    Stop,
    Submit,
)
from corral.dlm.master import Mastering
from corral.dlm.modes import (
    EAGAIN,
    EBUSY,
    EDEADLK,
    EEXIST,
    EINVAL,
    ENOENT,
    ENOMEM,
    ETIMEDOUT,
    check_convert,
    check_request,
    check_unlock,
)
from corral.dlm.recovery import CONVERT, DONE, NO_OPERATION, REQUEST, STAGE_NAMES, UNLOCK, Recovery
from corral.dlm.resource import CONVERTING, QUEUED, WAITING, Effects, Lock, Resource
from corral.dlm.space import FROZEN_MAX, LOCKS_MAX, TOSS_NS, Counters, Space
from corral.dlm.wire import (
    Blocking,
    Cancel,
    Claim,
    Completed,
    Convert,
    Master,
    Masters,
    Names,
    NotMaster,
    Reached,
    RecoverLocks,
    Remove,
    Request,
    Unlock,
)

Event: TypeAlias = Start | Stop | Finish | Submit | ClientGone | Lease | Lost | Tick | Received[object]

# Phases.
STOPPED: Final = 0
RECOVERING: Final = 1
RUNNING: Final = 2
LOST: Final = 3
PHASE_NAMES: Final = ("stopped", "recovering", "running", "lost")

# Lock.overlap: why a Cancel is under way.
_CANCEL: Final = 1
_TIMEOUT: Final = 2
_FORCE: Final = 3  # an unlock follows: `Lock.then`

ENOTCONN: Final = -107
HANDLE_MAX: Final = 0xFFFFFFFF
CLIENT_MAX: Final = 0x7FFFFFFE
ORPHANS: Final = 0x7FFFFFFF  # the client that PERSISTENT locks of dead clients belong to
VALUE_SIZE_MAX: Final = 4096
EXPIRE_MAX: Final = 256  # unused resources forgotten in one step


@final
class LockspaceEngine:
    """Binds to `base.engine.Engine`. Before the first round it is stopped; `lease_until` begins where it is told."""

    def __init__(
        self,
        me: MemberId,
        name: str,
        value_size: int = VALUE_SIZE,
        *,
        lease_until: Instant = 0,
        toss_ns: Nanoseconds = TOSS_NS,
    ) -> None:
        assert 0 < value_size <= VALUE_SIZE_MAX, "value_size is 8 to 4096 bytes"
        assert value_size % 8 == 0, "value_size is a multiple of 8"
        self.me = me
        self.name = name
        self.value_size = value_size
        self._zeros = bytes(value_size)
        self.phase = STOPPED
        self.lease_until = lease_until
        self.space = Space(me, value_size, toss_ns)
        self.recovery = Recovery(self.space, mastering := Mastering(self.space))
        self._mastering = mastering
        self._announced = 0
        self._emit: list[object] = []
        self._held: list[object] = []  # decided while the lease had lapsed
        self._lapsed = False  # as of the last tick: nothing to forget before the next lease
        self._frozen: list[tuple[MemberId, object]] = []  # messages that wait until we run
        self._deferred: dict[int, None] = {}  # locks whose operation waits until we run, in order
        self._timeouts: list[tuple[Instant, int]] = []
        self._timed = 0  # locks with a deadline; the heap may hold stale entries beside
        self._orphans: dict[bytes, list[Lock]] = {}

    # --- the engine contract ---------------------------------------------------------------------------------------

    @property
    def deadline(self) -> Instant:
        first = self._timeouts[0][0] if self._timeouts else FOREVER
        if self.phase != RUNNING or self._lapsed:
            return first
        return min(first, self.space.toss_deadline())

    @property
    def counters(self) -> Counters:
        return self.space.counters

    def ready(self) -> Ready:
        ready = Ready()
        send = self.space.send
        if send:
            self.space.counters.sent += len(send)
            ready.send, self.space.send = send, []
        if self._emit:
            ready.emit, self._emit = self._emit, []
        return ready

    def step(self, now: Instant, event: Event) -> None:
        if isinstance(event, Received):
            if self.phase != LOST:
                self._received(now, event.peer, event.message)
        elif isinstance(event, Submit):
            for handle, cookie, asked in event.operations:
                self._submit(now, event.client, handle, cookie, asked)
        elif isinstance(event, Tick):
            self._tick(now)
        elif isinstance(event, Lease):
            self._lease(now, event.until)
        elif isinstance(event, ClientGone):
            self._client_gone(now, event.client)
        elif self.phase == LOST:
            pass
        elif isinstance(event, Stop):
            self.phase = STOPPED
        elif isinstance(event, Start):
            self._start(now, event)
        elif isinstance(event, Finish):
            self._finish(now, event.round_id)
        elif isinstance(event, Lost):
            self._lose()

    @property
    def state(self) -> str:
        """For status: what this lockspace is doing, or waits for."""
        if self.phase == RECOVERING:
            return f"recovering: {STAGE_NAMES[self.recovery.stage]}"
        return PHASE_NAMES[self.phase]

    # --- the fast path ---------------------------------------------------------------------------------------------

    def lock_now(self, now: Instant, client: int, handle: int, name: bytes, mode: int, flags: int) -> Lock | None:
        """A new lock on a locally mastered name, if it can be granted at once; else nothing has happened."""
        if self.phase != RUNNING or now >= self.lease_until:
            return None
        if flags & ~VALBLK and (flags & ORPHAN or check_request(name, mode, flags)):
            return None
        if not (NL <= mode <= EX and 0 < len(name) <= NAME_MAX and 0 < handle <= HANDLE_MAX):
            return None
        space = self.space
        resource = space.resources.get(name)
        if resource is None:
            if space.directory_of(name) != self.me or name in space.directory or client > CLIENT_MAX:
                return None
            space.directory[name] = self.me
            resource = space.resource(name)
            space.become_master(resource, space.floor)
            space.toss(now, resource)
        elif not resource.complete:
            return None
        locks = space.clients.get(client)
        if locks is None:
            if not 0 <= client <= CLIENT_MAX:
                return None
            space.clients[client] = locks = {}
        elif handle in locks or space.lock_count >= LOCKS_MAX:
            return None
        lock = Lock(client << 32 | handle, resource, None, handle)
        lock.requested = mode
        lock.flags = flags
        if flags & VALBLK:
            lock.value = self._zeros
        if not resource.grant_now(lock):
            return None
        if not resource.processes:
            space.tossed.pop(name, None)
        resource.processes += 1
        locks[handle] = lock
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
        resource.unlock(lock, flags, _NO_EFFECTS)
        self.space.drop_lock(now, lock)
        return True

    def complete_now(self, now: Instant, client: int, handle: int, asked: Asked) -> Completion | None:
        """`Submit` of one request, if it completes at once and concerns nobody else; else None and nothing happened.

        The same code decides as for `Submit`; only the ways through the inbox and out again are left out.
        """
        if asked.op == "lock":
            if asked.value is not None:
                return None
            lock = self.lock_now(now, client, handle, asked.resource, asked.mode, asked.flags)
            if lock is None:
                return None
            lock.owner = asked.owner or handle
            return self._completion(lock, 0)
        held = self.space.clients.get(client)
        lock = None if held is None else held.get(handle)
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
        if (
            self.phase != RUNNING
            or now >= self.lease_until
            or not resource.complete
            or resource.converting
            or resource.waiting
            or len(resource.granted) != 1
            or lock.pending
            or check_convert(lock.granted, asked.mode, asked.flags)
            or (asked.value is not None and len(asked.value) > self.value_size)
        ):
            return None
        self._load(lock, asked)
        lock.answer = 0
        self._use_block(lock)
        status = resource.convert(lock, _NO_EFFECTS)
        assert status == 0, "DLM-1"
        self.space.counters.granted += 1
        return self._completion(lock, 0)

    # --- requests of clients ---------------------------------------------------------------------------------------

    def _submit(self, now: Instant, client: int, handle: int, cookie: int, asked: Asked) -> None:
        op = asked.op
        error = 0
        if self.phase == LOST:
            error = ENOTCONN
        elif op == "lock":
            error = self._lock(now, client, handle, cookie, asked)
        else:
            lock = self.space.clients.get(client, _NO_LOCKS).get(handle)
            if lock is None or lock.abandoned:
                error = ENOENT
            elif op == "convert":
                error = self._convert(now, lock, cookie, asked)
            elif op == "unlock" and not asked.flags & CANCEL:
                error = self._unlock(now, lock, cookie, asked)
            elif op in ("cancel", "unlock"):
                error = self._cancel(now, lock, cookie)
            else:
                error = EINVAL
        if error:
            self._give(now, Done(client, handle, cookie, Completion(error, 0, IV, b"", False, 0)))

    def _lock(self, now: Instant, client: int, handle: int, cookie: int, asked: Asked) -> int:
        error = check_request(asked.resource, asked.mode, asked.flags)
        if error or (asked.value is not None and len(asked.value) > self.value_size):
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
        if lock.pending:
            return EBUSY
        if check_convert(lock.granted, asked.mode, asked.flags) or (
            asked.value is not None and len(asked.value) > self.value_size
        ):
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
            if lock.pending == UNLOCK or lock.overlap == _FORCE:
                return EINVAL if asked.flags & FORCEUNLOCK else EBUSY
            if not asked.flags & FORCEUNLOCK:
                return EBUSY
            self._tell(now, lock, ECANCEL)
        self._end(now, lock, asked.flags, value, cookie)
        return 0

    def _end(self, now: Instant, lock: Lock, flags: int, value: bytes | None, cookie: int) -> None:
        """Unlocks in whatever state the lock is. An operation that a master may have seen is cancelled first."""
        if lock.pending and lock.sent:
            lock.then = (flags, value, cookie)
            self._no_deadline(lock)
            self._withdraw(now, lock, _FORCE)
            return
        lock.flags = flags
        lock.offered = value
        lock.operation += 1
        self._begin(now, lock, UNLOCK, cookie, 0)

    def _cancel(self, now: Instant, lock: Lock, cookie: int) -> int:
        if lock.pending == UNLOCK or lock.overlap in (_CANCEL, _FORCE):
            return EINVAL
        if not lock.pending and lock.flags & CANCEL:
            return EINVAL  # cancelled already, and nothing asked for since
        # What became of the cancelled operation is that one's completion; this one says that the cancel is under way.
        self._give(now, Done(lock.id >> 32, lock.id & HANDLE_MAX, cookie, self._completion(lock, 0)))
        if lock.pending:
            self._withdraw(now, lock, _CANCEL)
        return 0

    def _withdraw(self, now: Instant, lock: Lock, why: int) -> None:
        """Cancels the pending request or conversion: at once where that can be decided here, else by asking."""
        lock.overlap = why
        if lock.status in (WAITING, CONVERTING):
            if not self._running(now):
                return  # other members' locks may become grantable by this: after Finish
            effects: Effects = []
            self._finished_operation(now, lock, lock.resource.cancel(lock, effects))
            self._apply(now, effects)
        elif not lock.sent or (self._running(now) and lock.resource.complete):
            self._undo(now, lock)
        elif self._running(now) and lock.resource.looking is None and lock.resource.master is not None:
            self.space.send.append((lock.resource.master, Cancel(lock.id, lock.operation)))

    def _undo(self, now: Instant, lock: Lock) -> None:
        """Takes back an operation that no master has seen."""
        if lock.resource.looking is not None and lock in lock.resource.looking:
            lock.resource.looking.remove(lock)
        self._finished_operation(now, lock, ECANCEL)

    def _enter(self, client: int, handle: int, resource: Resource) -> Lock | None:
        if not (0 <= client <= CLIENT_MAX and 0 < handle <= HANDLE_MAX):
            return None
        space = self.space
        locks = space.clients.get(client)
        if locks is None:
            space.clients[client] = locks = {}
        elif handle in locks:
            return None
        lock = Lock(client << 32 | handle, resource, None, handle)
        locks[handle] = lock
        space.lock_count += 1
        resource.processes += 1
        return lock

    def _load(self, lock: Lock, asked: Asked) -> None:
        lock.requested = asked.mode
        lock.flags = asked.flags
        lock.result_flags = 0
        lock.offered = None if asked.value is None or not asked.flags & VALBLK else self._padded(asked.value)

    def _padded(self, value: bytes) -> bytes:
        return value if len(value) == self.value_size else value.ljust(self.value_size, b"\0")

    # --- persistent locks of dead clients --------------------------------------------------------------------------

    def _client_gone(self, now: Instant, client: int) -> None:
        for _, lock in sorted(self.space.clients.get(client, _NO_LOCKS).items()):
            if lock.pending == NO_OPERATION and lock.flags & PERSISTENT:
                self._orphan(lock)
            else:
                self._abandon(now, lock)
        self.space.client_gone(client)

    def _abandon(self, now: Instant, lock: Lock) -> None:
        """Nobody waits for this lock any more: unlock it, whatever becomes of its pending operation."""
        lock.abandoned = True
        if lock.pending != UNLOCK and lock.overlap != _FORCE:
            self._end(now, lock, 0, None, 0)

    def _orphan(self, lock: Lock) -> None:
        lock.abandoned = True
        self._orphans.setdefault(lock.resource.name, []).append(lock)

    def _adopt(self, now: Instant, client: int, handle: int, cookie: int, asked: Asked) -> int:
        """ORPHAN: the lock of that name and mode that a dead client left here. Its number at the master stays."""
        orphans = self._orphans.get(asked.resource, [])
        for lock in orphans:
            if lock.granted == asked.mode:
                orphans.remove(lock)
                if not orphans:
                    del self._orphans[asked.resource]
                return self._replace(now, lock, client, handle, cookie)
        return EAGAIN if orphans else ENOENT

    def _replace(self, now: Instant, orphan: Lock, client: int, handle: int, cookie: int) -> int:
        """Gives the orphan its new client's number, which only works while it is mastered here."""
        if not orphan.resource.complete or orphan.pending:
            self._orphans.setdefault(orphan.resource.name, []).append(orphan)
            return EBUSY
        space = self.space
        locks = space.clients.setdefault(client, {})
        if handle in locks:
            self._orphans.setdefault(orphan.resource.name, []).append(orphan)
            return EEXIST
        del space.clients[orphan.id >> 32][orphan.id & HANDLE_MAX]
        space.client_gone(orphan.id >> 32)
        orphan.id = client << 32 | handle
        orphan.abandoned = False
        locks[handle] = orphan
        self._give(now, Done(client, handle, cookie, self._completion(orphan, 0)))
        return 0

    # --- operations on their way -----------------------------------------------------------------------------------

    def _begin(self, now: Instant, lock: Lock, pending: int, cookie: int, timeout_ns: Nanoseconds) -> None:
        self._no_deadline(lock)
        lock.pending = pending
        lock.overlap = 0
        lock.cookie = cookie
        lock.answer = QUEUED
        lock.sent = False
        if self._running(now):
            self._dispatch(now, lock)
        else:
            self._deferred[lock.id] = None
        if timeout_ns > 0 and lock.pending == pending and pending != UNLOCK:
            lock.deadline = now + timeout_ns
            self._timed += 1
            heappush(self._timeouts, (lock.deadline, lock.id))
            self._compact()

    def _dispatch(self, now: Instant, lock: Lock) -> None:
        """Takes the pending operation to the resource's master, here or elsewhere. Only while running."""
        resource = lock.resource
        if lock.overlap and lock.status not in (WAITING, CONVERTING) and (resource.complete or not lock.sent):
            self._undo(now, lock)
            return
        if resource.complete:
            self._perform(now, lock)
        elif resource.looking is not None:
            if lock not in resource.looking:
                resource.looking.append(lock)
        elif lock.pending == UNLOCK and lock.granted == IV and not lock.sent:
            self._finished_operation(now, lock, EUNLOCK)
        elif resource.master is None:
            self._look_up(now, lock)
        else:
            self._ask(lock, resource.master)

    def _perform(self, now: Instant, lock: Lock) -> None:
        """The resource is mastered here."""
        resource = lock.resource
        effects: Effects = []
        if lock.status in (WAITING, CONVERTING) and lock.pending != UNLOCK:
            status = resource.cancel(lock, effects) if lock.overlap else QUEUED  # queued before or by recovery
        elif lock.pending == REQUEST:
            self._use_block(lock)
            status = resource.request(lock, effects)
        elif lock.pending == CONVERT:
            self._use_block(lock)
            status = resource.convert(lock, effects)
        else:
            self._use_block(lock)
            status = resource.unlock(lock, lock.flags, effects)
        if status != QUEUED:
            self._finished_operation(now, lock, status)
        self._apply(now, effects)

    def _use_block(self, lock: Lock) -> None:
        """The lock's value block for an operation here: the caller's, else what it was, else zeros once it is used."""
        if lock.offered is not None:
            lock.value = lock.offered
        elif lock.value is None and lock.flags & VALBLK:
            lock.value = self._zeros

    def _look_up(self, now: Instant, lock: Lock) -> None:
        space = self.space
        resource = lock.resource
        name = resource.name
        node = space.directory_of(name)
        space.counters.lookups += 1
        if node == self.me:
            master = space.assign(name, self.me)
            if master == self.me:
                space.become_master(resource, space.floor)
            else:
                resource.master = master
                resource.confirmed = True
            self._dispatch(now, lock)
            return
        if lock.pending != REQUEST:
            # Only after a master forgot us, which a correct one does not; its answer is what the lock is worth: none.
            self._finished_operation(now, lock, EUNLOCK if lock.pending == UNLOCK else ENOENT)
            return
        resource.looking = [lock]
        lock.sent = True
        space.send.append((node, self._request(lock, True)))

    def _request(self, lock: Lock, lookup: bool) -> Request:
        return Request(
            lock.id,
            lock.operation,
            lock.resource.name,
            lock.requested,
            lock.flags,
            lock.owner,
            lock.offered,
            lookup,
        )

    def _ask(self, lock: Lock, master: MemberId) -> None:
        lock.sent = True
        send = self.space.send
        if lock.pending == REQUEST:
            send.append((master, self._request(lock, False)))
        elif lock.pending == CONVERT:
            send.append((master, Convert(lock.id, lock.operation, lock.requested, lock.flags, lock.offered)))
        else:
            send.append((master, Unlock(lock.id, lock.operation, lock.flags, lock.offered)))
        if lock.overlap:
            send.append((master, Cancel(lock.id, lock.operation)))

    # --- completions -----------------------------------------------------------------------------------------------

    def _apply(self, now: Instant, effects: Effects) -> None:
        """What an operation did to other locks."""
        for lock, code in effects:
            if lock.holder is not None:
                if code > 0:
                    self._mastering.blocking(lock, code)
                else:
                    self._mastering.completed(lock, code)
            elif code > 0:
                self._blocked(now, lock, code)
            elif lock.pending != UNLOCK or code == EUNLOCK:  # else a force unlock is about to overtake this grant
                self._finished_operation(now, lock, code)

    def _finished_operation(self, now: Instant, lock: Lock, status: int) -> None:
        """The pending operation of a lock of this process is over."""
        if status == ECANCEL and lock.overlap == _TIMEOUT:
            status = ETIMEDOUT
        then, lock.then = lock.then, None
        ended = status == EUNLOCK or (lock.pending == REQUEST and status != 0)
        if status:
            lock.requested = IV
            if status == ECANCEL:
                lock.flags |= CANCEL
        if then is None:
            self._tell(now, lock, status)
        elif ended:
            lock.cookie = then[2]
            self._tell(now, lock, EUNLOCK)
        lock.answer = status
        lock.pending = NO_OPERATION
        lock.overlap = 0
        lock.sent = False
        lock.offered = None
        self._no_deadline(lock)
        if ended:
            self._deferred.pop(lock.id, None)
            self.space.drop_lock(now, lock)
        elif then is not None:
            self._end(now, lock, then[0], then[1], then[2])
        elif lock.blocked:
            mode, lock.blocked = lock.blocked, NL
            self._blocked(now, lock, mode)

    def _tell(self, now: Instant, lock: Lock, status: int) -> None:
        self._count(status)
        if not lock.abandoned:
            client, handle = lock.id >> 32, lock.id & HANDLE_MAX
            self._give(now, Done(client, handle, lock.cookie, self._completion(lock, status)))

    def _completion(self, lock: Lock, status: int) -> Completion:
        flags = lock.result_flags
        value = lock.value
        return Completion(
            status,
            flags,
            lock.granted,
            b"" if value is None else value,
            not flags & VALNOTVALID,
            lock.token,
        )

    def _count(self, status: int) -> None:
        counters = self.space.counters
        if status == 0:
            counters.granted += 1
        elif status == EAGAIN:
            counters.not_queued += 1
        elif status == EDEADLK:
            counters.deadlocks += 1
        elif status == ECANCEL:
            counters.cancelled += 1
        elif status == ETIMEDOUT:
            counters.timed_out += 1

    def _blocked(self, now: Instant, lock: Lock, mode: int) -> None:
        if lock.pending == REQUEST:
            lock.blocked = max(lock.blocked, mode)  # told before the grant: said after it
        elif not lock.abandoned and lock.granted != IV:  # else it ended while others were told
            self.space.counters.blocked += 1
            self._give(now, Blocked(lock.id >> 32, lock.id & HANDLE_MAX, mode))

    def _give(self, now: Instant, event: object) -> None:
        """Emits, unless the lease has lapsed: then it waits for the next one (DLM-6)."""
        if now >= self.lease_until or self._held:
            self._held.append(event)
        else:
            self._emit.append(event)

    # --- time ------------------------------------------------------------------------------------------------------

    def _running(self, now: Instant) -> bool:
        return self.phase == RUNNING and now < self.lease_until

    def _tick(self, now: Instant) -> None:
        timeouts = self._timeouts
        while timeouts and timeouts[0][0] <= now:
            deadline, lock_id = heappop(timeouts)
            lock = self.space.find(lock_id)
            if lock is not None and lock.deadline == deadline:
                self._no_deadline(lock)
                if lock.pending in (REQUEST, CONVERT) and not lock.overlap:
                    self._timed_out(now, lock)
        self._lapsed = not self._running(now)
        if not self._lapsed:
            self.space.expire(now, EXPIRE_MAX)

    def _timed_out(self, now: Instant, lock: Lock) -> None:
        if lock.pending == REQUEST and not self._running(now) and (lock.sent or lock.status == WAITING):
            # Suspended, and a master may grant it yet: the client is told now, the lock goes when it can.
            self._tell(now, lock, ETIMEDOUT)
            self._abandon(now, lock)
        else:
            self._withdraw(now, lock, _TIMEOUT)

    def _no_deadline(self, lock: Lock) -> None:
        if lock.deadline != FOREVER:
            lock.deadline = FOREVER
            self._timed -= 1

    def _compact(self) -> None:
        """Keeps stale entries of the heap to a fraction."""
        if len(self._timeouts) > 2 * self._timed + 1024:
            alive = []
            for deadline, lock_id in self._timeouts:
                lock = self.space.find(lock_id)
                if lock is not None and lock.deadline == deadline:
                    alive.append((deadline, lock_id))
            heapify(alive)
            self._timeouts = alive

    def _lease(self, now: Instant, until: Instant) -> None:
        self.lease_until = until
        if now >= until:
            return
        self._lapsed = False
        if self._held:
            self._emit.extend(self._held)
            self._held.clear()
        if self.phase == RUNNING:
            self._catch_up(now)

    # --- rounds ----------------------------------------------------------------------------------------------------

    def _start(self, now: Instant, event: Start) -> None:
        if self.me not in event.round.member_ids or event.round.id <= self.recovery.round_id:
            self.space.counters.stale += 1
            return
        self.phase = RECOVERING
        self._frozen.clear()  # of an older round: everything unanswered is sent again
        effects: Effects = []
        self.recovery.start(now, event.round, effects)
        self._apply(now, effects)
        self._recovered()

    def _recovered(self) -> None:
        """Says RoundDone when the recovery has got there."""
        if self.phase == RECOVERING and self.recovery.stage == DONE and self._announced != self.recovery.round_id:
            self._announced = self.recovery.round_id
            self._emit.append(RoundDone(self.recovery.round_id))

    def _finish(self, now: Instant, round_id: int) -> None:
        if self.phase != RECOVERING or round_id != self.recovery.round_id or self.recovery.stage != DONE:
            self.space.counters.stale += 1
            return
        self.phase = RUNNING
        self._lapsed = False
        space = self.space
        effects: Effects = []
        for name, resource in sorted(space.resources.items()):
            if resource.master is not None:
                resource.confirmed = True
            if not resource.complete:
                continue
            resource.token = max(resource.token, space.base_token)
            if resource.converting or resource.waiting:
                for lock in (*resource.granted, *resource.converting):
                    lock.highbast = NL  # callbacks on their way were dropped with the old round
                if resource.recover_grant:
                    resource.break_cycles(effects)
                resource.grant_pending(effects)
                if resource.recover_grant:
                    resource.refuse_unqueued(effects)
            if not resource.processes and not resource.copies and name not in space.tossed:
                space.toss(now, resource)
        unanswered = dict.fromkeys(
            lock.id
            for _, locks in sorted(space.clients.items())
            for _, lock in sorted(locks.items())
            if lock.pending and lock.id not in self._deferred
        )
        self._apply(now, effects)
        unanswered.update(self._deferred)
        self._deferred = unanswered
        if self._running(now):
            self._catch_up(now)

    def _catch_up(self, now: Instant) -> None:
        """Running again: what waited goes out, then what came meanwhile comes in."""
        while self._deferred:
            lock_ids, self._deferred = self._deferred, {}
            for lock_id in lock_ids:
                lock = self.space.find(lock_id)
                if lock is not None and lock.pending:
                    self._dispatch(now, lock)
        frozen, self._frozen = self._frozen, []
        for peer, message in frozen:
            self._operation(now, peer, message)

    def _lose(self) -> None:
        self.phase = LOST
        self._held.clear()
        self._frozen.clear()
        self._deferred.clear()
        self._timeouts.clear()
        self._orphans.clear()
        for resource in self.space.resources.values():
            resource.granted.clear()
            resource.converting.clear()
            resource.waiting.clear()
        self.space.resources.clear()
        self.space.clients.clear()
        self.space.copies.clear()
        self.space.tossed.clear()
        self.space.directory.clear()
        self.space.send.clear()
        self.space.lock_count = 0
        self._timed = 0
        self._emit.append(SpaceLost())

    # --- messages --------------------------------------------------------------------------------------------------

    def _received(self, now: Instant, peer: MemberId, message: object) -> None:
        counters = self.space.counters
        counters.received += 1
        if peer not in self.space.members or peer == self.me:
            counters.hostile += 1
        elif isinstance(message, (Names, Claim, Masters, RecoverLocks, Reached)):
            if self.phase == RECOVERING:
                self._recovery_message(now, peer, message)
                self._recovered()
            else:
                counters.stale += 1
        elif self._running(now):
            self._operation(now, peer, message)
        elif self.phase != STOPPED and len(self._frozen) < FROZEN_MAX:
            self._frozen.append((peer, message))
        else:
            counters.stale += 1  # stopped: the next round asks again

    def _recovery_message(
        self, now: Instant, peer: MemberId, message: Names | Claim | Masters | RecoverLocks | Reached
    ) -> None:
        recovery = self.recovery
        if isinstance(message, Names):
            recovery.names(peer, message)
        elif isinstance(message, Claim):
            recovery.claim(peer, message)
        elif isinstance(message, Masters):
            recovery.masters(now, peer, message)
        elif isinstance(message, RecoverLocks):
            recovery.locks(now, peer, message)
        else:
            recovery.reached(now, peer, message)

    def _operation(self, now: Instant, peer: MemberId, message: object) -> None:
        effects: Effects = []
        if isinstance(message, Request):
            self._mastering.request(now, peer, message, effects)
        elif isinstance(message, Completed):
            self._completed(now, peer, message)
        elif isinstance(message, Convert):
            self._mastering.convert(now, peer, message, effects)
        elif isinstance(message, Unlock):
            self._mastering.unlock(now, peer, message, effects)
        elif isinstance(message, Blocking):
            self._blocking(now, peer, message)
        elif isinstance(message, Master):
            self._master(now, peer, message)
        elif isinstance(message, Cancel):
            self._mastering.cancel(now, peer, message, effects)
        elif isinstance(message, NotMaster):
            self._not_master(now, peer, message)
        elif isinstance(message, Remove):
            self.space.removed(peer, message.name, message.token)
        else:
            self.space.counters.hostile += 1
        if effects:
            self._apply(now, effects)

    def _mine(self, peer: MemberId, lock_id: int) -> Lock | None:
        """The local lock a master speaks about, if that master is the one we think."""
        lock = self.space.find(lock_id)
        if lock is not None and not lock.resource.complete and lock.resource.master == peer:
            return lock
        self.space.counters.stale += 1
        return None

    def _completed(self, now: Instant, peer: MemberId, message: Completed) -> None:
        lock = self._mine(peer, message.lock)
        if lock is None or not lock.pending or message.operation != lock.operation:
            return
        value = message.value
        if (
            not IV <= message.mode <= EX
            or message.status > 0
            or not 0 <= message.token < 1 << 63
            or (value is not None and len(value) != self.value_size)
            or (message.status == EUNLOCK) != (lock.pending == UNLOCK)
            or (message.status == 0 and message.mode == IV)
        ):
            self.space.counters.hostile += 1
            return
        lock.result_flags = message.flags
        if lock.pending != REQUEST or message.status == 0:
            if message.mode != IV:
                lock.granted = message.mode
            lock.token = message.token or lock.token
            lock.value_sequence = message.sequence
            lock.current = message.current
            if value is not None:
                lock.value = value
            elif lock.pending == UNLOCK and lock.offered is not None:
                lock.value = lock.offered
        if message.status == 0:
            lock.requested = IV
        self._finished_operation(now, lock, message.status)

    def _blocking(self, now: Instant, peer: MemberId, message: Blocking) -> None:
        lock = self._mine(peer, message.lock)
        if lock is None:
            return
        if NL < message.mode <= EX:
            self._blocked(now, lock, message.mode)
        else:
            self.space.counters.hostile += 1

    def _master(self, now: Instant, peer: MemberId, message: Master) -> None:
        space = self.space
        name = message.name
        if space.directory_of(name) != peer or message.master not in space.members:
            space.counters.hostile += 1
            return
        resource = space.resources.get(name)
        if resource is None or resource.looking is None:
            space.counters.hostile += 1
            return
        looking, resource.looking = resource.looking, None
        resource.master = message.master
        resource.confirmed = True
        taken = message.master == peer  # the directory is the master and has the request that asked
        if message.master == self.me:
            space.become_master(resource, message.floor)
        for at, lock in enumerate(looking):
            if not lock.pending:
                continue
            if at == 0 and taken and lock.pending == REQUEST:
                if lock.overlap:
                    space.send.append((peer, Cancel(lock.id, lock.operation)))
            else:
                self._dispatch(now, lock)  # `sent` stays: an earlier round's directory may have taken it
        if not resource.processes and not resource.copies:
            space.toss(now, resource)

    def _not_master(self, now: Instant, peer: MemberId, message: NotMaster) -> None:
        lock = self.space.find(message.lock)
        if lock is None or lock.operation != message.operation or lock.pending != REQUEST:
            self.space.counters.stale += 1
            return
        resource = lock.resource
        if resource.looking is not None and resource.looking[0] is lock:
            self.space.counters.hostile += 1  # the directory has this request
            return
        if resource.master == peer:
            resource.master = None
            resource.confirmed = False
        lock.sent = False
        self._dispatch(now, lock)


_NO_EFFECTS: Effects = []
_NO_LOCKS: dict[int, Lock] = {}
