"""The fence engine, stepped by hand."""

import pytest

from corral.api.fence import (
    AGENT,
    EXTERNAL,
    KEYED,
    MANUAL,
    MEMBER,
    OVERRIDE,
    POWERED,
    Device,
    FenceConfig,
    FenceDeferred,
    FenceFailed,
    FenceStarted,
    Method,
    NodeFenced,
    NodeFencing,
)
from corral.base.time import FOREVER
from corral.fence.engine import HELD_MAX
from corral.fence.events import (
    AttemptDone,
    CancelAttempt,
    ExpelNode,
    External,
    FenceRequest,
    ManualAck,
    Refused,
    RoundDone,
    RunAttempt,
    Start,
    Stop,
)
from corral.fence.wire import Attempting, FencePlease, HistoryQuery, HistoryReply, TurnFailed, VictimDone
from tests.unit.fence.bench import Bench, life, make_round, only, two_methods

ONE, TWO, THREE = life(1), life(2), life(3)
AGAIN = life(3, 2)


def bench(me: int = 1, **settings: object) -> Bench:
    return Bench(me, two_methods([1, 2, 3], **settings))


def done(victim=THREE, how=AGENT, by=1, round_id=2) -> VictimDone:
    return VictimDone(round_id, victim, how, POWERED, "power", "fence_apc", by, 5, "", 7)


# --- the plain story -------------------------------------------------------------------------------------------------


def test_a_round_without_victims_is_done_at_once() -> None:
    b = bench()
    assert b.start(1, [ONE, TWO, THREE]) == [RoundDone(1)]
    assert b.engine.deadline == FOREVER


def test_the_lowest_id_fences_and_tells_everybody() -> None:
    b = bench()
    emitted = b.start(2, [ONE, TWO], [THREE])
    run = only(emitted, RunAttempt)
    assert (run.victim, run.method, run.action) == (THREE, "power", "off")
    assert only(emitted, FenceStarted) == FenceStarted(THREE, "power", 1)
    assert [node for node, _ in b.take(Attempting)] == [2]
    assert b.engine.fencing(3)
    assert not b.count(RoundDone)

    emitted = b.answer(True, "off")
    fenced = only(emitted, NodeFenced)
    assert (fenced.how, fenced.proof, fenced.method, fenced.agent, fenced.by) == (
        AGENT,
        POWERED,
        "power",
        "fence_apc",
        1,
    )
    assert emitted[-1] == RoundDone(2)
    assert [node for node, _ in b.take(VictimDone)] == [2]
    assert not b.engine.fencing(3)
    assert b.engine.fenced(THREE)


def test_the_others_defer_and_are_done_when_told() -> None:
    b = bench(2)
    assert b.start(2, [ONE, TWO], [THREE]) == [FenceDeferred(THREE, 1)]
    b.receive(1, Attempting(2, THREE, 0, "power"))
    assert b.engine.fencing(3)
    emitted = b.receive(1, done())
    assert only(emitted, NodeFenced).by == 1
    assert emitted[-1] == RoundDone(2)
    assert not b.engine.fencing(3)


def test_a_joiner_fences_last() -> None:
    b = bench(1)
    b.start(2, [ONE, TWO], [THREE], [ONE])
    assert b.sleep(6) == [FenceDeferred(THREE, 2)]


# --- methods and turns -----------------------------------------------------------------------------------------------


def test_methods_are_tried_in_order_then_the_turn_passes() -> None:
    b = bench()
    b.start(2, [ONE, TWO], [THREE])
    emitted = b.answer(False, "no route")
    assert only(emitted, FenceFailed) == FenceFailed(THREE, "power", 1, "no route", 1)
    assert only(emitted, RunAttempt).method == "storage"
    emitted = b.answer(False, "no array")
    assert only(emitted, FenceDeferred).to == 2
    assert b.take(TurnFailed) == [(2, TurnFailed(2, THREE, 0, "no array"))]
    assert not b.count(RoundDone)


def test_the_second_method_gives_its_own_proof() -> None:
    b = bench()
    b.start(2, [ONE, TWO], [THREE])
    b.answer(False)
    assert only(b.answer(True), NodeFenced).proof == KEYED


