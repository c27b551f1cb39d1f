"""The holder's side, lower half: one operation of one lock of this process, from its beginning to its completion.

begin -> (deferred until we run) -> dispatch -> perform here | ask the master | look the master up -> finished.
Which of the three, the resource's state decides each time anew; so after a NotMaster, a lookup's answer or a new round
the operation is simply dispatched again. `Lock.sent` remembers that a master may have seen it.

An operation ends early by a cancel, a timeout or a force unlock. What no master has seen is taken back at once; else
the master is asked to cancel, and the one answer says which came first. An unlock that must follow waits in
`Lock.then`.
"""

from heapq import heapify, heappop, heappush
from typing import Final

from corral.api.dlm import (
    CANCEL,
    ECANCEL,
    EUNLOCK,
    EX,
    IV,
    NL,
    NODLCKWT,
    VALBLK,
    VALNOTVALID,
    Completion,
)
from corral.base.ids import MemberId
from corral.base.time import FOREVER, Instant, Nanoseconds
from corral.dlm.events import (
    UNAWAITED,
    Blocked,
    Done,
)
from corral.dlm.extent import illegal
from corral.dlm.master import Mastering
from corral.dlm.modes import (
    EAGAIN,
    EDEADLK,
    ENOENT,
    ETIMEDOUT,
)
from corral.dlm.recovery import CONVERT, NO_OPERATION, REQUEST, UNLOCK
from corral.dlm.resource import CONVERTING, QUEUED, WAITING, Effects, Lock
from corral.dlm.space import Space
from corral.dlm.wire import (
    Blocking,
    Cancel,
    Completed,
    Convert,
    Master,
    NotMaster,
    Request,
    Unlock,
)

# Phases of an engine.
STOPPED: Final = 0
RECOVERING: Final = 1
RUNNING: Final = 2
LOST: Final = 3

# Lock.overlap: why a Cancel is under way.
CANCELLED: Final = 1
TIMED_OUT: Final = 2
FORCED: Final = 3  # an unlock follows: `Lock.then`

HANDLE_MAX: Final = 0xFFFFFFFF


