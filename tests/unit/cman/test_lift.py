"""Recovery control, stepped by hand: several lifts over FIFO queues, services that report done when told."""

from corral.api.cman import FENCE_GROUP
from corral.base.engine import TICK, Received
from corral.base.ids import MemberId, NodeIncarnation, ViewId
from corral.base.time import FOREVER, SECOND
from corral.base.view import Round, View
from corral.base.world import ProcessId
from corral.cman.lift import LiftEngine
from corral.cman.lift_events import (
    EvictLocal,
    Fenced,
    FinishGroup,
    Installed,
    Left,
    LocalDone,
    LocalGone,
    LocalJoin,
    LocalLeave,
    LocalReach,
    Promised,
    Refused,
    StartFence,
    StartGroup,
    StopAll,
    Stopped,
    ViewActive,
)
from corral.cman.lift_wire import Attachment, Begin, LiftState

RECOVER = 2 * SECOND


class Cluster:
    """Lifts of several nodes. Services answer at once unless their group is in `held`."""

    def __init__(self, *nodes: int) -> None:
        self.now = 0
        self.epoch = 0
        self.lifts = {node: self.boot(node, 100) for node in nodes}
        self.configured = nodes
        self.queues: dict[tuple[int, int], list] = {}
        self.story: list[str] = []
        self.accepted: list[View] = []  # the newest active view and quorate ones since, as the agreement keeps them
        self.held: set[str] = set()
        self.late: set[tuple[int, int]] = set()  # channels that deliver only by hand
        self.rounds: dict[tuple[int, str], object] = {}
        self.attached: dict[NodeIncarnation, Attachment] = {}
        self.waiting: list[tuple[int, LocalDone]] = []

    def boot(self, node: int, incarnation: int, state: LiftState | None = None) -> LiftEngine:
        process = ProcessId(node * 1000 + incarnation, 1, "boot")
        configured = (1, 2, 3)
        return LiftEngine(NodeIncarnation(node, incarnation), process, configured, RECOVER, state or LiftState())

    def install(self, *nodes: int, quorate: bool = True, coordinator: int | None = None) -> None:
        self.epoch += 1
        members = tuple(self.lifts[node].me for node in sorted(nodes))
        view = View(ViewId(self.epoch, coordinator or min(nodes)), members, quorate)
        self.attached.clear()
        for node in nodes:
            self.step(node, Promised(view.id))
        attachments = dict(self.attached)
        for node in nodes:
            self.step(node, Installed(view, attachments, tuple(self.accepted), first=not self.accepted))
        if quorate:
            self.accepted.append(view)

    def step(self, node: int, event: object) -> None:
        lift = self.lifts[node]
        lift.step(self.now, event)
        ready = lift.ready()
        for peer, message in [*ready.send, *ready.then_send]:
            self.queues.setdefault((node, peer.node), []).append(message)
        for decision in ready.emit:
            self.act(node, decision)

    def act(self, node: int, decision: object) -> None:
        if isinstance(decision, StopAll):
            self.story.append(f"{node} stop")
        elif isinstance(decision, Stopped):
            self.attached[self.lifts[node].me] = decision.attachment
        elif isinstance(decision, StartFence):
            failed = ",".join(str(entry.member.node) for entry in decision.round.failed)
            self.story.append(f"{node} fence [{failed}]" + (" startup" if decision.startup else ""))
            for entry in decision.round.failed:
                self.step(node, Fenced(NodeIncarnation(entry.member.node, entry.member.incarnation)))
            self.done(node, LocalDone(self.lifts[node].me.corrald(), FENCE_GROUP, decision.round.id))
        elif isinstance(decision, StartGroup):
            self.rounds[node, decision.group.name] = decision.round
            failed = ",".join(f"{entry.member}@{entry.slot}" for entry in decision.round.failed)
            members = ",".join(f"{entry.member}@{entry.slot}" for entry in decision.round.members)
            if decision.local:
                self.story.append(f"{node} start {decision.group.name} {{{members}}} failed [{failed}]")
            for member in decision.local:
                self.done(node, LocalDone(member, decision.group.name, decision.round.id))
        elif isinstance(decision, FinishGroup):
            self.story.append(f"{node} finish {decision.group}")
        elif isinstance(decision, ViewActive):
            self.accepted = [view for view in self.accepted if view.id >= decision.view.id]
            self.story.append(f"{node} active")
        elif isinstance(decision, Left):
            self.story.append(f"{node} left {decision.group}")
        elif isinstance(decision, Refused):
            self.story.append(f"{node} refused {decision.reason}")
        elif isinstance(decision, EvictLocal):
            self.story.append(f"{node} evict {decision.member}: {decision.reason}")

    def done(self, node: int, event: LocalDone) -> None:
        if event.group in self.held:
            self.waiting.append((node, event))
        else:
            self.step(node, event)

    def release(self, group: str) -> None:
        self.held.discard(group)
        waiting, self.waiting = self.waiting, []
        for node, event in waiting:
            self.done(node, event)
        self.settle()

    def settle(self) -> None:
        while any(queue for channel, queue in self.queues.items() if channel not in self.late):
            for source, target in sorted(self.queues.keys() - self.late):
                self.deliver(source, target)

    def deliver(self, source: int, target: int, number: int | None = None) -> None:
        """Everything or the first `number` messages on that channel."""
        queue = self.queues[source, target]
        messages, queue[:number] = queue[:number], []
        for message in messages if target in self.lifts else ():
            self.step(target, Received(self.lifts[source].me.corrald(), message))

    def join(self, node: int, group: str, level: int, serial: int = 1, slots: int = 8) -> MemberId:
        me = self.lifts[node].me
        member = MemberId(me.node, me.incarnation, serial)
        process = ProcessId(node * 1000 + serial, 2, "boot")
        self.step(node, LocalJoin(member, group, level, slots, f"host{node}:{serial}", b"ticket", process))
        self.settle()
        return member

    def told(self) -> list[str]:
        story, self.story = self.story, []
        return story


