"""One resource on its master: who holds it, who waits, what its value is.

Three queues. *granted*: holders. *converting*: holders that asked for another mode; they keep the old one meanwhile.
*waiting*: newcomers. A conversion goes before a newcomer, each queue is first come first served, and the ten grant
rules (`_fits`) say who may overtake. A conversion that would close a cycle of conversions fails, demotes itself or
tells itself to give way (`_closes_cycle`). A holder in the way gets a blocking callback, once per rising mode.

Every operation returns what became of *its* lock (0, a negative status, or QUEUED) and appends what became of others
to `effects`: pairs (lock, code), code <= 0 a completion status, code > 0 a blocking callback carrying that mode.

Ranges: a lock may be about some bytes of the resource only (`extent.py`). Two locks are in each other's way only where
they overlap, and the order of the queues is kept only among those that do; so a circle of conversions may be longer
than two. `ranged` says that there are such locks here: without them nothing below looks at extents.

Tokens: each grant takes the resource's next one, so tokens order the grants of a resource (DLM-2). The caller keeps
`token` at or above round << 32 and above the directory's floor.

Invariants: DLM-1 granted modes (those of converting locks included) are pairwise compatible. DLM-2 tokens strictly
increase per resource. DLM-3 a lock is on exactly the queue that its status names. DLM-4 value_sequence never falls
while the resource has a lock.
Source: features 1.5; OpenVMS lock manager; Linux `fs/dlm/lock.c`, against whose traces this is tested. Ranges: cman
`dlm-kernel/src/locking.c`, where the queues knew no ranges (users said NOORDER). Deviations: a
lock granted in the mode it already had leaves the convert queue (Linux leaves it there); a value block with no caller's
buffer is zeros instead of an error.
"""

from typing import Final, TypeAlias, final

from corral.api.dlm import (
    ALTCW,
    ALTMODE,
    ALTPR,
    CONVDEADLK,
    CW,
    DEMOTED,
    ECANCEL,
    EUNLOCK,
    EX,
    EXPEDITE,
    HEADQUE,
    IV,
    IVVALBLK,
    NL,
    NODLCKWT,
    NOORDER,
    NOQUEUE,
    NOQUEUEBAST,
    PR,
    PW,
    QUECVT,
    VALBLK,
    VALNOTVALID,
)
from corral.base.ids import MemberId
from corral.base.time import FOREVER, Instant
from corral.dlm.extent import Extent, overlap
from corral.dlm.modes import COMPATIBLE, EAGAIN, EDEADLK, READ, VALUE_TRANSFER, WRITE, alternative

QUEUED: Final = 1  # the operation waits; its completion comes as an effect of another one

# Status of a lock: the queue it is on.
NEW: Final = 0
GRANTED: Final = 1
CONVERTING: Final = 2
WAITING: Final = 3

_YES: Final = 1
_NO: Final = 0
_CYCLE: Final = -1


@final
class Lock:
    """A lock. Where its resource is mastered it sits on a queue; elsewhere it is the holder's copy of one.

    `holder` is None for a lock of this process, else the member whose copy (numbered `id` there) this one masters.
    `address` says which client's lock it is, and under which handle: client << 32 | handle. That is the lock's id as
    well, until another client adopts it: the id, by which masters know it, stays.
    `operation` numbers the operations on this lock; with `pending` and `overlap` it belongs to the engine.
    """

    __slots__ = (
        "abandoned",
        "address",
        "answer",
        "asked",
        "blocked",
        "cookie",
        "current",
        "deadline",
        "extent",
        "flags",
        "granted",
        "highbast",
        "holder",
        "id",
        "offered",
        "operation",
        "overlap",
        "owner",
        "pending",
        "requested",
        "resource",
        "result_flags",
        "sent",
        "status",
        "then",
        "token",
        "value",
        "value_sequence",
        "wanted",
    )

    def __init__(self, id: int, resource: "Resource", holder: MemberId | None, owner: int) -> None:
        self.id = id
        self.address = id
        self.resource = resource
        self.holder = holder
        self.owner = owner
        self.status = NEW
        self.granted = IV
        self.requested = IV
        self.extent: Extent = None  # of the granted mode
        self.wanted: Extent = None  # of the requested one
        self.flags = 0
        self.result_flags = 0
        self.highbast = NL
        self.value: bytes | None = None  # the lock's own block; None until an operation used one
        self.value_sequence = 0
        self.current = False  # value is the resource's as of a grant since which nobody else could write
        self.token = 0
        self.operation = 0
        self.answer = 0  # what became of `operation`; QUEUED while nothing has
        # The engine's, on the holder's side only:
        self.pending = 0
        self.overlap = 0
        self.offered: bytes | None = None  # the value that came with the pending operation
        self.sent = False  # the pending operation went to a master, so its outcome may be ahead of what we know
        self.asked: MemberId | None = None  # the master that was asked last
        self.then: tuple[int, bytes | None, int] | None = None  # flags, value, cookie of the unlock that follows
        self.abandoned = False
        self.blocked = NL
        self.cookie = 0
        self.deadline: Instant = FOREVER