def test_the_next_takes_its_turn_and_after_a_rotation_all_wait() -> None:
    b = bench(2, retry_delay=5)
    b.start(2, [ONE, TWO], [THREE])
    assert only(b.receive(1, TurnFailed(2, THREE, 0, "x")), RunAttempt).method == "power"
    b.answer(False)
    b.answer(False)
    assert b.take(TurnFailed) == [(1, TurnFailed(2, THREE, 1, "the agent failed and did not say why"))]
    assert b.sleep(4.9) == []
    assert b.sleep(0.2) == [], "it is node 1's again, which was told once"
    assert "node 1" in b.engine.status(b.now).waits_for


def test_alone_it_tries_for_ever_and_says_so_less_and_less() -> None:
    b = bench(1, retry_delay=1)
    b.start(2, [ONE], [TWO])
    for _ in range(1300):
        b.answer(False, "no route")
        b.answer(False, "no array")
        b.sleep(1)
    told = [event for event in b.emitted if isinstance(event, FenceFailed) and event.method == "power"]
    assert [event.repeats for event in told] == [1, 2, 3, 600, 1200]


def test_a_turn_known_late_is_caught_up() -> None:
    """Node 3's turn 1 ends here before node 1's turn 0: both hear of each other before this node does."""
    b = Bench(2, two_methods([1, 2, 3, 4]))
    b.start(2, [ONE, TWO, THREE], [life(4)], [TWO])  # order 1, 3, 2
    b.sleep(6)
    assert b.receive(3, TurnFailed(2, life(4), 1, "x")) != []
    assert b.count(RunAttempt) == 1  # turn 2 is ours
    b.receive(1, TurnFailed(2, life(4), 0, "x"))
    assert b.engine.status(b.now).dropped == 1


@pytest.mark.parametrize("turn", [0, 1, 3, 1 << 50])
def test_turns_that_cannot_be_the_peers_are_dropped(turn: int) -> None:
    b = bench(1)
    b.start(2, [ONE, TWO], [THREE])
    assert b.receive(2, TurnFailed(2, THREE, turn, "x")) == []
    assert b.receive(2, Attempting(2, THREE, turn, "x")) == []
    assert b.engine.status(b.now).dropped == 2
    assert b.engine.status(b.now).victims[0].turn == 0


def test_no_method_is_a_failure_that_is_told() -> None:
    b = Bench(1, FenceConfig())
    emitted = b.start(2, [ONE, TWO], [THREE])
    assert "no method" in only(emitted, FenceFailed).text
    assert len(b.take(TurnFailed)) == 1


def test_dual_power_is_off_off_then_on_on() -> None:
    method = Method("dual", ["a", "b"], action="reboot")
    devices = [Device("a", "fence_apc"), Device("b", "fence_apc", timeout=30)]
    b = Bench(1, FenceConfig(devices=devices, nodes={3: NodeFencing([method])}))
    off = only(b.start(2, [ONE, TWO], [THREE]), RunAttempt)
    assert [[use.device for use in group] for group in off.groups] == [["a"], ["b"]]
    assert off.timeout_ns == 90_000_000_000
    emitted = b.answer(True)
    on = only(emitted, RunAttempt)
    assert on.action == "on"
    assert RoundDone(2) in emitted, "success is decided by the off phase"
    emitted = b.answer(False, "breaker")
    assert only(emitted, FenceFailed).text == "fenced, but not back on: breaker"


def test_parallel_groups_take_the_longest_timeout() -> None:
    method = Method("dual", [["a", "b"]])
    devices = [Device("a", "fence_apc"), Device("b", "fence_apc", timeout=30)]
    b = Bench(1, FenceConfig(devices=devices, nodes={3: NodeFencing([method])}))
    assert only(b.start(2, [ONE, TWO], [THREE]), RunAttempt).timeout_ns == 60_000_000_000


# --- several victims -------------------------------------------------------------------------------------------------