def active(*nodes: int) -> Cluster:
    cluster = Cluster(*nodes)
    cluster.install(*nodes)
    cluster.settle()
    cluster.told()
    return cluster


def test_first_view_fences_at_startup_and_becomes_active_everywhere() -> None:
    cluster = Cluster(1, 2, 3)
    cluster.install(1, 2, 3)
    cluster.settle()
    story = cluster.told()
    assert [line for line in story if "fence" in line] == [f"{n} fence [] startup" for n in (1, 2, 3)]
    assert [line for line in story if "active" in line] == ["1 active", "2 active", "3 active"]


def test_an_inquorate_view_runs_no_round() -> None:
    cluster = Cluster(1, 2, 3)
    cluster.install(3, quorate=False)
    cluster.settle()
    assert cluster.told() == []


def test_levels_of_a_stack_start_from_the_bottom_and_only_when_the_one_below_finished_everywhere() -> None:
    cluster = active(1, 2)
    cluster.join(1, "gfs:home", 2)
    cluster.join(1, "dlm:home", 1)
    cluster.told()
    cluster.held.add("dlm:home")
    cluster.install(1, 2)
    cluster.settle()
    story = cluster.told()
    assert "1 start dlm:home {1.1@0} failed []" in story
    assert not any("gfs" in line for line in story)
    cluster.release("dlm:home")
    story = cluster.told()
    assert story.index("1 finish dlm:home") < story.index("1 start gfs:home {1.1@0} failed []")


def test_a_failed_node_is_fenced_before_its_groups_recover_and_its_slot_is_named() -> None:
    cluster = active(1, 2, 3)
    for node in (1, 2, 3):
        cluster.join(node, "dlm:home", 1)
    cluster.told()
    del cluster.lifts[3]
    cluster.install(1, 2)
    cluster.settle()
    story = cluster.told()
    assert "1 fence [3]" in story
    assert story.index("1 fence [3]") < story.index("1 start dlm:home {1.1@0,2.1@1} failed [3.1@2]")


def test_what_an_abandoned_round_should_have_recovered_carries_over() -> None:
    cluster = active(1, 2, 3)
    for node in (1, 2, 3):
        cluster.join(node, "dlm:home", 1)
    cluster.held.add("dlm:home")
    del cluster.lifts[3]
    cluster.install(1, 2)
    cluster.settle()
    cluster.told()
    cluster.held.clear()
    cluster.install(1, 2, coordinator=2)  # the round never finished
    cluster.settle()
    assert "2 start dlm:home {1.1@0,2.1@1} failed [3.1@2]" in cluster.told()


def test_a_second_failure_before_the_first_was_fenced_makes_both_victims() -> None:
    cluster = active(1, 2, 3)
    cluster.held.add(FENCE_GROUP)
    cluster.install(1, 2)
    cluster.settle()
    cluster.held.clear()
    state = cluster.lifts[1].state
    assert state.round > 0
    del cluster.lifts[2], cluster.lifts[3]
    cluster.install(1)
    cluster.settle()
    # Fenced(3) was recorded by 1 when its fence service said so, only its Done was still out.
    assert "1 fence [2]" in cluster.told()


