"""One round of recovery of a lockspace, in stages with a barrier after each (all members tell all).

start      drop members that are gone: purge their locks here; forget who masters what they mastered
NAMES      each tells each directory node which names of its new share it masters; barrier: the directory is whole
CLAIM      names with local locks and no master: ask the directory; the first to ask becomes master
LOCKS      send the locks on such names to their new masters; barrier: every new master has every lock
DONE       new masters settle unknown modes and the value, RoundDone; grants resume at Finish, when all are done

A round may be abandoned at any point for a newer one, and members may disagree on how far it came. So a new master's
state counts only when it is *complete* (it heard the LOCKS barrier); only then does it name the resource in the next
round. And a holder believes a new master only when the round has *finished* for it (`confirmed`); until then it asks
and sends again, which a complete master ignores. Purging compares with the members of the round, never with the round
before, so it does not matter which rounds were missed.

What an operation without answer at a lost master did is unknown. Unlocks are completed: the lock is gone either way.
Lowering conversions count as done, so nobody else's grant can conflict; the value they wrote may be lost, which the
value rule then reports. PR/CW conversions leave the granted mode open (`_settle_modes`). Other conversions keep the old
mode and queue again, without regard to order (`Resource.recover_grant`), the old order being lost.

Invariant: DLM-5 after a finished round every lock of every member is known to the one master of its resource.
Source: features 1.5 Recovery; Linux `fs/dlm/recover.c`. Deviations: mixed PR/CW conversions (each may or may not have
been granted) are settled to one mode for all, and to CR with ranges; abandoned rounds as above.
"""

from typing import Final, final

from corral.api.dlm import CONVDEADLK, CR, CW, DEMOTED, EUNLOCK, IV, IVVALBLK, NL, NOQUEUE, PR
from corral.base.ids import NAME_MAX, MemberId
from corral.base.time import Instant
from corral.base.view import Round
from corral.dlm.extent import Extent, common, illegal, overlap, within
from corral.dlm.master import LOCK_ID_MAX, Mastering, purge
from corral.dlm.modes import COMPATIBLE, FLAGS_ALL, VALUE_TRANSFER, WRITE, alternative, is_down, least
from corral.dlm.resource import NEW, NOT_TOSSED, QUEUED, Effects, Lock, Resource
from corral.dlm.space import TOKEN_SHIFT, Space
from corral.dlm.wire import CHUNK, Claim, Masters, Names, Reached, RecoverLock, RecoverLocks

# What `Lock.pending` says, on the holder's side.
NO_OPERATION: Final = 0
REQUEST: Final = 1
CONVERT: Final = 2
UNLOCK: Final = 3

IDLE: Final = 0
NAMES: Final = 1
CLAIM: Final = 2
LOCKS: Final = 3
DONE: Final = 4
STAGE_NAMES: Final = ("idle", "names", "claim", "locks", "done")