def test_a_device_works_on_no_more_victims_than_its_limit() -> None:
    config = FenceConfig(
        devices=[Device("pdu", "fence_apc")], nodes={node: NodeFencing([Method("power", ["pdu"])]) for node in (2, 3)}
    )
    b = Bench(1, config)
    assert only(b.start(2, [ONE], [TWO, THREE]), RunAttempt).victim == TWO
    assert only(b.answer(True), RunAttempt).victim == THREE
    assert b.answer(True)[-1] == RoundDone(2)


def test_concurrent_bounds_the_attempts() -> None:
    b = bench(1, concurrent=1)
    assert only(b.start(2, [ONE], [TWO, THREE]), RunAttempt).victim == TWO
    b = bench(1, concurrent=2)
    b.start(2, [ONE], [TWO, THREE])
    assert b.count(RunAttempt) == 2


def test_one_victim_that_cannot_be_fenced_does_not_hold_up_the_other() -> None:
    b = bench(1, concurrent=1)
    b.start(2, [ONE], [TWO, THREE])
    b.answer(False)
    b.answer(False)
    assert b.engine.fencing(3)
    assert only(b.answer(True), NodeFenced).victim == THREE


# --- rejoin ----------------------------------------------------------------------------------------------------------


def test_a_clean_rejoin_averts() -> None:
    b = bench()
    emitted = b.start(2, [ONE, TWO, AGAIN], [THREE], [AGAIN])
    assert only(emitted, NodeFenced).how == MEMBER
    assert emitted[-1] == RoundDone(2)


def test_a_rejoin_that_is_not_clean_does_not() -> None:
    b = bench(post_join_delay=0)
    emitted = b.start(2, [ONE, TWO, AGAIN], [THREE], [AGAIN], clean=[ONE, TWO])
    assert only(emitted, RunAttempt).victim == THREE


def test_the_same_incarnation_is_never_a_victim() -> None:
    b = bench()
    with pytest.raises(AssertionError, match="FENCE-2"):
        b.start(2, [ONE, TWO, THREE], [THREE])


def test_no_fencing_without_quorum() -> None:
    b = bench()
    with pytest.raises(AssertionError, match="FENCE-5"):
        b.step(Start(make_round(1, [ONE]), frozenset(), quorate=False))


# --- abandoned rounds ------------------------------------------------------------------------------------------------


def test_stop_tells_agents_to_stop_and_the_next_round_starts_over() -> None:
    b = bench()
    b.start(2, [ONE, TWO], [THREE])
    assert b.step(Stop()) == [CancelAttempt(1)]
    assert b.engine.fencing(3), "it may still work"
    assert b.start(3, [ONE, TWO], [THREE]) == [], "never two agents on one node"
    emitted = b.answer(False, "stopped")
    assert only(emitted, RunAttempt).method == "power", "the end of an abandoned attempt is no failure"
    assert not b.count(FenceFailed)


def test_a_success_after_stop_is_a_fact() -> None:
    b = bench()
    b.start(2, [ONE, TWO], [THREE])
    b.step(Stop())
    assert only(b.answer(True), NodeFenced).victim == THREE
    assert b.take(VictimDone) == [], "between rounds nobody is told"
    assert b.start(3, [ONE, TWO], [THREE]) == [RoundDone(3)]
    assert [node for node, _ in b.take(VictimDone)] == [2]


def test_a_success_after_its_time_is_none() -> None:
    b = bench(1)
    b.start(2, [ONE, TWO], [THREE])
    emitted = b.sleep(15)
    assert CancelAttempt(1) in emitted
    assert only(emitted, FenceFailed).text == "the agent did not end in time"
    assert b.step(AttemptDone(1, True, "late")) != []  # the second method may begin now
    assert not b.count(NodeFenced)
    assert b.count(RunAttempt) == 2


def test_an_agent_that_never_answers_is_given_up() -> None:
    b = bench(1)
    b.start(2, [ONE, TWO], [THREE])
    b.sleep(20)
    assert b.count(RunAttempt) == 2


