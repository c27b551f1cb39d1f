"""Glocks: cluster locks with a cache hanging on them (pure; source: Linux fs/gfs2/glock.c, Documentation/gfs2-glocks).

A glock is held in UN, SH, DF or EX (dlm NL, PR, CW, EX) and stays cached there after its last local holder is gone.
Holders queue locally: EX alone, SH together, strictly in order. When another node wants the lock (`blocking`), new
holders wait, the present ones finish, the shell writes back and invalidates what the lock protects (`syncs`), and only
then is the mode lowered. Everything that takes time happens in the shell; this file decides.

    IDLE --request--> REQUEST --completed--> IDLE
    IDLE --demote, no holders--> INVALIDATING --begin_sync--> SYNCING --synced--> REQUEST (down) --completed--> IDLE

INVALIDATING exists for the kernel's page cache: reads and writes that the kernel must have answered before it can drop
pages are still served (`io`), since the lock is still held (measured: anything else deadlocks or lets old pages back).

Recovery gate: from `close_gate` to `open_gate` only NOEXP holders are granted anything that was not already cached.

Invariants:
  GFS-1  local holders: one EX or any number of SH, and never more than the mode held covers.
  GFS-2  a mode is lowered only by way of SYNCING with no holders: nothing dirty is left behind it.
  GFS-3  while the gate is closed a mode obtained by an ordinary request is not used.

A glock that is not in the lock manager yet is asked for without waiting. Who must wait does so as a conversion from NL:
a new request is granted only when no conversion waits, and beside nodes that take turns on a busy lock one always does.
SH to EX waits in the lock manager's queue with SH kept, so what is cached stays good. When two nodes want that of each
other at once the lock manager answers EDEADLK to one: it gives up SH, which lets the other have EX, and queues from UN.
"""

from collections.abc import Iterable
from typing import Any, Final, final

from corral.api.dlm import CR, CW, EXPEDITE, NL, NOQUEUE, NOQUEUEBAST, PR, PW, Completion, Request
from corral.api.dlm import EX as DLM_EX
from corral.base.time import FOREVER, MILLISECOND, Instant

UN: Final = 0
SH: Final = 1
DF: Final = 2
EX: Final = 3
STATE_NAMES: Final = ("UN", "SH", "DF", "EX")

NONDISK: Final = 1
INODE: Final = 2
RGRP: Final = 3
META: Final = 4
IOPEN: Final = 5
FLOCK: Final = 6
PLOCK: Final = 7
QUOTA: Final = 8
JOURNAL: Final = 9

NONDISK_MOUNT: Final = 0
NONDISK_LIVE: Final = 1
NONDISK_FREEZE: Final = 2
NONDISK_RENAME: Final = 3

# Flags of a holder.
TRY: Final = 0x1  # fail instead of waiting for another node
NOEXP: Final = 0x2  # part of recovery: passes the gate
TRY_CALLBACK: Final = 0x8  # with TRY: the holders elsewhere are told (TRY_1CB)
IO: Final = 0x10  # a read or write of the kernel, which has locked pages until it is answered

MODE_OF_STATE: Final = (NL, PR, CW, DLM_EX)
COVERS: Final = (  # COVERS[held][wanted]
    (True, False, False, False),
    (True, True, False, False),
    (True, False, True, False),
    (True, True, True, True),
)
# What is left to hold when somebody asks for this dlm mode.
DEMOTE_FOR: Final = {NL: EX, CR: SH, CW: UN, PR: SH, PW: UN, DLM_EX: UN}

IDLE: Final = 0
REQUEST: Final = 1
INVALIDATING: Final = 2
SYNCING: Final = 3
PHASE_NAMES: Final = ("idle", "requesting", "invalidating", "syncing")

EAGAIN: Final = -11
EDEADLK: Final = -35
MIN_HOLD_NS: Final = 2 * MILLISECOND
MAX_HOLD_NS: Final = 20 * MILLISECOND
COST_SHARE: Final = 8  # a new cost of demotion counts for one part in so many


@final
class Holder:
    """A wish for a glock. `granted` or `failed` is set once; `future` belongs to the shell."""

    __slots__ = ("failed", "flags", "future", "granted", "state")

    def __init__(self, state: int, flags: int, future: Any = None) -> None:
        self.state = state
        self.flags = flags
        self.future = future
        self.granted = False
        self.failed = False


