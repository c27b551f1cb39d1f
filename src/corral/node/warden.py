"""Watches over the participants of this node: their life, their part in rounds, their death (DESIGN 4).

Death is proven by *gone* alone. A closed socket, a progress counter that stood still for `recover`, or a start that
lasted longer without waiting for anybody else makes corrald freeze the participant's line of the page, kill it, and
wait until it is gone; only then is its departure ordered, and with it the round that recovers what it held.

A killed process whose thread is stuck in the kernel may still write, so it never counts as gone. After `recover` its
node gives up (`hung`): it ends as a failed node, and the others fence it with a proof that covers that process too.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol, final

from corral.api.cman import Peer
from corral.base.ids import MemberId, NodeIncarnation
from corral.base.time import Instant, Nanoseconds
from corral.base.world import Connection, ProcessId, World
from corral.cman.lift_events import (
    EvictLocal,
    FinishGroup,
    Left,
    LiftEvent,
    LocalDone,
    LocalGone,
    LocalJoin,
    LocalLeave,
    LocalReach,
    Refused,
    StartGroup,
)
from corral.providers.ipc_wire import (
    FROM_CORRALD,
    Deregister,
    FinishRound,
    FromCorrald,
    JoinRefused,
    LeftGroup,
    Reach,
    Refusal,
    Register,
    StartDone,
    StartRound,
    StopGroups,
    Waits,
)
from corral.providers.page import PageWriter

PARTICIPANTS_MAX: Final = 48
WAITS_MAX: Final = 300  # characters of what a start waits for


class Log(Protocol):
    def __call__(self, sentence: str) -> None: ...


@final
class Starting:
    """A start under way in a participant. `counted_from`: since when it waits for nothing but itself. `waits`: what it
    says it waits for, for people."""

    __slots__ = ("begun", "counted_from", "round_id", "told", "waits")

    def __init__(self, round_id: int, now: Instant) -> None:
        self.round_id = round_id
        self.begun = now
        self.counted_from = now
        self.waits = ""
        self.told = ""


@final
class Local:
    """One participant of this node."""

    __slots__ = (
        "connection",
        "counter",
        "counter_since",
        "dying",
        "groups",
        "killed_at",
        "leaving",
        "member",
        "process",
        "purpose",
        "starting",
    )

    def __init__(
        self, member: MemberId, process: ProcessId, purpose: str, connection: Connection, now: Instant
    ) -> None:
        self.member = member
        self.process = process
        self.purpose = purpose
        self.connection = connection
        self.groups: set[str] = set()  # it is in, or asked to join
        self.leaving: set[str] = set()  # of these
        self.starting: dict[str, Starting] = {}  # by group
        self.counter = 0
        self.counter_since = now
        self.dying = False
        self.killed_at: Instant = 0

    def tell(self, message: FromCorrald) -> None:
        self.connection.send([FROM_CORRALD.encode(message)])

    def waits_for(self) -> str:
        """For status; empty when nothing of it waits."""
        if self.dying:
            return (
                f"killed process {self.process.pid} to end; if it does not, a thread of it is stuck in the kernel: see "
                f"/proc/{self.process.pid}/task/*/stack and what its disk or mount waits for"
            )
        return "; ".join(f"{group}: {start.waits}" for group, start in sorted(self.starting.items()) if start.waits)


@final
class Warden:
    def __init__(
        self,
        world: World,
        me: NodeIncarnation,
        page: PageWriter,
        recover_ns: Nanoseconds,
        lift: Callable[[LiftEvent], None],
        log: Log,
        hung: Callable[[str], None],
    ) -> None:
        """`hung(sentence)`: a killed participant with something to recover is not gone after `recover_ns`."""
        self._world = world
        self._me = me
        self._page = page
        self._recover_ns = recover_ns
        self._lift = lift
        self._log = log
        self._hung = hung
        self._serial = 0
        self._stopped = False
        self.locals: dict[MemberId, Local] = {}
        self.evictions = 0
        self._look()

    # -- arrivals

    def admit(self, connection: Connection, process: ProcessId, purpose: str) -> tuple[Local, int] | str:
        """A new participant and its line of the page, or the reason why not."""
        if len(self.locals) >= PARTICIPANTS_MAX:
            return f"this node already has {PARTICIPANTS_MAX} participants; end one first"
        self._serial += 1
        slot = self._page.add(self._serial)
        if slot is None:
            return "the shared page has no free line; end a participant first"
        member = MemberId(self._me.node, self._me.incarnation, self._serial)
        local = Local(member, process, purpose, connection, self._world.now())
        self.locals[member] = local
        return local, slot

    # -- a participant speaks

    def register(self, local: Local, message: Register) -> None:
        local.groups.add(message.group)
        self._lift(
            LocalJoin(
                local.member,
                message.group,
                message.level,
                message.slots,
                message.address,
                message.ticket,
                local.process,
            )
        )

    def deregister(self, local: Local, message: Deregister) -> None:
        if message.group in local.groups - local.leaving:
            local.leaving.add(message.group)
            self._lift(LocalLeave(local.member, message.group))

    def start_done(self, local: Local, message: StartDone) -> None:
        start = local.starting.get(message.group)
        if start is not None and start.round_id == message.round:
            del local.starting[message.group]
        self._lift(LocalDone(local.member, message.group, message.round))

    def waits(self, local: Local, message: Waits) -> None:
        start = local.starting.get(message.group)
        if start is not None:
            start.waits = "".join(c for c in message.what[:WAITS_MAX] if c.isprintable())

    def reach(self, local: Local, message: Reach) -> None:
        if message.group in local.groups:
            self._lift(LocalReach(local.member, message.group, message.peer, message.down))

    # -- the lift speaks

    def stop_all(self) -> None:
        for local in self._living():
            local.starting.clear()
            local.tell(StopGroups(()))

    def start_group(self, decision: StartGroup) -> None:
        peers = tuple(Peer(entry.member, entry.address, entry.ticket) for entry in decision.group.members)
        for local in self._living():
            stops = tuple(name for name in decision.stops if name in local.groups)
            for name in stops:
                local.starting.pop(name, None)
            if stops:
                local.tell(StopGroups(stops))
            if local.member in decision.local:
                local.starting[decision.group.name] = Starting(decision.round.id, self._world.now())
                local.tell(StartRound(decision.round, decision.group.number, peers))
        # A member of this incarnation that is no longer here was killed, and its departure is being ordered.

    def finish_group(self, decision: FinishGroup) -> None:
        members = set(decision.round.member_ids)
        for local in self._living():
            if local.member in members:
                local.tell(FinishRound(decision.group, decision.round.id))

    def left(self, decision: Left) -> None:
        local = self.locals.get(decision.member)
        if local is not None:
            local.groups.discard(decision.group)
            local.leaving.discard(decision.group)
            local.tell(LeftGroup(decision.group))

    def refused(self, decision: Refused) -> None:
        local = self.locals.get(decision.member)
        if local is not None and decision.group not in local.leaving:  # else LeftGroup will answer
            local.groups.discard(decision.group)
            local.tell(JoinRefused(decision.group, decision.reason))

    def evict_local(self, decision: EvictLocal) -> None:
        local = self.locals.get(decision.member)
        if local is not None:
            self.evict(local, decision.reason)

    # -- death

    def gone_away(self, local: Local, reason: str) -> None:
        """Its socket closed. One that is in no group has nothing to lose: it may just be done with us."""
        if not local.groups:
            self._page.remove(local.member.serial)
            self.locals.pop(local.member, None)
            return
        self.evict(local, f"its connection closed ({reason})")

    def evict(self, local: Local, reason: str) -> None:
        if local.dying:
            return
        local.dying = True
        self._page.freeze(local.member.serial)
        if local.groups:
            self.evictions += 1
            self._log(f"participant {local.member} ({local.purpose}, pid {local.process.pid}) is evicted: {reason}")
        local.tell(Refusal(f"evicted: {reason}"))
        self._world.process.kill(local.process)
        self._world.spawn(self._bury(local), f"wait until participant {local.member} is gone")

    async def _bury(self, local: Local) -> None:
        local.killed_at = self._world.now()
        look = self._world.call_at(local.killed_at + self._recover_ns // 2, lambda: self._still_there(local))
        give_up = self._world.call_at(local.killed_at + self._recover_ns, lambda: self._give_up(local))
        try:
            await self._world.process.wait_gone(local.process)
        finally:
            look.cancel()
            give_up.cancel()
        local.connection.close()
        self._page.remove(local.member.serial)
        self.locals.pop(local.member, None)
        if local.groups and not self._stopped:
            self._lift(LocalGone(local.member))

    def _still_there(self, local: Local) -> None:
        self._log(f"participant {local.member} ({local.purpose}) waits for {local.waits_for()}")

    def _give_up(self, local: Local) -> None:
        if local.groups and not self._stopped:
            self._hung(
                f"process {local.process.pid} of participant {local.member} ({local.purpose}) was killed "
                f"{self._recover_ns / 1e9:g} s ago and is not gone, so it may still write: this node ends, for the "
                "others to fence it; restart the machine if that does not"
            )

    async def end_all(self, reason: str) -> bool:
        """Kills every participant. Whether they are gone, for which it waits up to `recover`: one that is not may still
        write, and whoever does not know better must count it as failed."""
        self._stopped = True
        for local in list(self.locals.values()):
            self.evict(local, reason)
        deadline = self._world.now() + self._recover_ns
        while left := [local for local in self.locals.values() if not self._world.process.is_gone(local.process)]:
            if self._world.now() >= deadline:
                pids = ", ".join(str(local.process.pid) for local in left)
                self._log(f"killed processes {pids} are not gone: this node counts as failed until it is fenced")
                return False
            await self._world.sleep_until(min(deadline, self._world.now() + self._recover_ns // 100))
        return True

    # -- the watch

    def _living(self) -> Sequence[Local]:
        return [self.locals[member] for member in sorted(self.locals) if not self.locals[member].dying]

    def _look(self) -> None:
        if self._stopped:
            return
        now = self._world.now()
        for local in self._living():
            counter = self._page.progress(local.member.serial)
            if counter != local.counter:
                local.counter = counter
                local.counter_since = now
            elif local.groups and now - local.counter_since > self._recover_ns:
                self.evict(local, f"its event loop has stood still for {self._recover_ns / 1e9:g} s")
                continue
            self._look_at_starts(local, now)
        self._world.call_at(now + self._recover_ns // 8, self._look)

    def _look_at_starts(self, local: Local, now: Instant) -> None:
        blocked = self._page.blocked(local.member.serial)
        for group, start in sorted(local.starting.items()):
            if blocked:
                start.counted_from = now  # its own time counts from when nobody holds it up
                self._tell_long(local, group, start, now)
            elif now - start.counted_from > self._recover_ns:
                self.evict(
                    local, f"it did not finish round {start.round_id} of {group} in {self._recover_ns / 1e9:g} s"
                )
                return

    def _tell_long(self, local: Local, group: str, start: Starting, now: Instant) -> None:
        if start.waits and start.waits != start.told and now - start.begun > self._recover_ns:
            start.told = start.waits
            self._log(f"participant {local.member} ({local.purpose}) waits to recover {group}: for {start.waits}")
