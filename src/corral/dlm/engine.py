"""A lockspace on one member: the lock manager's door.

Every participant of a lockspace runs one of these; all are equal. A request goes to the member that masters its
resource, found through the directory (a pure function of the name and the members); a resource nobody uses yet is
mastered by the first to ask. Locally mastered resources cost no message, and `complete_now` no event either.

Life: *stopped* at first and after Stop; *recovering* from Start (`recovery.py`); *running* from Finish. While not
running, or while the lease has lapsed, held locks stay held; new requests and unlocks wait here, bounded by their
timeouts. Each lock has at most one operation under way (`pending`), kept until its answer; in each new round every
unanswered one is sent again under the same number.

Invariants: DLM-1 and DLM-2 (`resource.py`), DLM-5 (`recovery.py`); DLM-6 while now >= lease_until no grant, completion
(but that of a timeout) or blocking callback leaves, local or remote; DLM-7 every request has exactly one completion,
unless its client is gone.
Files: `requests.py`, `queries.py`, `orphans.py` and `operations.py` the holder's side, which this class completes;
`resource.py` the rules, `space.py` and `tables.py` what there is, `master.py` what peers ask, `recovery.py` rounds,
`wire.py` the messages, `events.py` what goes in and out.
Source: features 1.5; Linux `fs/dlm`. Deviations: a force unlock is one operation that overtakes the pending one; one
message type answers all operations; timeouts are the holder's business, a remote one is a Cancel.
"""

from typing import Final, TypeAlias, final

from corral.api.dlm import (
    NL,
    VALUE_SIZE,
)
from corral.base.engine import Ready, Received, Tick
from corral.base.ids import MemberId
from corral.base.time import FOREVER, Instant, Nanoseconds
from corral.dlm.events import (
    ClientGone,
    Finish,
    Lease,
    Lost,
    Misfit,
    RoundDone,
    SpaceLost,
    Start,
    Stop,
    Submit,
)
from corral.dlm.operations import LOST, RECOVERING, RUNNING, STOPPED
from corral.dlm.recovery import DONE, STAGE_NAMES, Recovery
from corral.dlm.requests import Requests
from corral.dlm.resource import NOBODY, Effects
from corral.dlm.space import FROZEN_MAX, TOSS_NS, Counters
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
    Purge,
    Purged,
    Queried,
    Query,
    Reached,
    RecoverLocks,
    Remove,
    Request,
    Unlock,
)

Event: TypeAlias = Start | Stop | Finish | Submit | ClientGone | Lease | Lost | Tick | Received[object]

PHASE_NAMES: Final = ("stopped", "recovering", "running", "lost")
VALUE_SIZE_MAX: Final = 4096
EXPIRE_MAX: Final = 256  # unused resources forgotten in one step


@final
class LockspaceEngine(Requests):
    """Binds to `base.engine.Engine`. Before the first round it is stopped; `lease_until` begins where it is told."""

    def __init__(
        self,
        me: MemberId,
        name: str,
        value_size: int = VALUE_SIZE,
        *,
        lease_until: Instant = 0,
        toss_ns: Nanoseconds = TOSS_NS,
        warn_ns: Nanoseconds = 0,
    ) -> None:
        assert 0 < value_size <= VALUE_SIZE_MAX, "value_size is 8 to 4096 bytes"
        assert value_size % 8 == 0, "value_size is a multiple of 8"
        super().__init__(me, name, value_size, lease_until, toss_ns, warn_ns)
        self.recovery = Recovery(self.space, self._mastering)
        self._announced = 0  # the round whose RoundDone is out
        self._lapsed = False  # as of the last tick: nothing to forget before the next lease
        self._frozen: list[tuple[MemberId, object]] = []  # messages that wait until we run

    # --- the engine contract ------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> Instant:
        first = self._timeouts[0][0] if self._timeouts else FOREVER
        if self._watched:
            first = min(first, next(iter(self._watched.values())))
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

    def busy(self, force: int) -> bool:
        """Whether leaving this lockspace is refused. Force 0: while clients here have locks or locks of others are
        mastered here; 1: while clients here have locks; 2 and above: never."""
        return force < 2 and (self.space.lock_count > 0 or (force < 1 and bool(self.space.copies)))

    # --- time --------------------------------------------------------------------------------------------------------

    def _tick(self, now: Instant) -> None:
        self._expire_timeouts(now)
        self._warn(now)
        self._lapsed = not self._running(now)
        if not self._lapsed:
            self.space.expire(now, EXPIRE_MAX)

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

    # --- rounds ------------------------------------------------------------------------------------------------------

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
        for resource in space.resources.in_order():
            if resource.master is not None:
                resource.confirmed = True
            if not resource.complete:
                continue
            resource.token = max(resource.token, space.base_token)
            for lock in (*resource.granted, *resource.converting):
                # Callbacks on their way were dropped with the old round, also those whose asker did not queue.
                lock.highbast = NL
            if resource.converting or resource.waiting:
                if resource.recover_grant:
                    resource.break_cycles(effects)
                resource.grant_pending(effects)
                if resource.recover_grant:
                    resource.refuse_unqueued(effects)
            if resource.unused:
                space.toss(now, resource)
        unanswered = dict.fromkeys(
            lock.id for lock in space.locks.in_order() if lock.pending and lock.id not in self._deferred
        )
        self._purges_again()
        self._queries_again()
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
        if self._purges:
            self._ask_purges(now)
        if self._queries:
            self._ask_queries(now)
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
        self._purges.clear()
        self._queries.clear()
        self._watched.clear()
        for resource in self.space.resources.in_order():
            resource.granted = resource.converting = resource.waiting = NOBODY
        self.space.resources.clear()
        self.space.locks.clear()
        self.space.adopted.clear()
        self.space.copies.clear()
        self.space.tossed.clear()
        self.space.directory.clear()
        self.space.send.clear()
        self.space.lock_count = 0
        self._timed = 0
        self._emit.append(SpaceLost())

    # --- messages ----------------------------------------------------------------------------------------------------

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
        if isinstance(message, Reached) and recovery.misfit(peer, message):
            self._emit.append(Misfit(peer, message.value_size))
            self._lose()
        elif isinstance(message, Names):
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
        elif isinstance(message, Purge):
            self._purge_asked(now, peer, message)
        elif isinstance(message, Purged):
            self._purged(now, peer, message)
        elif isinstance(message, Query):
            self._query_asked(peer, message)
        elif isinstance(message, Queried):
            self._queried(now, peer, message)
        else:
            self.space.counters.hostile += 1
        if effects:
            self._apply(now, effects)