@final
class Glock:
    """`holders`: -1 for one EX, n for n SH or DF. `blocked`: demote to `demote` as soon as nobody holds it.
    `contended`: it could not be had at once. `gated`: the mode was obtained while the gate was closed. `dirty` and
    `logged` are the journal's: objects in the running transaction, and blocks with images at or after the tail.
    `cached` is what the lock protects."""

    __slots__ = (
        "blocked",
        "cached",
        "contended",
        "demote",
        "demoted_at",
        "dirty",
        "drop",
        "forgotten",
        "gated",
        "handle",
        "hold_until",
        "holders",
        "io_served",
        "kind",
        "logged",
        "number",
        "phase",
        "queue",
        "request_flags",
        "state",
        "target",
    )

    def __init__(self, kind: int, number: int) -> None:
        self.kind = kind
        self.number = number
        self.state = UN
        self.phase = IDLE
        self.holders = 0
        self.queue: list[Holder] = []
        self.demote = EX
        self.demoted_at: Instant = 0
        self.blocked = False
        self.drop = False
        self.forgotten = False  # not in the table any more: whoever still has it asks the table again
        self.target = UN
        self.request_flags = 0
        self.handle = 0
        self.gated = False
        self.contended = False
        self.hold_until: Instant = 0
        self.io_served = 0
        self.dirty = 0
        self.logged: set[int] = set()
        self.cached: Any = None

    @property
    def name(self) -> bytes:
        return b"%8x%16x" % (self.kind, self.number)

    def __repr__(self) -> str:
        return f"Glock({self.kind}/{self.number} {STATE_NAMES[self.state]} phase={self.phase} holders={self.holders})"