def test_whoever_keeps_a_node_waiting_for_an_agent_is_told_when_it_is_given_up() -> None:
    """Else the node would never be let in: `fencing` is asked when something was emitted or came in."""
    b = bench(1)
    b.start(2, [ONE, TWO], [THREE])
    b.step(Stop())
    assert b.engine.fencing(3)
    b.sleep(40)
    assert not b.engine.fencing(3)
    assert "cannot be stopped" in b.emitted[-1].text


def test_done_waits_for_an_abandoned_agent_at_work_on_a_member() -> None:
    b = bench()
    b.start(2, [ONE, TWO], [THREE])
    b.step(Stop())
    emitted = b.start(3, [ONE, TWO, AGAIN], [THREE], [AGAIN])
    assert only(emitted, NodeFenced).how == MEMBER
    assert not b.count(RoundDone)
    assert b.engine.status(b.now).waits_for == "waiting for the abandoned fence agent against node 3 to end"
    assert b.answer(False) == [RoundDone(3)]


def test_an_older_round_is_ignored() -> None:
    b = bench()
    b.start(3, [ONE, TWO, THREE])
    assert b.start(3, [ONE, TWO], [THREE]) == []
    assert b.engine.status(b.now).dropped == 1


def test_messages_of_another_round_or_a_stranger_are_dropped_but_facts_are_taken() -> None:
    b = bench(2)
    b.start(2, [ONE, TWO], [THREE])
    assert b.receive(1, TurnFailed(1, THREE, 0, "x")) == []
    b.lives[4] = life(4)
    assert b.receive(4, done()) == []
    assert b.engine.status(b.now).dropped == 2
    assert b.receive(1, done(round_id=1))[-1] == RoundDone(2)


def test_what_comes_before_the_round_begins_here_is_held() -> None:
    """Also from a member that is none here yet."""
    b = bench(2)
    b.start(2, [ONE, TWO])
    b.lives[3] = AGAIN
    four = life(4)
    assert b.receive(1, TurnFailed(3, four, 0, "x")) == []
    assert b.receive(3, done(four, round_id=3)) == []
    b.step(Stop())
    emitted = b.start(3, [ONE, TWO, AGAIN], [four], [AGAIN])
    assert only(emitted, NodeFenced).victim == four
    assert emitted[-1] == RoundDone(3)
    assert b.engine.status(b.now).dropped == 0


def test_what_is_held_is_bounded() -> None:
    b = bench(2)
    b.start(2, [ONE, TWO])
    for _ in range(HELD_MAX + 5):
        b.receive(1, TurnFailed(9, THREE, 0, "x"))
    assert b.engine.status(b.now).dropped == 5


def test_nobody_is_believed_that_a_member_is_fenced() -> None:
    b = bench(2)
    b.start(2, [ONE, TWO, THREE])
    assert b.receive(1, done()) == []
    assert not b.engine.fenced(THREE)


# --- delays ----------------------------------------------------------------------------------------------------------


def test_post_fail_delay_and_the_delay_of_a_node_are_waited() -> None:
    config = FenceConfig(
        devices=[Device("pdu", "fence_apc")],
        nodes={2: NodeFencing([Method("power", ["pdu"])], delay=3)},
        post_fail_delay=2,
    )
    b = Bench(1, config)
    assert b.start(2, [ONE], [TWO]) == []
    assert b.sleep(4.9) == []
    assert b.engine.status(b.now).waits_for == "node 2 failed; it is fenced in 0.1 s unless it joins clean before"
    assert only(b.sleep(0.1), RunAttempt)


def test_a_delay_runs_on_over_abandoned_rounds() -> None:
    b = bench(post_fail_delay=3)
    b.start(2, [ONE, TWO], [THREE])
    b.sleep(2)
    b.step(Stop())
    b.start(3, [ONE, TWO], [THREE])
    assert b.sleep(0.9) == []
    assert only(b.sleep(0.1), RunAttempt)


def test_when_a_victim_comes_back_the_others_get_post_join_delay_again() -> None:
    b = bench(post_fail_delay=3, post_join_delay=6)
    b.start(2, [ONE], [TWO, THREE])
    b.sleep(2)
    b.step(Stop())
    b.start(3, [ONE, AGAIN], [TWO, THREE], [AGAIN])
    assert b.sleep(5.9) == []
    assert only(b.sleep(0.1), RunAttempt).victim == TWO