Effects: TypeAlias = list[tuple[Lock, int]]

# An empty queue, one for all: most resources never have anybody waiting, and three lists each would be a fifth of what
# a lock takes. So a lock joins an empty queue by `joined`, which makes a new one.
NOBODY: Final[list[Lock]] = []

# Resource.tossed: whether it is in the row of those that will be forgotten (`space.py`).
NOT_TOSSED: Final = 0
TOSSED: Final = 1
USED_SINCE: Final = 2


def joined(queue: list[Lock], lock: Lock) -> list[Lock]:
    """The queue with `lock` at its end."""
    if not queue:
        return [lock]
    queue.append(lock)
    return queue


@final
class Resource:
    """The queues and the value of one name. `master` is whose duty it is; None while that is being looked up."""

    __slots__ = (
        "complete",
        "confirmed",
        "converting",
        "copies",
        "granted",
        "looking",
        "master",
        "name",
        "processes",
        "ranged",
        "recover_grant",
        "token",
        "tossed",
        "value",
        "value_sequence",
        "value_valid",
        "waiting",
    )

    def __init__(self, name: bytes, master: MemberId | None) -> None:
        self.name = name
        self.master = master
        self.granted = NOBODY
        self.converting = NOBODY
        self.waiting = NOBODY
        self.value: bytes | None = None
        self.value_sequence = 0
        self.value_valid = True
        self.token = 0
        self.recover_grant = False
        self.ranged = False  # a lock here has a range, or had since the resource was last unused
        # The engine's:
        self.complete = False  # I am the master and every holder's locks are here
        self.confirmed = False  # `master` was agreed on outside recovery, or the round that chose it has finished
        self.processes = 0  # locks of this process
        self.copies = 0  # locks mastered here for other members
        self.looking: list[Lock] | None = None  # operations that wait for the lookup in flight
        self.tossed = NOT_TOSSED

    # --- operations ------------------------------------------------------------------------------------------------

    def request(self, lock: Lock, effects: Effects) -> int:
        """A new lock with `requested` and `flags` set: granted, queued or refused."""
        if lock.wanted is not None:
            self.ranged = True
        if self._try(lock, True) == _YES:
            self.grant(lock)
            return 0
        if lock.flags & NOQUEUE:
            if lock.flags & NOQUEUEBAST:
                self._call_blockers(self.granted, lock, effects)
                self._call_blockers(self.converting, lock, effects)
            return EAGAIN
        self._enqueue(lock, WAITING)
        self._call_blockers(self.granted, lock, effects)
        return QUEUED

    def convert(self, lock: Lock, effects: Effects) -> int:
        """A granted lock with `requested` and `flags` set."""
        assert lock.status == GRANTED, "DLM-3"
        if lock.wanted is not None:
            self.ranged = True
        verdict = self._try(lock, True)
        if verdict == _NO and lock.result_flags & DEMOTED:
            # Demoting myself may have made others grantable: they were here first.
            self._grant_converting(effects)
            verdict = _YES if self._fits(lock, True, False) else _NO
        if verdict == _YES:
            self.grant(lock)
            if self.converting or self.waiting:
                self.grant_pending(effects)
            return 0
        if verdict == _CYCLE and not lock.flags & NODLCKWT:
            lock.requested = IV
            return EDEADLK
        if lock.flags & NOQUEUE:
            if lock.flags & NOQUEUEBAST:
                self._call_blockers(self.granted, lock, effects)
                self._call_blockers(self.converting, lock, effects)
            lock.requested = IV
            return EAGAIN
        self.granted.remove(lock)
        self._enqueue(lock, CONVERTING)
        self._call_blockers(self.granted, lock, effects)
        return QUEUED

    def unlock(self, lock: Lock, flags: int, effects: Effects) -> int:
        """Ends a lock in whatever state it is. `lock.value` is what VALBLK writes."""
        lock.result_flags = 0
        if flags and lock.granted >= PW:
            self._value_from_unlock(lock, flags)
        self.remove(lock)
        if self.converting or self.waiting:
            self.grant_pending(effects)
        return EUNLOCK

    def cancel(self, lock: Lock, effects: Effects) -> int:
        """Takes a waiting request out, or leaves a conversion at its granted mode: ECANCEL. 0: nothing to cancel."""
        lock.result_flags = 0
        if lock.status == CONVERTING:
            self._back_to_granted(lock)
        elif lock.status == WAITING:
            self.waiting.remove(lock)
            lock.status = NEW
            lock.requested = IV
        else:
            return 0
        if self.converting or self.waiting:
            self.grant_pending(effects)
        return ECANCEL

    def remove(self, lock: Lock) -> None:
        """Off its queue, without granting anybody anything."""
        if lock.status == GRANTED:
            self.granted.remove(lock)
        elif lock.status == CONVERTING:
            self.converting.remove(lock)
        elif lock.status == WAITING:
            self.waiting.remove(lock)
        lock.status = NEW
        lock.granted = IV
        lock.requested = IV
        if not (self.granted or self.converting or self.waiting):
            self.value = None  # a value lives as long as somebody has a lock, NL is enough
            self.value_sequence = 0
            self.ranged = False

    def install(self, lock: Lock) -> None:
        """Recovery: takes over a lock with the mode its holder knows; `requested` other than IV: it is converting."""
        if lock.extent is not None or lock.wanted is not None:
            self.ranged = True
        if lock.requested == IV:
            lock.status = GRANTED
            self.granted = joined(self.granted, lock)
        else:
            self._enqueue(lock, CONVERTING)

    def break_cycles(self, effects: Effects) -> None:
        """Recovery: conversions that wait for each other's granted mode, in whatever order, will wait for ever.

        (Some may not have been queued yet, so nobody has looked.) The last of a cycle fails or is demoted.
        """
        while True:
            left = list(self.converting)
            while True:
                free = [lock for lock in left if not any(_in_the_way(other, lock) for other in left)]
                if not free:
                    break
                left = [lock for lock in left if lock not in free]
            victims = [
                lock for lock in left if not lock.flags & NODLCKWT and any(_in_the_way(lock, other) for other in left)
            ]
            if not victims:
                return
            victim = victims[-1]
            if victim.flags & CONVDEADLK:
                victim.granted = NL
                victim.result_flags |= DEMOTED
            else:
                self._back_to_granted(victim)
                effects.append((victim, EDEADLK))

    def refuse_unqueued(self, effects: Effects) -> None:
        """Recovery: a NOQUEUE conversion is only here because its granted mode was unknown; it must not wait."""
        for lock in tuple(self.converting):
            if lock.flags & NOQUEUE:
                self._back_to_granted(lock)
                effects.append((lock, EAGAIN))

    def _back_to_granted(self, lock: Lock) -> None:
        self.converting.remove(lock)
        self.granted = joined(self.granted, lock)
        lock.status = GRANTED
        lock.requested = IV

    @property
    def idle(self) -> bool:
        """Nobody has or wants a lock here."""
        return not (self.granted or self.converting or self.waiting)

    @property
    def unused(self) -> bool:
        """No member has a lock of it here, nor does anybody wait for its lookup."""
        return not self.processes and not self.copies and self.looking is None

    def grant_now(self, lock: Lock) -> bool:
        """A request that is granted at once, or nothing has happened: what the fast path asks."""
        if (self.granted or self.converting or self.waiting) and not self._fits(lock, True, False):
            return False
        self.grant(lock)
        return True

    # --- grant pass ------------------------------------------------------------------------------------------------

    def grant_pending(self, effects: Effects) -> None:
        """Conversions, then newcomers, then a callback to each holder in the way of those that still wait."""
        self._grant_converting(effects)
        for lock in tuple(self.waiting):
            if self._try(lock, False) == _YES:
                self.grant(lock)
                effects.append((lock, 0))
        if not self.converting:
            self.recover_grant = False
        high = IV
        concurrent_write = False
        for queue in (self.converting, self.waiting):
            for lock in queue:
                if queue is self.converting and self._closes_cycle(lock):
                    continue  # cannot be granted whoever gives way
                high = max(high, lock.requested)
                concurrent_write = concurrent_write or lock.requested == CW
        if high == IV:
            return
        if self.ranged:
            self._call_overlapping(effects)
            return
        for holder in self.granted:
            if not _must_be_told(holder, high, concurrent_write):
                continue
            told = CW if concurrent_write and high == PR and holder.granted == PR else high
            effects.append((holder, told))
            holder.highbast = high

    def _call_overlapping(self, effects: Effects) -> None:
        """As the end of `grant_pending`, each holder hearing only of those that want some of what it has."""
        stuck = [lock for lock in self.converting if self._closes_cycle(lock)]
        asking = [lock for lock in (*self.converting, *self.waiting) if lock not in stuck]
        for holder in self.granted:
            modes = [lock.requested for lock in asking if overlap(lock.wanted, holder.extent)]
            if not modes:
                continue
            high = max(modes)
            if _must_be_told(holder, high, CW in modes):
                told = CW if CW in modes and high == PR and holder.granted == PR else high
                effects.append((holder, told))
                holder.highbast = high

    def _grant_converting(self, effects: Effects) -> None:
        """Tries every conversion, from the front again after each round that granted or demoted one."""
        again = True
        demotions = 1  # one restart for demotions, as Linux: a second could only repeat it
        while again:
            again = False
            for lock in tuple(self.converting):
                demoted = lock.result_flags & DEMOTED
                verdict = self._try(lock, False)
                if verdict == _YES:
                    self.grant(lock)
                    effects.append((lock, 0))
                    again = True
                elif not demoted and lock.result_flags & DEMOTED:
                    if demotions:
                        demotions -= 1
                        again = True
                elif verdict == _CYCLE and lock.flags & NODLCKWT and lock.highbast < lock.requested:
                    lock.highbast = lock.requested
                    if not COMPATIBLE[lock.requested][lock.granted]:
                        effects.append((lock, lock.requested))

    def _try(self, lock: Lock, now: bool) -> int:
        """May `lock` be granted? May demote it (CONVDEADLK) or change what it asks for (ALTPR, ALTCW)."""
        if self._fits(lock, now, self.recover_grant and not now):
            return _YES
        flags = lock.flags
        if lock.granted != IV and not flags & NOQUEUE and self._closes_cycle(lock):
            if not flags & CONVDEADLK:
                return _CYCLE
            lock.granted = NL
            lock.result_flags |= DEMOTED
            return _NO
        if not flags & (ALTPR | ALTCW):
            return _NO
        asked = lock.requested
        other = alternative(asked, flags)
        if other == IV:
            return _NO
        lock.requested = other
        if self._fits(lock, now, False):
            lock.result_flags |= ALTMODE
            return _YES
        lock.requested = asked
        return _NO

    def _fits(self, lock: Lock, now: bool, unordered: bool) -> bool:
        """The ten grant rules. `now`: asked at the moment of the request; else from a queue."""
        flags = lock.flags
        if flags & EXPEDITE:
            return True
        compatible = COMPATIBLE[lock.requested]
        for other in self.granted:
            if (
                not compatible[other.granted]
                and other is not lock
                and not (self.ranged and not overlap(lock.wanted, other.extent))
            ):
                return False
        converting = self.converting
        for other in converting:
            if (
                not compatible[other.granted]
                and other is not lock
                and not (self.ranged and not overlap(lock.wanted, other.extent))
            ):
                return False
        if lock.granted != IV:
            if unordered:
                return True
            if now:
                return not (flags & QUECVT and converting) or not self._is_behind(lock, converting)
            return bool(flags & NOORDER) or converting[0] is lock or not self._is_behind(lock, converting)
        if flags & NOORDER:
            return True
        if converting and self._is_behind(lock, converting):
            return False
        waiting = self.waiting
        if now:
            return not waiting or not self._is_behind(lock, waiting)
        return waiting[0] is lock or not self._is_behind(lock, waiting)

    def _is_behind(self, lock: Lock, queue: list[Lock]) -> bool:
        """Somebody who came before wants some of the same. (It is asked when there is somebody before.)"""
        if not self.ranged:
            return True
        for other in queue:
            if other is lock:
                return False
            if overlap(other.wanted, lock.wanted):
                return True
        return False

    def _closes_cycle(self, lock: Lock) -> bool:
        """Conversion deadlock: somebody ahead of `lock` waits for what it holds, or somebody behind and it do mutually.

        A lock that is not queued yet would stand behind everybody.
        """
        if self.ranged:
            return self._closes_circle(lock)
        ahead = True
        mine = COMPATIBLE[lock.granted]
        for other in self.converting:
            if other is lock:
                ahead = False
            elif not mine[other.requested] and (ahead or not COMPATIBLE[other.granted][lock.requested]):
                return True
        return False

    def _closes_circle(self, lock: Lock) -> bool:
        """With ranges: `lock` would wait for somebody who, directly or through others, waits for it."""
        queue = self.converting if lock.status == CONVERTING else [*self.converting, lock]
        seen = [lock]
        ahead = [lock]
        while ahead:
            asking = ahead.pop()
            before = True  # `other` is before `asking`
            for other in queue:
                if other is asking:
                    before = False
                elif _in_the_way(other, asking) or (before and overlap(other.wanted, asking.wanted)):
                    if other is lock:
                        return True
                    if other not in seen:
                        seen.append(other)
                        ahead.append(other)
        return False

    # --- leaves ----------------------------------------------------------------------------------------------------

    def grant(self, lock: Lock) -> None:
        """What `lock` asks for, which the caller knows to fit."""
        if (lock.flags & (VALBLK | IVVALBLK)) or not self.value_valid or lock.current:
            self._value_with_grant(lock)
        status = lock.status
        if status != GRANTED:
            if status == CONVERTING:
                self.converting.remove(lock)
            elif status == WAITING:
                self.waiting.remove(lock)
            lock.status = GRANTED
            if self.granted:
                self.granted.append(lock)
            else:
                self.granted = [lock]
        lock.granted = lock.requested
        lock.requested = IV
        if self.ranged:
            if lock.extent is not None and lock.value_sequence != self.value_sequence:
                lock.current = False  # elsewhere others could write meanwhile
            lock.extent = lock.wanted
        lock.highbast = NL
        token = self.token + 1
        self.token = token
        lock.token = token

    def _enqueue(self, lock: Lock, status: int) -> None:
        """Onto the queue of conversions or of newcomers, as `status` says."""
        lock.status = status
        queue = self.converting if status == CONVERTING else self.waiting
        if queue and lock.flags & HEADQUE:
            queue.insert(0, lock)
        else:
            queue = joined(queue, lock)
        if status == CONVERTING:
            self.converting = queue
        else:
            self.waiting = queue

    def _call_blockers(self, queue: list[Lock], asking: Lock, effects: Effects) -> None:
        mode = asking.requested
        compatible = COMPATIBLE[mode]
        for holder in queue:
            if holder is asking or compatible[holder.granted] or not overlap(asking.wanted, holder.extent):
                continue
            # PR and CW are in each other's way though neither is higher: only an EX callback makes it superfluous.
            inverse = (holder.granted == PR and mode == CW) or (holder.granted == CW and mode == PR)
            if holder.highbast < (EX if inverse else mode):
                effects.append((holder, mode))
                holder.highbast = mode

    def _value_with_grant(self, lock: Lock) -> None:
        flags = lock.flags
        transfer = VALUE_TRANSFER[lock.granted + 1][lock.requested]
        if transfer == READ:
            if not flags & VALBLK:
                # Whoever held more than CR meanwhile kept writers out; from NL or CR the block may be behind.
                lock.current = lock.current and lock.granted > 1
                return
            lock.current = self.value_valid
            lock.value_sequence = self.value_sequence
            if self.value is None:
                return
            lock.value = self.value
        elif transfer == WRITE:
            if flags & IVVALBLK:
                self.value_valid = False
                lock.current = False
                return
            if not flags & VALBLK:
                return
            self._write(lock)
        if not self.value_valid:
            lock.result_flags |= VALNOTVALID

    def _value_from_unlock(self, lock: Lock, flags: int) -> None:
        if flags & IVVALBLK:
            self.value_valid = False
        elif flags & VALBLK:
            self._write(lock)

    def _write(self, lock: Lock) -> None:
        self.value = lock.value
        self.value_sequence += 1
        lock.value_sequence = self.value_sequence
        lock.current = True
        self.value_valid = True


def _must_be_told(holder: Lock, high: int, concurrent_write: bool) -> bool:
    """Is `holder` in the way of the highest mode still waited for, and does it not know yet?"""
    if holder.granted == PR and concurrent_write:
        return holder.highbast < EX
    return holder.highbast < high and not COMPATIBLE[high][holder.granted]


def _in_the_way(holder: Lock, asking: Lock) -> bool:
    return (
        holder is not asking
        and not COMPATIBLE[asking.requested][holder.granted]
        and overlap(asking.wanted, holder.extent)
    )