@final
class Recovery:
    """`done` rises when the local work for `round_id` is finished; the engine says RoundDone."""

    def __init__(self, space: Space, mastering: Mastering) -> None:
        self._space = space
        self._mastering = mastering
        self.round_id = 0
        self.stage = IDLE
        self._names_from: set[MemberId] = set()
        self._locks_from: set[MemberId] = set()
        self._masterless: dict[bytes, list[Lock]] = {}  # names to claim, with the local locks that are granted
        self._unanswered: set[bytes] = set()
        self._early: list[tuple[MemberId, Claim]] = []  # claims that came before our directory share was whole
        self._building: dict[bytes, Resource] = {}  # names this member newly masters
        self._joined: frozenset[MemberId] = frozenset()

    # --- start -----------------------------------------------------------------------------------------------------

    def start(self, now: Instant, round: Round, effects: Effects) -> None:
        """`effects` gets the completions that the loss of masters decides."""
        space = self._space
        self.round_id = round.id
        self.stage = NAMES
        self._joined = frozenset(round.joined)
        self._names_from.clear()
        self._locks_from.clear()
        self._masterless.clear()
        self._unanswered.clear()
        self._early.clear()
        self._building.clear()
        space.counters.rounds += 1
        space.members = tuple(sorted(round.member_ids))
        space.base_token = round.id << TOKEN_SHIFT
        space.floor = 0  # tokens of this round are above all earlier ones
        space.directory.clear()
        members = frozenset(space.members)
        for peer in sorted(space.copies.keys() - members):
            purge(space, now, peer)
        self._forget_masters(now, members)
        self._gather(effects)
        self._send_names()
        self._tell_all(NAMES)
        self.proceed(now)

    def _forget_masters(self, now: Instant, members: frozenset[MemberId]) -> None:
        space = self._space
        space.tossed.clear()
        for resource in space.resources.in_order():
            resource.tossed = NOT_TOSSED
            resource.looking = None
            if not resource.complete:
                if resource.master == space.me:
                    self._unbuild(now, resource)
                if not resource.confirmed or resource.master not in members:
                    resource.master = None
                    resource.confirmed = False
            if not resource.processes and not resource.copies:
                space.resources.remove(resource.name)
        space.tossed.clear()

    def _unbuild(self, now: Instant, resource: Resource) -> None:
        """An abandoned round made me the master and had not brought me every lock."""
        for lock in (*resource.granted, *resource.converting):
            if lock.holder is not None:
                resource.remove(lock)
                self._space.drop_copy(now, lock)
                continue
            lock.status = NEW
            if lock.granted == IV:  # what its holder last knew is the mode that is neither asked nor the alternative
                lock.granted = PR if CW in (lock.requested, alternative(lock.requested, lock.flags)) else CW
        resource.granted.clear()
        resource.converting.clear()
        resource.value = None
        resource.value_sequence = 0
        resource.value_valid = True

    def _gather(self, effects: Effects) -> None:
        """Local locks whose master is unknown: what is decided by that, and what must be claimed."""
        for lock in self._space.locks.in_order():
            resource = lock.resource
            if resource.master is not None:
                continue
            if lock.pending == UNLOCK and (lock.sent or lock.granted == IV):
                effects.append((lock, EUNLOCK))
                continue
            if lock.pending == CONVERT and lock.sent and _lowers(lock):
                _lower(lock)
            if lock.granted != IV:
                self._masterless.setdefault(resource.name, []).append(lock)

    # --- the directory ---------------------------------------------------------------------------------------------

    def _send_names(self) -> None:
        space = self._space
        shares: dict[MemberId, list[bytes]] = {}
        for resource in space.resources.in_order():
            node = space.directory_of(resource.name)
            if resource.complete and node != space.me:
                shares.setdefault(node, []).append(resource.name)
        for node, names in sorted(shares.items()):
            for at in range(0, len(names), CHUNK):
                space.send.append((node, Names(names[at : at + CHUNK])))

    def names(self, peer: MemberId, message: Names) -> None:
        space = self._space
        for name in message.names:
            if self.stage == NAMES and 0 < len(name) <= NAME_MAX and space.directory_of(name) == space.me:
                space.directory.setdefault(name, peer)
            else:
                space.counters.hostile += 1

    def claim(self, peer: MemberId, message: Claim) -> None:
        if self.stage == NAMES:
            self._early.append((peer, message))
        else:
            self._answer_claim(peer, message)

    def _answer_claim(self, peer: MemberId, message: Claim) -> None:
        space = self._space
        names = [n for n in message.names if 0 < len(n) <= NAME_MAX and space.directory_of(n) == space.me]
        space.counters.hostile += len(message.names) - len(names)
        space.send.append((peer, Masters(names, [space.assign(name, peer) for name in names])))

    # --- claims ----------------------------------------------------------------------------------------------------

    def _send_claims(self, now: Instant) -> None:
        space = self._space
        shares: dict[MemberId, list[bytes]] = {}
        own = []
        for name in sorted(self._masterless):
            node = space.directory_of(name)
            if node == space.me:
                own.append(name)
            else:
                shares.setdefault(node, []).append(name)
                self._unanswered.add(name)
        for name in own:
            self._mastered(name, space.assign(name, space.me))
        for node, names in sorted(shares.items()):
            for at in range(0, len(names), CHUNK):
                space.send.append((node, Claim(names[at : at + CHUNK])))
        for peer, message in self._early:
            self._answer_claim(peer, message)
        self._early.clear()

    def masters(self, now: Instant, peer: MemberId, message: Masters) -> None:
        space = self._space
        if len(message.names) != len(message.masters):
            space.counters.hostile += 1
            return
        for name, master in zip(message.names, message.masters, strict=True):
            if name in self._unanswered and space.directory_of(name) == peer and master in space.members:
                self._unanswered.discard(name)
                self._mastered(name, master)
            else:
                space.counters.hostile += 1
        self.proceed(now)

    def _mastered(self, name: bytes, master: MemberId) -> None:
        resource = self._masterless[name][0].resource
        self._space.counters.remastered += 1
        resource.master = master
        resource.confirmed = False
        if master == self._space.me:
            self._building[name] = resource

    # --- locks -----------------------------------------------------------------------------------------------------

    def _send_locks(self) -> None:
        space = self._space
        shares: dict[MemberId, list[RecoverLock]] = {}
        for _, locks in sorted(self._masterless.items()):
            resource = locks[0].resource
            assert resource.master is not None, "DLM-5"
            for lock in locks:
                record = _record(lock)
                if resource.master == space.me:
                    self._take_own(lock, record)
                else:
                    shares.setdefault(resource.master, []).append(record)
        for master, records in sorted(shares.items()):
            for at in range(0, len(records), CHUNK):
                space.send.append((master, RecoverLocks(records[at : at + CHUNK])))

    def _take_own(self, lock: Lock, record: RecoverLock) -> None:
        lock.granted = record.granted
        lock.extent = record.range
        lock.result_flags |= _demoted(record)
        asked = lock.requested
        if record.requested == IV:
            lock.requested = IV
        lock.resource.install(lock)
        if record.requested == IV and lock.pending == CONVERT:
            lock.requested = asked  # asked for again after Finish

    def locks(self, now: Instant, peer: MemberId, message: RecoverLocks) -> None:
        space = self._space
        for record in message.locks:
            if self.stage not in (NAMES, CLAIM, LOCKS) or not self._sane(record):
                space.counters.hostile += 1
                continue
            resource = space.resource(record.name)
            copies = space.copies.get(peer)
            if copies is not None and record.lock in copies:
                continue  # a round that was abandoned after we were complete
            if resource.complete:
                if not _compatible_with_all(resource, record.granted, record.range):
                    space.counters.conflicts += 1
            elif resource.master != space.me:
                # The directory told the sender before it told us.
                resource.master = space.me
                resource.confirmed = False
                self._building[record.name] = resource
            self._install(resource, peer, record)

    def _install(self, resource: Resource, peer: MemberId, record: RecoverLock) -> None:
        copy = Lock(record.lock, resource, peer, record.owner)
        copy.granted = record.granted
        copy.requested = record.requested
        copy.extent = record.range
        copy.wanted = record.requested_range
        copy.flags = record.flags
        copy.operation = record.operation
        copy.answer = 0 if record.requested == IV else QUEUED
        copy.result_flags = _demoted(record)
        copy.token = record.token
        copy.value = record.value
        copy.value_sequence = record.sequence
        copy.current = record.current
        self._mastering.adopt(copy)
        resource.install(copy)
        self._space.counters.recovered += 1

    def _sane(self, record: RecoverLock) -> bool:
        return (
            0 < len(record.name) <= NAME_MAX
            and 0 <= record.lock <= LOCK_ID_MAX
            and IV <= record.granted <= 5
            and IV <= record.requested <= 5
            and (record.granted != IV or record.requested != IV)
            and not (illegal(record.range) or illegal(record.requested_range))
            and not record.flags & ~FLAGS_ALL
            and 0 <= record.operation <= LOCK_ID_MAX
            and self._space.sane_token(record.token)
            and (record.value is None or len(record.value) == self._space.value_size)
        )

    # --- barriers --------------------------------------------------------------------------------------------------

    def _tell_all(self, stage: int) -> None:
        for member in self._space.members:
            if member != self._space.me:
                self._space.send.append((member, Reached(stage, self._space.value_size)))

    def misfit(self, peer: MemberId, message: Reached) -> bool:
        """Value blocks differ in length, and `peer` was in the lockspace before us (at the same time: is the lower)."""
        ours = (self._space.me in self._joined, self._space.me)
        return self._differs(message) and (peer in self._joined, peer) < ours

    def _differs(self, message: Reached) -> bool:
        return message.value_size not in (0, self._space.value_size)

    def reached(self, now: Instant, peer: MemberId, message: Reached) -> None:
        if self._differs(message):
            return  # it leaves, and a new round begins
        if message.stage == NAMES:
            self._names_from.add(peer)
        elif message.stage == LOCKS:
            self._locks_from.add(peer)
        else:
            self._space.counters.hostile += 1
        self.proceed(now)

    def proceed(self, now: Instant) -> None:
        """On to the next stage, if all that it needs is here."""
        others = len(self._space.members) - 1
        if self.stage == NAMES and len(self._names_from) == others:
            self.stage = CLAIM
            self._send_claims(now)
        if self.stage == CLAIM and not self._unanswered:
            self.stage = LOCKS
            self._send_locks()
            self._tell_all(LOCKS)
        if self.stage == LOCKS and len(self._locks_from) == others:
            self.stage = DONE
            for _, resource in sorted(self._building.items()):
                self._complete(resource)
            self._masterless.clear()
            self._building.clear()

    def _complete(self, resource: Resource) -> None:
        _settle_modes(resource)
        _recover_value(resource, self._space)
        resource.recover_grant = True
        floor = max((lock.token for lock in (*resource.granted, *resource.converting)), default=0)
        self._space.become_master(resource, floor)
        holders = (*resource.granted, *resource.converting)
        for at, lock in enumerate(holders):
            for other in holders[:at]:
                if not COMPATIBLE[lock.granted][other.granted] and overlap(lock.extent, other.extent):
                    self._space.counters.conflicts += 1