def test_startup_victims_wait_and_are_forgotten_when_all_have_joined() -> None:
    """fenced(8)'s story: nodes that start together must not fence each other."""
    b = bench(post_join_delay=6)
    assert b.start(1, [ONE, TWO], [], [ONE, TWO], startup=True, absent=(3,)) == []
    b.sleep(5)
    b.step(Stop())
    assert b.start(2, [ONE, TWO, THREE], [], [ONE, TWO, THREE], startup=True) == [RoundDone(2)]
    assert not b.count(RunAttempt)


def test_startup_victims_that_stay_away_are_fenced() -> None:
    b = bench(post_join_delay=6)
    b.start(1, [ONE, TWO], [], [ONE, TWO], startup=True, absent=(3,))
    assert only(b.sleep(6), RunAttempt).victim == life(3, 0)
    assert b.answer(True)[-1] == RoundDone(1)


def test_a_member_that_did_not_join_clean_is_a_startup_victim_too() -> None:
    b = bench(post_join_delay=0)
    emitted = b.start(1, [ONE, TWO], [], [ONE, TWO], clean=[ONE], startup=True)
    assert only(emitted, RunAttempt).victim == life(2, 0)


def test_startup_fencing_can_be_left_to_the_operator() -> None:
    b = bench(startup=False)
    assert b.start(1, [ONE, TWO], [], [ONE, TWO], startup=True, absent=(3,)) == [RoundDone(1)]


def test_minus_one_waits_for_ever_for_nodes_never_seen_only() -> None:
    b = bench(post_join_delay=-1)
    assert b.start(1, [ONE], [], [ONE], startup=True, absent=(2, 3)) == []
    assert b.engine.deadline == FOREVER
    assert "post_join_delay is -1" in b.engine.status(b.now).waits_for
    b.step(Stop())
    assert only(b.start(2, [ONE, TWO], [THREE], [TWO]), RunAttempt)


# --- people and services ---------------------------------------------------------------------------------------------


def test_an_operators_word_ends_the_wait_and_stops_the_agent() -> None:
    b = bench()
    b.start(2, [ONE, TWO], [THREE])
    emitted = b.step(ManualAck(life(3, 0), "ann: pulled the plug", 1_700_000_000))
    fenced = only(emitted, NodeFenced)
    assert (fenced.how, fenced.proof, fenced.text, fenced.wall_seconds) == (
        OVERRIDE,
        MANUAL,
        "ann: pulled the plug",
        1_700_000_000,
    )
    assert CancelAttempt(1) in emitted
    assert emitted[-1] == RoundDone(2)
    assert [node for node, _ in b.take(VictimDone)] == [2]


def test_a_word_about_nobody_is_refused() -> None:
    b = bench()
    b.start(2, [ONE, TWO], [THREE])
    assert b.step(ManualAck(TWO, "ann")) == [Refused(TWO, "node 2 is not waiting to be fenced")]
    assert b.step(External(TWO, POWERED, "x")) == [Refused(TWO, "node 2 is not waiting to be fenced")]


def test_fenced_from_outside() -> None:
    b = bench()
    b.start(2, [ONE, TWO], [THREE])
    assert only(b.step(External(THREE, POWERED, "pacemaker")), NodeFenced).how == EXTERNAL


def test_a_request_against_a_member_expels_it_first() -> None:
    b = bench()
    b.start(2, [ONE, TWO, THREE])
    assert b.step(FenceRequest(life(3, 0), "hangs")) == [ExpelNode(THREE, "hangs")]
    assert not b.count(RunAttempt)
    assert b.take(FencePlease) == [(2, FencePlease(2, THREE, "hangs")), (3, FencePlease(2, THREE, "hangs"))]