class Operations:
    """State and ways of operations; `requests.Requests` begins them, `engine.LockspaceEngine` gives it life."""

    def __init__(
        self,
        me: MemberId,
        name: str,
        value_size: int,
        lease_until: Instant,
        toss_ns: Nanoseconds,
        warn_ns: Nanoseconds,
    ) -> None:
        self.me = me
        self.name = name
        self.value_size = value_size
        self.warn_ns = warn_ns  # 0: never
        self.phase = STOPPED
        self.lease_until = lease_until
        self.space = Space(me, value_size, toss_ns)
        self._zeros = bytes(value_size)
        self._mastering = Mastering(self.space)
        self._emit: list[object] = []
        self._held: list[object] = []  # decided while the lease had lapsed
        self._deferred: dict[int, None] = {}  # locks whose operation waits until we run, in order
        self._timeouts: list[tuple[Instant, int]] = []
        self._timed = 0  # locks with a deadline; the heap may hold stale entries beside
        self._watched: dict[int, Instant] = {}  # locks whose operation may wait too long, and from when on; in order
        self._orphans: dict[bytes, list[Lock]] = {}  # by name, longest orphaned first

    def _running(self, now: Instant) -> bool:
        return self.phase == RUNNING and now < self.lease_until

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
        if self.warn_ns and lock.pending == pending and pending != UNLOCK and not lock.flags & NODLCKWT:
            self._watched[lock.id] = now + self.warn_ns

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
        lock.asked = None
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
            lock.wanted,
        )

    def _ask(self, lock: Lock, master: MemberId) -> None:
        lock.sent = True
        lock.asked = master
        send = self.space.send
        if lock.pending == REQUEST:
            send.append((master, self._request(lock, False)))
        elif lock.pending == CONVERT:
            send.append(
                (master, Convert(lock.id, lock.operation, lock.requested, lock.flags, lock.offered, lock.wanted))
            )
        else:
            send.append((master, Unlock(lock.id, lock.operation, lock.flags, lock.offered)))
        if lock.overlap:
            send.append((master, Cancel(lock.id, lock.operation)))

    # --- what became of them -----------------------------------------------------------------------------------------

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
        if status == ECANCEL and lock.overlap == TIMED_OUT:
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
        if self._watched:
            self._watched.pop(lock.id, None)
        if ended:
            self._deferred.pop(lock.id, None)
            self.space.drop_lock(now, lock)
        elif then is not None:
            self._end(now, lock, then[0], then[1], then[2])
        elif lock.abandoned:
            self._orphan(lock)  # a persistent one: any other abandoned lock would end by now
        elif lock.blocked:
            mode, lock.blocked = lock.blocked, NL
            self._blocked(now, lock, mode)

    def _tell(self, now: Instant, lock: Lock, status: int) -> None:
        self._count(status)
        if not lock.abandoned and lock.cookie != UNAWAITED:
            client, handle = lock.address >> 32, lock.address & HANDLE_MAX
            done = Done(client, handle, lock.cookie, self._completion(lock, status))
            if status == ETIMEDOUT:
                self._emit.append(done)  # nobody holds anything by this, and whoever bounds its waiting means it
            else:
                self._give(now, done)

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
        if lock.pending == REQUEST or (lock.abandoned and lock.pending != UNLOCK):
            lock.blocked = max(lock.blocked, mode)  # told before the grant: said after it; of an orphan: to who adopts
        elif not lock.abandoned and lock.granted != IV:  # else it ended while others were told
            self.space.counters.blocked += 1
            self._give(now, Blocked(lock.address >> 32, lock.address & HANDLE_MAX, mode))

    def _give(self, now: Instant, event: object) -> None:
        """Emits, unless the lease has lapsed: then it waits for the next one (DLM-6)."""
        if now >= self.lease_until or self._held:
            self._held.append(event)
        else:
            self._emit.append(event)

    # --- the ways an operation ends early ----------------------------------------------------------------------------

    def _end(self, now: Instant, lock: Lock, flags: int, value: bytes | None, cookie: int) -> None:
        """Unlocks in whatever state the lock is. An operation that a master may have seen is cancelled first."""
        if lock.pending and lock.sent:
            lock.then = (flags, value, cookie)
            self._no_deadline(lock)
            self._withdraw(now, lock, FORCED)
            return
        lock.flags = flags
        lock.offered = value
        lock.operation += 1
        self._begin(now, lock, UNLOCK, cookie, 0)

    def _orphan(self, lock: Lock) -> None:
        """The lock of a dead client stays, until somebody adopts or purges it."""
        self.space.counters.orphaned += 1
        self._orphans.setdefault(lock.resource.name, []).append(lock)

    def _abandon(self, now: Instant, lock: Lock) -> None:
        """Nobody waits for this lock any more: unlock it, whatever becomes of its pending operation."""
        lock.abandoned = True
        if lock.pending != UNLOCK and lock.overlap != FORCED:
            self._end(now, lock, 0, None, 0)

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
        elif self._running(now) and lock.asked in self.space.members:
            self.space.send.append((lock.asked, Cancel(lock.id, lock.operation)))  # while looked up: with the answer

    def _undo(self, now: Instant, lock: Lock) -> None:
        """Takes back an operation that no master has seen."""
        if lock.resource.looking is not None and lock in lock.resource.looking:
            lock.resource.looking.remove(lock)
        self._finished_operation(now, lock, ECANCEL)

    def _timed_out(self, now: Instant, lock: Lock) -> None:
        if lock.pending == REQUEST and not self._running(now) and (lock.sent or lock.status == WAITING):
            # Suspended, and a master may grant it yet: the client is told now, the lock goes when it can.
            self._tell(now, lock, ETIMEDOUT)
            self._abandon(now, lock)
        else:
            self._withdraw(now, lock, TIMED_OUT)

    def _expire_timeouts(self, now: Instant) -> None:
        timeouts = self._timeouts
        while timeouts and timeouts[0][0] <= now:
            deadline, lock_id = heappop(timeouts)
            lock = self.space.find(lock_id)
            if lock is not None and lock.deadline == deadline:
                self._no_deadline(lock)
                if lock.pending in (REQUEST, CONVERT) and not lock.overlap:
                    self._timed_out(now, lock)

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

    # --- messages of masters and directories -------------------------------------------------------------------------

    def _mine(self, peer: MemberId, lock_id: int) -> Lock | None:
        """The local lock a master speaks about, if that master is the one we think."""
        lock = self.space.find(lock_id)
        if lock is not None and not lock.resource.complete and peer in (lock.resource.master, lock.asked):
            return lock  # (the one asked has become master meanwhile, though it told another lock that it was not)
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
            or not self.space.sane_token(message.token)
            or (value is not None and len(value) != self.value_size)
            or (message.status == EUNLOCK) != (lock.pending == UNLOCK)
            or (message.status == 0 and message.mode == IV)
            or illegal(message.range)
        ):
            self.space.counters.hostile += 1
            return
        if lock.resource.master is None and message.status != ENOENT:
            # It did not know yet when it sent another request of ours back. By the time we unlock we must know.
            lock.resource.master = peer
            lock.resource.confirmed = True
        lock.result_flags = message.flags
        if lock.pending != REQUEST or message.status == 0:
            if message.mode != IV:
                lock.granted = message.mode
                lock.extent = message.range
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
        if (
            space.directory_of(name) != peer
            or message.master not in space.members
            or not space.sane_token(message.floor)
        ):
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
                lock.asked = peer
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