def test_a_returned_incarnation_is_a_victim_even_if_it_was_never_seen_absent() -> None:
    cluster = active(1, 2, 3)
    cluster.lifts[3] = cluster.boot(3, 101)
    cluster.install(1, 2, 3)
    cluster.settle()
    assert "1 fence [3]" in cluster.told()


def test_obligations_survive_a_total_restart() -> None:
    cluster = active(1, 2, 3)
    states = {node: cluster.lifts[node].state for node in (1, 2)}
    cluster.lifts = {node: cluster.boot(node, 200, states[node]) for node in (1, 2)}
    cluster.install(1, 2)
    cluster.settle()
    assert "1 fence [1,2,3]" in cluster.told()


def test_after_a_promise_the_view_before_goes_no_further() -> None:
    cluster = Cluster(1, 2)
    cluster.held.add(FENCE_GROUP)
    cluster.install(1, 2)
    cluster.settle()
    cluster.told()
    cluster.step(2, Promised(ViewId(2, 1)))
    cluster.release(FENCE_GROUP)
    assert "2 active" not in cluster.told()
    cluster.join(1, "dlm:home", 1)
    assert cluster.lifts[2].groups == {}
    cluster.install(1, 2)
    cluster.settle()
    assert "2 active" in cluster.told()


def test_a_round_that_no_token_could_hold_is_refused() -> None:
    cluster = active(1, 2)
    assert cluster.lifts[1].view is not None
    begin = Begin(cluster.lifts[1].view.id, 1, Round(1 << 32, FENCE_GROUP, (), (), (), ()), None)
    cluster.step(2, Received(cluster.lifts[1].me.corrald(), begin))
    assert cluster.lifts[2].dropped == 1
    cluster.lifts[2] = cluster.boot(2, 101, LiftState(round=(1 << 64) - 1))  # what it attaches is believed by nobody
    cluster.install(1, 2)
    assert cluster.lifts[1].dropped == 1
    assert cluster.lifts[1].state.round < 10


def test_rounds_rise_over_a_total_restart() -> None:
    cluster = active(1, 2)
    cluster.join(1, "dlm:home", 1)
    before = cluster.lifts[2].state.round
    assert before >= 2
    cluster.lifts = {2: cluster.boot(2, 200, cluster.lifts[2].state)}
    cluster.install(2)
    assert list(cluster.lifts[2].rounds) == ["fence"]
    cluster.settle()
    assert cluster.lifts[2].state.round > before


def test_a_participant_that_is_gone_fails_out_of_every_group() -> None:
    cluster = active(1, 2)
    gone = cluster.join(1, "dlm:home", 1)
    cluster.join(2, "dlm:home", 1)
    cluster.told()
    cluster.step(1, LocalGone(gone))
    cluster.settle()
    assert "2 start dlm:home {2.1@1} failed [1.1@0]" in cluster.told()


def test_a_clean_leave_is_not_a_failure_and_frees_the_slot() -> None:
    cluster = active(1, 2)
    leaver = cluster.join(1, "dlm:home", 1)
    cluster.join(2, "dlm:home", 1)
    cluster.told()
    cluster.step(1, LocalLeave(leaver, "dlm:home"))
    cluster.settle()
    story = cluster.told()
    assert "2 start dlm:home {2.1@1} failed []" in story
    assert "1 left dlm:home" in story
    cluster.join(1, "dlm:home", 1, serial=2)
    assert "1 start dlm:home {1.2@0,2.1@1} failed []" in cluster.told()


def test_who_left_and_joins_again_at_once_can_fail_once_more() -> None:
    cluster = active(1, 2)
    member = cluster.join(1, "dlm:home", 1)
    cluster.join(2, "dlm:home", 1)
    cluster.held.add("dlm:home")
    cluster.step(1, LocalLeave(member, "dlm:home"))
    cluster.settle()
    cluster.join(1, "dlm:home", 1)
    assert cluster.lifts[2].groups["dlm:home"].entry(member) is None  # the round it left in has not finished
    cluster.release("dlm:home")
    assert cluster.lifts[2].groups["dlm:home"].entry(member) is not None
    cluster.held.add("dlm:home")
    cluster.told()
    cluster.step(1, LocalGone(member))
    cluster.settle()
    assert "2 start dlm:home {2.1@1} failed [1.1@0]" in cluster.told()