def test_every_member_but_the_victim_hears_whom_to_leave_out() -> None:
    please = FencePlease(2, THREE, "hangs")
    other, victim = bench(2), bench(3)
    for b in (other, victim):
        b.start(2, [ONE, TWO, THREE])
    assert other.receive(1, please) == [ExpelNode(THREE, "hangs")]
    assert victim.receive(1, please) == []
    assert isinstance(only(victim.step(FenceRequest(life(3, 0), "me")), Refused), Refused), "it asks another node"


def test_a_request_ends_the_delay_everywhere() -> None:
    b = bench(2, post_fail_delay=30)
    b.start(2, [ONE, TWO], [THREE])
    b.step(FenceRequest(life(3, 0), "now"))
    assert b.take(FencePlease) == [(1, FencePlease(2, life(3, 0), "now"))]
    other = bench(1, post_fail_delay=30)
    other.start(2, [ONE, TWO], [THREE])
    assert only(other.receive(2, FencePlease(2, life(3, 0), "now")), RunAttempt).victim == THREE


def test_a_request_against_an_absent_node_runs_beside_the_round() -> None:
    b = bench()
    assert b.start(2, [ONE, TWO]) == [RoundDone(2)]
    assert only(b.step(FenceRequest(life(3, 0), "test")), RunAttempt).victim == life(3, 0)
    b.step(Stop())
    b.answer(False)
    assert only(b.start(3, [ONE, TWO]), RunAttempt).victim == life(3, 0), "kept over rounds"
    assert only(b.answer(True), NodeFenced)


def test_an_absent_node_can_be_fenced_again_on_request() -> None:
    b = bench()
    b.start(2, [ONE, TWO])
    for _ in range(2):
        assert only(b.step(FenceRequest(life(3, 0), "test")), RunAttempt).victim == life(3, 0)
        assert only(b.answer(True), NodeFenced)
    b.step(FenceRequest(THREE, "test"))
    b.answer(True)
    assert "fenced already" in only(b.step(FenceRequest(THREE, "test")), Refused).text


def test_a_fact_about_no_victim_of_ours_is_history() -> None:
    b = bench(2)
    b.start(2, [ONE, TWO])
    assert b.receive(1, done()) == []
    assert not b.engine.fenced(THREE)
    assert [entry.victim for entry in b.engine.status(b.now).history] == [THREE]


def test_requests_that_make_no_sense_are_refused() -> None:
    b = bench()
    assert "quorate" in only(b.step(FenceRequest(THREE, "x")), Refused).text
    b.start(2, [ONE, TWO])
    assert "not configured" in only(b.step(FenceRequest(life(9), "x")), Refused).text


def test_joiners_ask_for_the_history() -> None:
    b = bench(2)
    b.start(2, [ONE, TWO], [], [TWO])
    assert b.take(HistoryQuery) == [(1, HistoryQuery(2))]
    b.receive(1, HistoryReply(2, [done()]))
    assert [entry.victim for entry in b.engine.status(b.now).history] == [THREE]
    assert not b.engine.fenced(THREE), "history decides nothing"
    one = bench(1)
    one.start(2, [ONE, TWO], [THREE])
    one.answer(True)
    one.receive(2, HistoryQuery(2))
    assert [fact.victim for fact in one.take(HistoryReply)[0][1].facts] == [THREE]


def test_status_says_what_is_waited_for() -> None:
    b = bench(2, post_fail_delay=0)
    b.start(2, [ONE, TWO], [THREE])
    assert b.engine.status(b.now).waits_for == "waiting for node 1 to fence node 3"
    b.receive(1, Attempting(2, THREE, 0, "power"))
    assert b.engine.status(b.now).waits_for == "waiting for node 1 to fence node 3 by power"
    b.receive(1, TurnFailed(2, THREE, 0, "dead"))
    b.now += 2_000_000_000
    assert "agent fence_apc here to fence node 3 by power, 2.0 s" in b.engine.status(b.now).waits_for
    b.answer(False, "no route")
    b.answer(False, "no array")
    assert "failed (no array); next try in 5.0 s" in b.engine.status(b.now).waits_for
    assert "corral fence ack 3" in b.engine.status(b.now).waits_for
    b.step(Stop())
    assert "quorate view" in b.engine.status(b.now).waits_for