def _record(lock: Lock) -> RecoverLock:
    """What the new master must know of a granted lock, with the conversion it waits for if that may be queued."""
    granted = lock.granted
    extent = lock.extent
    requested = IV
    operation = lock.operation
    if lock.pending == CONVERT and lock.sent:
        granted = least(granted, lock.requested, lock.flags)
        if granted == IV and (extent is not None or lock.wanted is not None):
            granted = CR  # in both; which of them others are in depends on where, so it cannot be settled for all
        if overlap(extent, lock.wanted):
            extent = common(extent, lock.wanted)
        else:
            granted = NL
        if granted == IV or (not lock.flags & NOQUEUE and not _lowers(lock)):
            requested = lock.requested
    if lock.pending and requested == IV:
        operation -= 1  # asked again after Finish; the master must not take it for answered
    return RecoverLock(
        lock.resource.name,
        lock.id,
        lock.owner,
        granted,
        requested,
        lock.flags,
        operation,
        lock.token,
        lock.value,
        lock.value_sequence,
        lock.current and not (lock.pending == CONVERT and lock.flags & IVVALBLK),
        extent,
        lock.wanted if requested != IV else None,
    )


def _demoted(record: RecoverLock) -> int:
    """Whoever asked for a conversion with CONVDEADLK counts on NL only, whether the lost master demoted it or not."""
    return DEMOTED if record.requested != IV and record.flags & CONVDEADLK else 0