def full(cluster: Cluster) -> MemberId:
    """Both slots of gfs:home taken, one by a member that failed and whose recovery is held up. Its node asks again."""
    gone = cluster.join(1, "gfs:home", 2, slots=2)
    cluster.join(2, "gfs:home", 2, slots=2)
    cluster.held.add("gfs:home")
    cluster.step(1, LocalGone(gone))
    cluster.settle()
    cluster.told()
    return cluster.join(1, "gfs:home", 2, serial=2, slots=2)


def test_a_slot_is_given_out_again_only_when_its_failure_is_recovered() -> None:
    cluster = active(1, 2)
    waiting = full(cluster)
    assert cluster.told() == []
    assert cluster.lifts[1].joins_waiting() == {
        waiting: "no slot of gfs:home is free and what has failed is still not recovered (slot 0 of 1.1)"
    }
    cluster.release("gfs:home")
    assert "1 start gfs:home {1.2@0,2.1@1} failed []" in cluster.told()
    assert cluster.lifts[1].joins_waiting() == {}
    assert cluster.lifts[1].deadline == FOREVER


def test_a_join_does_not_wait_for_a_recovered_slot_for_ever() -> None:
    cluster = active(1, 2)
    full(cluster)
    cluster.now = cluster.lifts[1].deadline
    assert RECOVER < cluster.now < 10 * RECOVER
    cluster.step(1, TICK)
    cluster.settle()
    (told,) = cluster.told()
    assert told.startswith("1 refused no slot of gfs:home is free and what has failed is still not recovered")
    assert cluster.lifts[1].deadline == FOREVER
    cluster.release("gfs:home")
    assert not any("1.2@" in line for line in cluster.told())


def test_what_waits_for_a_slot_goes_on_waiting_in_the_next_view() -> None:
    cluster = active(1, 2)
    full(cluster)
    cluster.install(1, 2)
    assert cluster.lifts[1].deadline == FOREVER
    cluster.settle()
    assert RECOVER < cluster.lifts[1].deadline < 10 * RECOVER
    cluster.release("gfs:home")
    assert "1 start gfs:home {1.2@0,2.1@1} failed []" in cluster.told()


def test_a_group_whose_slots_all_have_living_members_refuses_at_once() -> None:
    cluster = active(1, 2)
    cluster.join(1, "gfs:home", 2, slots=2)
    cluster.join(2, "gfs:home", 2, slots=2)
    cluster.told()
    cluster.join(1, "gfs:home", 2, serial=2, slots=2)
    assert cluster.told() == ["1 refused members have all 2 slots of gfs:home; let one leave first"]


def test_a_joiner_that_dies_before_its_first_round_finished_has_failed_too() -> None:
    # It may have replayed, and so written: its slot must be recovered before it is given out again.
    cluster = active(1, 2)
    cluster.join(1, "gfs:home", 2)
    cluster.held.add("gfs:home")
    gone = cluster.join(2, "gfs:home", 2)
    cluster.told()
    cluster.step(2, LocalGone(gone))
    cluster.settle()
    assert "1 start gfs:home {1.1@0} failed [2.1@1]" in cluster.told()
    cluster.join(2, "gfs:home", 2, serial=2)
    assert "2 start gfs:home {1.1@0,2.2@2} failed [2.1@1]" in cluster.told()
    cluster.release("gfs:home")
    cluster.join(1, "gfs:home", 2, serial=3)
    assert "1 start gfs:home {1.1@0,1.3@1,2.2@2} failed []" in cluster.told()


def test_what_joined_and_failed_after_a_round_began_outlives_its_finish() -> None:
    cluster = active(1, 2)
    cluster.join(1, "gfs:home", 2)
    group = cluster.lifts[1].groups["gfs:home"]
    round = group.round(100)
    newcomer = MemberId(2, 100, 7)
    joined = group.with_member(newcomer, "host2:7", b"ticket", ProcessId(9, 9, "boot"))
    assert joined is not None
    failed = joined.without(frozenset((newcomer,)), clean=False).finished(round).failed()
    assert [(entry.member, entry.slot) for entry in failed] == [(newcomer, 1)]