@final
class GlockTable:
    """All glocks of one mount. The shell drains `requests`, `syncs` and `grants` after each call that may fill them.

    `local`: the lock manager has no other member, so every mode is had at once and nothing is ever sent.
    """

    __slots__ = (
        "cost_ns",
        "counts",
        "deadline",
        "gate_closed",
        "glocks",
        "grants",
        "local",
        "min_hold_ns",
        "requests",
        "syncs",
        "timed",
    )

    def __init__(self, *, local: bool, min_hold_ns: int = MIN_HOLD_NS) -> None:
        self.local = local
        self.min_hold_ns = min_hold_ns
        self.cost_ns = 0  # what giving up EX on an inode or resource group took lately
        self.glocks: dict[tuple[int, int], Glock] = {}
        self.gate_closed = False
        self.requests: list[tuple[Glock, Request]] = []
        self.syncs: list[tuple[Glock, int]] = []
        self.grants: list[Holder] = []
        self.timed: dict[tuple[int, int], Glock] = {}
        self.deadline: Instant = FOREVER
        self.counts = {"requests": 0, "demotions": 0, "blocking": 0, "waits": 0}

    def get(self, kind: int, number: int) -> Glock:
        glock = self.glocks.get((kind, number))
        if glock is None:
            glock = self.glocks[kind, number] = Glock(kind, number)
        return glock

    # --- holding -----------------------------------------------------------------------------------------------------

    def try_hold(self, glock: Glock, state: int) -> bool:
        """The fast path: granted at once from the cached mode, or nothing happened."""
        if glock.queue or glock.blocked or glock.phase != IDLE or glock.gated:
            return False
        if not COVERS[glock.state][state]:
            if not self.local or glock.holders:
                return False
            glock.state = EX if state == EX else SH
        if state == EX:
            if glock.holders:
                return False
            glock.holders = -1
        else:
            if glock.holders < 0:
                return False
            glock.holders += 1
        return True

    def is_cached(self, glock: Glock, state: int) -> bool:
        """Whether a hold would be granted from what is cached, as soon as local holders are through."""
        return COVERS[glock.state][state] and glock.phase == IDLE and not glock.blocked and not glock.gated

    def try_hold_io(self, glock: Glock, state: int) -> bool:
        """For a request that the kernel's invalidation may be waiting for: served while the lock is still held."""
        if glock.phase != INVALIDATING or not COVERS[glock.state][state] or glock.holders < 0 or glock.gated:
            return False
        if state == EX:
            if glock.holders:
                return False
            glock.holders = -1
        else:
            glock.holders += 1
        glock.io_served += 1
        return True

    def enqueue(self, now: Instant, glock: Glock, holder: Holder) -> None:
        self.counts["waits"] += 1
        glock.queue.append(holder)
        self.run(now, glock)

    def cancel(self, now: Instant, glock: Glock, holder: Holder) -> None:
        """The wish is withdrawn, granted or not."""
        if holder.granted:
            self.release(now, glock, holder.state)
        elif holder in glock.queue:
            glock.queue.remove(holder)
            self.run(now, glock)

    def release(self, now: Instant, glock: Glock, state: int) -> None:
        assert glock.holders, "GFS-1"
        if state == EX:
            assert glock.holders == -1, "GFS-1"
            glock.holders = 0
        else:
            glock.holders -= 1
        if glock.queue or glock.blocked:
            self.run(now, glock)

    # --- the lock manager --------------------------------------------------------------------------------------------

    def blocking(self, now: Instant, glock: Glock, mode: int) -> None:
        """Another member asks for `mode`."""
        self.counts["blocking"] += 1
        target = DEMOTE_FOR[mode]
        if glock.phase == REQUEST and glock.target > glock.state:
            pass  # the grant is on its way: keep the demand until it is here
        elif COVERS[target][glock.state]:
            return
        glock.demote = min(glock.demote, target)
        if now < glock.hold_until:
            self.timed[glock.kind, glock.number] = glock
            self.deadline = min(self.deadline, glock.hold_until)
            return
        glock.blocked = True
        self.run(now, glock)

    def tick(self, now: Instant) -> None:
        """Minimum hold times that have run out."""
        if now < self.deadline:
            return
        due = [glock for _, glock in sorted(self.timed.items()) if now >= glock.hold_until]
        for glock in due:
            del self.timed[glock.kind, glock.number]
        self.deadline = min((glock.hold_until for glock in self.timed.values()), default=FOREVER)
        for glock in due:
            if not COVERS[glock.demote][glock.state]:
                glock.blocked = True
                self.run(now, glock)

    def completed(self, now: Instant, glock: Glock, completion: Completion) -> None:
        assert glock.phase == REQUEST
        glock.phase = IDLE
        if glock.drop and completion.status != 0 and glock.target == UN:
            self._dropped(now, glock)
            return
        if completion.status == 0:
            self._obtained(now, glock)
        else:
            self._refused(glock, completion.status)
        self.run(now, glock)

    def _obtained(self, now: Instant, glock: Glock) -> None:
        raised = glock.target > glock.state
        glock.state = glock.target
        if not raised:
            if COVERS[glock.demote][glock.state]:
                glock.demote = EX
                glock.blocked = False
            return
        glock.gated = self.gate_closed and not glock.request_flags & NOEXP
        glock.hold_until = now + self._hold_ns(glock)
        if glock.demote < EX:
            # Asked back before it was here: the holder it was fetched for goes first, then it leaves.
            self.timed[glock.kind, glock.number] = glock
            self.deadline = min(self.deadline, glock.hold_until)
            glock.blocked = False

    def _hold_ns(self, glock: Glock) -> int:
        """Nodes that take turns on a directory should spend no more time on handing it over than on using it: it is
        kept for as long as giving it up took lately."""
        if not self.min_hold_ns or glock.kind not in (INODE, RGRP):
            return self.min_hold_ns
        return max(self.min_hold_ns, min(self.cost_ns, MAX_HOLD_NS))

    def _refused(self, glock: Glock, status: int) -> None:
        """NOQUEUE failed, another conversion waits for ours, or the lock manager gave up."""
        head = glock.queue[0] if glock.queue else None
        if status == EAGAIN and glock.state == UN and not (head is not None and head.flags & TRY):
            glock.contended = True
            return
        if status in (EAGAIN, EDEADLK) and not (head is not None and head.flags & TRY) and glock.state != UN:
            glock.demote = UN
            glock.blocked = True
            return
        if head is not None:
            del glock.queue[0]
            head.failed = True
            self.grants.append(head)

    def _dropped(self, now: Instant, glock: Glock) -> None:
        """Unlocked for good; forgotten unless somebody wants it again meanwhile."""
        glock.state = UN
        glock.handle = 0
        glock.drop = False
        glock.demote = EX
        glock.blocked = False
        if glock.queue:
            self.run(now, glock)
        else:
            self._forget(glock)

    def _forget(self, glock: Glock) -> None:
        self.timed.pop((glock.kind, glock.number), None)
        if self.glocks.get((glock.kind, glock.number)) is glock and glock.cached is None:
            del self.glocks[glock.kind, glock.number]
            glock.forgotten = True

    # --- demotion ----------------------------------------------------------------------------------------------------

    def give_up(self, now: Instant, glock: Glock) -> None:
        """Our own wish to hold it no longer (cache pressure, unmount): demoted to UN and unlocked."""
        glock.drop = True
        glock.demote = UN
        glock.blocked = True
        self.run(now, glock)

    def begin_sync(self, glock: Glock) -> None:
        """The kernel's caches are clean: from here nobody is served under this lock any more."""
        assert glock.phase == INVALIDATING
        assert may_lower(glock), "GFS-2"
        glock.phase = SYNCING

    def synced(self, now: Instant, glock: Glock, target: int) -> None:
        """Everything is in place and (target UN) dropped: the mode may go down."""
        assert glock.phase == SYNCING
        assert may_lower(glock), "GFS-2"
        assert glock.dirty == 0, "GFS-2"
        if glock.state == EX and glock.kind in (INODE, RGRP):
            self.cost_ns += (now - glock.demoted_at - self.cost_ns) // COST_SHARE
        glock.target = target
        glock.phase = REQUEST
        if self.local or not glock.handle:
            glock.phase = IDLE
            glock.state = target
            if glock.drop:
                self._dropped(now, glock)
                return
            if COVERS[glock.demote][target]:
                glock.demote = EX
                glock.blocked = False
            self.run(now, glock)
            return
        if glock.drop and target == UN:
            request = Request("unlock", lock=glock.handle)
        else:
            glock.drop = False
            request = Request("convert", glock.name, MODE_OF_STATE[target], 0, glock.handle)
        self.requests.append((glock, request))

    # --- the gate ----------------------------------------------------------------------------------------------------

    def close_gate(self) -> None:
        self.gate_closed = True

    def open_gate(self, now: Instant) -> None:
        self.gate_closed = False
        for _, glock in sorted(self.glocks.items()):
            glock.gated = False
            if glock.queue or glock.blocked:
                self.run(now, glock)

    # --- the queue ---------------------------------------------------------------------------------------------------

    def run(self, now: Instant, glock: Glock) -> None:
        """Grants what can be granted, asks for what is missing, starts a demotion that is due."""
        if glock.phase == INVALIDATING:
            self._serve_io(glock)
        if glock.phase != IDLE:
            return
        if glock.blocked:
            if may_lower(glock):
                self._demote(now, glock)
            return
        queue = glock.queue
        if self.gate_closed:
            _recovery_first(queue)
        while queue:
            head = queue[0]
            if glock.gated and not head.flags & NOEXP:
                return
            if not COVERS[glock.state][head.state]:
                self._promote(glock, head)
                if not self.local or glock.phase != IDLE or not COVERS[glock.state][head.state]:
                    return
            if glock.holders < 0 or (head.state == EX and glock.holders):
                return
            del queue[0]
            glock.holders = -1 if head.state == EX else glock.holders + 1
            head.granted = True
            self.grants.append(head)

    def _demote(self, now: Instant, glock: Glock) -> None:
        self.counts["demotions"] += 1
        self.timed.pop((glock.kind, glock.number), None)
        glock.phase = INVALIDATING
        glock.demoted_at = now
        glock.target = glock.demote
        self.syncs.append((glock, glock.demote))
        self._serve_io(glock)

    def _serve_io(self, glock: Glock) -> None:
        """Reads and writes that came to wait before or during the invalidation: the kernel cannot drop the pages they
        have locked before they are answered, and the lock is still held. Not under a mode that recovery still gates
        (GFS-3): a journal that is still to be replayed would be put over what they wrote. They wait for the gate."""
        if glock.gated:
            return
        waiting: list[Holder] = []
        for holder in glock.queue:
            busy = glock.holders != 0 if holder.state == EX else glock.holders < 0
            if busy or not holder.flags & IO or not COVERS[glock.state][holder.state]:
                waiting.append(holder)
                continue
            glock.holders = -1 if holder.state == EX else glock.holders + 1
            glock.io_served += 1
            holder.granted = True
            self.grants.append(holder)
        glock.queue[:] = waiting

    def _promote(self, glock: Glock, head: Holder) -> None:
        if glock.holders:
            return  # they finish first: a mode in use is not converted
        if self.local:
            glock.state = EX if head.state == EX else SH
            return
        if self.gate_closed and not head.flags & NOEXP:
            return  # GFS-3
        flags = NOQUEUE | NOQUEUEBAST
        if head.flags & TRY:
            flags = NOQUEUE | (NOQUEUEBAST if head.flags & TRY_CALLBACK else 0)
        elif glock.handle:
            flags = 0
        glock.target = head.state
        if glock.contended and not glock.handle:
            glock.target, flags = UN, EXPEDITE
        glock.contended = False
        glock.request_flags = head.flags
        glock.phase = REQUEST
        self.counts["requests"] += 1
        op = "convert" if glock.handle else "lock"
        self.requests.append((glock, Request(op, glock.name, MODE_OF_STATE[glock.target], flags, glock.handle)))

    def idle(self) -> Iterable[Glock]:
        """Glocks that nobody holds, wants or demotes: candidates to be given up under cache pressure, oldest first."""
        for glock in self.glocks.values():
            if not glock.holders and not glock.queue and glock.phase == IDLE and not glock.blocked:
                yield glock


def may_lower(glock: Glock) -> bool:
    """Nobody holds it; or what is held is an open file, as long as it likes, and the mode asked for still covers that
    (EX was left by a reclaim before): others who want to open the file would wait until it is closed."""
    return glock.holders == 0 or (glock.kind == IOPEN and glock.holders > 0 and glock.demote == SH)


def _recovery_first(queue: list[Holder]) -> None:
    """Who waits at the gate waits for recovery, so recovery must not wait in line behind it."""
    if queue and not queue[0].flags & NOEXP:
        at = next((at for at, holder in enumerate(queue) if holder.flags & NOEXP), 0)
        if at:
            queue.insert(0, queue.pop(at))