def _lowers(lock: Lock) -> bool:
    """Its conversion is one that a master always grants at once: to no more than it has."""
    return is_down(lock.granted, lock.requested) and within(lock.wanted, lock.extent)


def _lower(lock: Lock) -> None:
    """A lowering conversion that a lost master may or may not have done counts as done, its value as written."""
    if lock.offered is not None and VALUE_TRANSFER[lock.granted + 1][lock.requested] == WRITE:
        lock.value = lock.offered
    lock.granted = lock.requested
    lock.extent = lock.wanted


def _compatible_with_all(resource: Resource, mode: int, extent: Extent) -> bool:
    if mode == IV:
        return True
    compatible = COMPATIBLE[mode]
    return all(
        compatible[lock.granted] or not overlap(extent, lock.extent)
        for lock in (*resource.granted, *resource.converting)
        if lock.granted != IV
    )


def _settle_modes(resource: Resource) -> None:
    """PR/CW conversions whose outcome is unknown: some mode that all may have held together.

    If anybody is known to hold PR or CW it is that one. Else each held the one or the other, and all in the same is
    possible whatever was granted last.
    """
    unknown = [lock for lock in resource.converting if lock.granted == IV]
    if not unknown:
        return
    known = [lock.granted for lock in (*resource.granted, *resource.converting) if lock.granted in (PR, CW)]
    asked = unknown[0].requested
    mode = known[0] if known else asked if asked in (PR, CW) else CW
    for lock in unknown:
        lock.granted = mode


def _recover_value(resource: Resource, space: Space) -> None:
    """A holder of more than CR kept writers out: its block is the value. Else the newest block, not to be trusted.
    (With ranges others could write elsewhere.)"""
    newest: Lock | None = None
    for lock in (*resource.granted, *resource.converting):
        if lock.value is None:
            continue
        if lock.granted > CR and lock.current and not resource.ranged:
            resource.value = lock.value
            resource.value_sequence = lock.value_sequence
            resource.value_valid = True
            return
        if newest is None or lock.value_sequence > newest.value_sequence:
            newest = lock
    if newest is None:
        return
    resource.value = newest.value
    resource.value_sequence = newest.value_sequence
    resource.value_valid = False
    space.counters.invalidated += 1