def test_a_broken_session_makes_a_new_round_with_the_same_members() -> None:
    cluster = active(1, 2)
    one, two = cluster.join(1, "dlm:home", 1), cluster.join(2, "dlm:home", 1)
    before = cluster.lifts[1].rounds["dlm:home"].id
    cluster.told()
    cluster.step(2, LocalReach(two, "dlm:home", one, down=True))
    cluster.settle()
    assert "1 start dlm:home {1.1@0,2.1@1} failed []" in cluster.told()
    assert cluster.lifts[1].rounds["dlm:home"].id > before


def test_of_two_that_cannot_talk_the_higher_is_evicted_once() -> None:
    cluster = active(1, 2)
    one, two = cluster.join(1, "dlm:home", 1), cluster.join(2, "dlm:home", 1)
    cluster.step(2, LocalReach(two, "dlm:home", one, down=True))
    cluster.step(1, LocalReach(one, "dlm:home", two, down=True))
    cluster.settle()
    cluster.told()
    assert cluster.lifts[1].deadline == RECOVER
    cluster.now = RECOVER
    cluster.step(1, TICK)
    cluster.settle()
    assert [line for line in cluster.told() if "evict" in line] == [
        "2 evict 2.1: it and 1.1 of dlm:home could not talk for 2 s"
    ]


def test_of_two_that_cannot_talk_the_one_whom_others_cannot_reach_either_is_evicted() -> None:
    # 1 waits for 2 and says nothing to 3, so only 3 has found out that those two cannot talk either.
    cluster = active(1, 2, 3)
    one, two, three = (cluster.join(node, "dlm:home", 1) for node in (1, 2, 3))
    cluster.step(1, LocalReach(one, "dlm:home", two, down=True))
    cluster.step(2, LocalReach(two, "dlm:home", one, down=True))
    cluster.step(3, LocalReach(three, "dlm:home", one, down=True))
    cluster.settle()
    cluster.told()
    cluster.now = RECOVER
    cluster.step(1, TICK)
    cluster.settle()
    assert [line for line in cluster.told() if "evict" in line] == [
        "1 evict 1.1: it and 2.1 of dlm:home could not talk for 2 s"
    ]


def test_a_join_while_a_round_finishes_is_counted_from_that_round() -> None:
    cluster = active(1, 2)
    cluster.join(1, "dlm:home", 1)
    cluster.held.add("dlm:home")
    cluster.join(2, "dlm:home", 1)
    cluster.held.clear()
    cluster.told()
    waiting, cluster.waiting = cluster.waiting, []
    for node, event in waiting:
        cluster.step(node, event)
    cluster.join(2, "dlm:home", 1, serial=2)
    group = cluster.lifts[1].groups["dlm:home"]
    assert group == cluster.lifts[2].groups["dlm:home"]
    assert len(group.baseline) == 3


def test_a_departed_member_stays_out_though_the_coordinator_hears_its_own_rounds_late() -> None:
    cluster = active(1, 2, 3)
    one, two, three = [cluster.join(node, "dlm:home", 1) for node in (1, 2, 3)]
    cluster.late.add((1, 1))  # a Begin leaves for others as soon as for the coordinator itself
    cluster.step(2, LocalReach(two, "dlm:home", three, down=True))
    cluster.settle()  # a round with all three
    cluster.step(3, LocalGone(three))
    cluster.settle()  # a round without the third
    cluster.deliver(1, 1, 1)
    cluster.step(2, LocalReach(two, "dlm:home", three, down=True))
    cluster.settle()
    cluster.late.clear()
    cluster.settle()
    assert {node: cluster.lifts[node].rounds["dlm:home"].member_ids for node in (1, 2, 3)} == {
        1: (one, two),
        2: (one, two),
        3: (one, two),
    }
    assert cluster.lifts[1].waiting_for() == {}


def test_a_departure_told_twice_is_answered_by_its_round() -> None:
    cluster = active(1, 2)
    cluster.join(2, "dlm:home", 1)
    member = cluster.join(2, "gfs:home", 2)
    cluster.held.add("dlm:home")
    cluster.join(1, "dlm:home", 1)  # a round below that takes its time
    cluster.told()
    cluster.step(2, LocalLeave(member, "gfs:home"))
    cluster.settle()
    cluster.join(2, "dlm:other", 1)  # tells everything again
    assert not [line for line in cluster.told() if "left" in line]
    cluster.release("dlm:home")
    assert "2 left gfs:home" in cluster.told()


def test_the_coordinator_takes_in_what_it_orders_before_it_leaves() -> None:
    """So its table is never older than anybody else's, and what it persists comes before what the others start."""
    lift = Cluster(1, 2).lifts[1]
    view = View(ViewId(1, 1), (lift.me, NodeIncarnation(2, 100)), True)
    lift.step(0, Promised(view.id))
    lift.step(0, Installed(view, {}, (), first=True))
    ready = lift.ready()
    assert [(peer.node, type(message)) for peer, message in ready.then_send] == [(2, Begin)]
    assert [type(decision) for decision in ready.emit] == [Stopped, StartFence]
    assert ready.persist[-1].round == 1


def test_what_started_is_attached_though_the_disk_is_slow() -> None:
    lift = active(1).lifts[1]
    member = MemberId(1, 100, 1)
    lift.step(0, LocalJoin(member, "dlm:home", 1, 8, "host1:1", b"ticket", ProcessId(1, 2, "boot")))
    ((_, join),) = lift.ready().then_send
    lift.step(0, Received(lift.me.corrald(), join))
    lift.step(0, Promised(ViewId(2, 1)))
    ready = lift.ready()  # the round waits for the disk, and behind it the answer to the promise
    assert [type(decision) for decision in ready.emit] == [StartGroup, StopAll, Stopped]
    stopped = ready.emit[-1]
    assert stopped.id == ViewId(2, 1)
    assert [group.entry(member) is not None for group in stopped.attachment.table] == [True]
    assert stopped.attachment.state.round == ready.emit[0].round.id


def test_a_departure_is_not_taken_for_done_while_the_join_it_follows_is_under_way() -> None:
    cluster = active(1, 2)
    cluster.join(1, "dlm:home", 1)
    cluster.late.add((2, 1))
    member = cluster.join(2, "dlm:home", 1)
    cluster.step(2, LocalLeave(member, "dlm:home"))
    cluster.told()
    cluster.join(1, "dlm:home", 1, serial=2)  # a round without it, begun before its join arrived
    assert not [line for line in cluster.told() if "left" in line]
    cluster.deliver(2, 1, 1)  # the Join; the Depart is lost with the view
    cluster.queues[2, 1].clear()
    cluster.late.clear()
    cluster.settle()
    cluster.install(1, 2)
    cluster.settle()
    assert "2 left dlm:home" in cluster.told()
    assert cluster.lifts[1].groups["dlm:home"].entry(member) is None


def test_a_leave_of_a_group_that_never_was_joined_is_answered_to_a_member_of_another() -> None:
    cluster = active(1, 2)
    member = cluster.join(2, "dlm:home", 1)
    cluster.step(2, LocalLeave(member, "dlm:other"))
    cluster.settle()
    assert "2 left dlm:other" in cluster.told()


def test_a_join_told_twice_and_refused_once_leaves_no_member_that_nobody_waits_for() -> None:
    cluster = active(1, 2)
    first = cluster.join(1, "gfs:home", 2, slots=1)
    cluster.late.add((2, 1))
    cluster.join(2, "gfs:home", 2, slots=1)
    cluster.join(2, "votes", 1, serial=2)  # tells everything again
    cluster.deliver(2, 1, 1)
    cluster.settle()
    assert "2 refused members have all 1 slots of gfs:home; let one leave first" in cluster.told()
    cluster.step(1, LocalLeave(first, "gfs:home"))
    cluster.settle()
    cluster.late.clear()
    cluster.settle()
    assert not [line for line in cluster.told() if "start gfs:home {2.1" in line]
    assert "gfs:home" not in cluster.lifts[1].groups
    assert cluster.lifts[1].waiting_for() == {}


def test_a_table_with_a_hole_is_not_taken_for_the_newest() -> None:
    cluster = active(1, 2, 3)
    leaver = cluster.join(2, "dlm:home", 1)
    cluster.late.add((1, 3))
    cluster.step(2, LocalLeave(leaver, "dlm:home"))
    cluster.settle()
    cluster.queues[1, 3].clear()  # lost with the session
    cluster.late.clear()
    cluster.join(1, "votes", 1)
    cluster.install(2, 3)
    cluster.settle()
    assert cluster.lifts[3].dropped > 0
    assert "dlm:home" not in cluster.lifts[3].groups


def test_a_round_that_a_member_brought_is_remembered_when_it_has_gone() -> None:
    cluster = active(1, 2)
    cluster.late.update({(1, 2), (2, 1)})
    cluster.join(1, "dlm:home", 1)
    high = cluster.lifts[1].state.round
    assert high > cluster.lifts[2].state.round
    cluster.queues.clear()
    cluster.install(1, 2)
    assert cluster.lifts[2].state.round >= high
