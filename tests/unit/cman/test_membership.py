"""The agreement, step by step: what is promised, accepted, installed, and what is refused."""

from typing import Any

import pytest

from corral.base.engine import TICK, Received
from corral.base.ids import MemberId, NodeIncarnation, ViewId
from corral.base.view import View
from corral.cman.events import (
    Accepted,
    Active,
    Attach,
    CleanlyStopped,
    Excluded,
    Expel,
    FencingNow,
    FlagsChanged,
    Installed,
    KnownElsewhere,
    Leave,
    Left,
    Outdated,
    RecordChanged,
    ServicesStopped,
    Stop,
)
from corral.cman.state import recover
from corral.cman.wire import (
    ATTACHMENT_MAX,
    DISPLACING,
    EPOCH_MAX,
    PROMISED,
    UNREACHABLE,
    WAIT,
    WILLING,
    Accept,
    AcceptedView,
    Carried,
    CleanStop,
    Forgotten,
    Install,
    InstalledView,
    Nack,
    Prepare,
    Promise,
    Promised,
    Propose,
    RecordHeld,
    Reform,
    Removed,
    Status,
)
from tests.unit.cman.bench import START, TIMING, Bench


def life(node: int, incarnation: int = 10) -> NodeIncarnation:
    return NodeIncarnation(node, incarnation)


def lives(*nodes: int) -> tuple[NodeIncarnation, ...]:
    return tuple(life(node) for node in nodes)


# --- forming ---------------------------------------------------------------------------------------------------------


def test_nodes_that_start_together_make_one_view() -> None:
    bench = Bench()
    bench.start(1, 2, 3)
    bench.link_all()
    bench.deliver()
    installed = [bench.installed(node) for node in (1, 2, 3)]
    assert installed[0] == installed[1] == installed[2], "the same event, attachments too"
    assert installed[0].view == View(ViewId(1, 1), lives(1, 2, 3), True)
    assert installed[0].attachments == tuple((life(n), f"of {n}".encode()) for n in (1, 2, 3))
    assert bench.now == START


def test_the_first_view_waits_a_while_for_configured_nodes() -> None:
    bench = Bench()
    bench.start(1, 2)
    bench.link_all()
    bench.sleep(TIMING.form_ns - 1)
    assert bench[1].view is None
    bench.sleep(1)
    assert bench.installed(1).view.nodes == (1, 2)


def test_a_component_without_quorum_forms_its_inquorate_view() -> None:
    bench = Bench()
    bench.start(3)
    bench.tell_links()
    bench.sleep()
    assert bench.installed(3).view == View(ViewId(1, 3), lives(3), False)
    assert bench[3].waiting() == "for a quorum of votes"


def test_quiet_nodes_do_not_vote_and_a_new_view_counts_them_when_they_may() -> None:
    bench = Bench()
    bench.quiet = {1, 2, 3}
    bench.start(1, 2, 3)
    bench.link_all()
    bench.deliver()
    assert not bench.installed(1).view.quorate
    bench.quiet = {3}
    bench.tell_links()
    bench.sleep()
    assert bench.installed(3).view == View(ViewId(2, 1), lives(1, 2, 3), True)


def test_a_promise_is_durable_before_it_leaves_and_everything_stops() -> None:
    bench = Bench()
    bench.start(1, 2)
    bench.link((1, 2))
    bench.now += TIMING.form_ns
    engine = bench[1]
    engine.step(bench.now, Active(ViewId(0, 0)))
    ready = engine.ready()
    assert ready.persist == [Promised(ViewId(1, 1))]
    assert ready.send == []
    assert [message for _, message in ready.then_send] == [Prepare(1, lives(1, 2))]
    assert ready.emit == [Stop(ViewId(1, 1))]


def test_a_promise_leaves_when_everything_has_stopped() -> None:
    bench = Bench()
    bench.start(1, 2)
    bench.link((1, 2))
    bench.now += TIMING.form_ns
    bench.step(1, TICK)
    engine = bench[2]
    engine.step(bench.now, Received(MemberId(1, 10, 0), Prepare(1, lives(1, 2))))
    ready = engine.ready()
    assert ready.emit == [Stop(ViewId(1, 1))]
    assert ready.then_send == []
    engine.step(bench.now, Attach(ViewId(0, 0), b"of another promise"))
    assert engine.ready().then_send == []
    engine.step(bench.now, Attach(ViewId(1, 1), b"what stopped"))
    ((_, promise),) = engine.ready().then_send
    assert (promise.epoch, promise.attachment) == (1, b"what stopped")


def test_an_acceptance_is_durable_before_it_leaves() -> None:
    bench = Bench()
    bench.start(1, 2, 3)
    bench.link_all()
    bench.deliver(Prepare)
    bench.deliver(Promise)
    (proposal,) = {message.view.id: message for message in bench.sent(1, Propose)}.values()
    assert isinstance(bench.logs[1][-1], AcceptedView), "the coordinator accepts first"
    engine = bench[2]
    engine.step(bench.now, _received(1, proposal))
    ready = engine.ready()
    assert [type(record) for record in ready.persist] == [AcceptedView]
    assert ready.then_send == [(MemberId(1, 10, 0), Accept(proposal.view.id))]
    assert Accepted(proposal.view) in ready.emit
    assert ready.send == []


def _received(sender: int, message: Any, incarnation: int = 10) -> Any:

    return Received(MemberId(sender, incarnation, 0), message)


def test_nothing_is_installed_before_the_last_acceptance() -> None:
    bench = Bench()
    bench.start(1, 2, 3)
    bench.link_all()
    bench.deliver(Prepare)
    bench.deliver(Promise)
    bench.deliver(Propose)
    held = bench.drop(Accept)
    bench.hear(1, 2, held[0][2])
    assert bench[1].view is None
    bench.hear(1, 3, held[1][2])
    assert bench[1].view is not None


# --- losing and joining ----------------------------------------------------------------------------------------------


def test_a_lost_link_acts_at_once() -> None:
    bench = Bench().whole()
    before = bench.now
    bench.kill(3)
    bench.deliver()
    assert bench.now == before
    for node in (1, 2):
        event = bench.installed(node)
        assert event.view == View(ViewId(2, 1), lives(1, 2), True)
        assert event.accepted[-1].members == lives(1, 2, 3), "who was there before"


def test_a_joiner_waits_for_others_that_join_with_it() -> None:
    bench = Bench(5)
    bench.start(1, 2, 3)
    bench.link_all()
    bench.sleep()
    bench.start(4)
    bench.link((1, 4), (2, 4), (3, 4))
    bench.sleep(TIMING.settle_ns // 2)
    bench.start(5)
    bench.link((1, 5), (2, 5), (3, 5), (4, 5))
    bench.sleep(2 * TIMING.settle_ns)
    views = [event.view.nodes for event in bench.take(1, Installed)]
    assert views == [(1, 2, 3), (1, 2, 3, 4, 5)]


def test_a_returned_node_is_another_incarnation_although_it_was_never_seen_absent() -> None:
    bench = Bench().whole()
    del bench.engines[3]
    bench.start(3, incarnation=11)
    bench.link((1, 3), (2, 3))
    bench.sleep()
    event = bench.installed(1)
    assert event.view.members == (life(1), life(2), life(3, 11))


def test_a_coordinator_that_dies_after_proposing_leaves_its_view_counted_as_possibly_installed() -> None:
    bench = Bench().whole()
    bench.unlink((1, 3), (2, 3))
    bench.deliver(Prepare)
    bench.deliver(Promise)
    bench.deliver(Propose)
    bench.drop(Accept)
    assert bench.take(2, Accepted) == [Accepted(View(ViewId(2, 1), lives(1, 2), True))]
    bench.kill(1)
    bench.link((2, 3))
    bench.deliver()
    assert bench.take(3, Excluded) == [Excluded(View(ViewId(2, 1), lives(1, 2), True))], "1 may have installed it"
    bench.kill(3)
    bench.start(3, incarnation=11)
    bench.link((2, 3))
    bench.sleep(2 * TIMING.recover_ns)
    event = bench.installed(2)
    assert event.view.members == (life(2), life(3, 11))
    assert event.view.id.epoch > 2
    assert View(ViewId(2, 1), lives(1, 2), True) in event.accepted


def test_a_member_lost_in_the_agreement_is_left_out_of_the_next_attempt() -> None:
    bench = Bench().whole()
    bench.kill(3)
    bench.deliver(Prepare)
    bench.kill(2)
    bench.deliver()
    assert bench[1].view is not None
    assert bench[1].view.nodes == (1,)
    assert not bench[1].view.quorate


def test_a_broken_session_between_members_makes_a_new_view_of_the_same_members() -> None:
    bench = Bench().whole()
    bench.peer_down(2, 3)
    bench.link((2, 3))
    bench.sleep()
    assert bench.installed(1).view == View(ViewId(2, 1), lives(1, 2, 3), True)


def test_an_install_lost_with_its_session_comes_again_with_the_next() -> None:
    bench = Bench()
    bench.start(1, 2)
    bench.link((1, 2))
    bench.now += TIMING.form_ns
    bench.step(1, Active(ViewId(0, 0)))
    bench.deliver(Prepare)
    bench.deliver(Promise)
    bench.deliver(Propose)
    bench.deliver(Accept)
    bench.drop(Install)
    assert bench[2].stopped
    bench.peer_down(1, 2)
    bench.link((1, 2))
    assert not bench[2].stopped or bench[2].state.promised.epoch > 1
    bench.sleep()
    assert bench[1].view == bench[2].view


def test_a_stopped_member_asks_until_it_is_in_a_view_again() -> None:
    """1 began an attempt and died; only 3 had promised. 2, the next coordinator, does not know."""
    bench = Bench()
    bench.start(2, 3)
    bench.link_all()
    bench.sleep()
    bench.start(1)
    bench.link((1, 2), (1, 3))
    bench.drop(Prepare)
    bench.hear(3, 1, Prepare(7, lives(1, 2, 3)))
    assert bench[3].stopped
    bench.drop(Promise)
    bench.kill(1)
    bench.sleep(2 * TIMING.detect_ns)
    assert bench[2].view == bench[3].view
    assert bench[2].view is not None
    assert bench[2].view.id.epoch > 7
    assert not bench[3].stopped


# --- refusing --------------------------------------------------------------------------------------------------------


def nack_of(bench: Bench, node: int) -> Nack:
    (nack,) = bench.sent(node, Nack)
    return nack  # type: ignore[no-any-return]


def test_an_epoch_not_above_the_promised_one_is_refused() -> None:
    bench = Bench().whole()
    bench.hear(3, 1, Prepare(1, lives(1, 2, 3)))
    assert nack_of(bench, 3) == Nack(1, ViewId(1, 1), PROMISED)
    assert not bench[3].stopped


def test_a_proposal_that_was_not_promised_is_refused_and_nothing_written() -> None:
    bench = Bench().whole()
    proposal = Propose(
        View(ViewId(9, 1), lives(1, 2, 3), True),
        bench.record,
        tuple(Carried(member, 0, b"") for member in lives(1, 2, 3)),
        (),
        (),
        ViewId(0, 0),
    )
    length = len(bench.logs[3])
    bench.hear(3, 1, proposal)
    assert nack_of(bench, 3).promised == ViewId(1, 1)
    assert len(bench.logs[3]) == length
    assert not bench.take(3, Accepted)


def test_a_newer_promise_makes_the_older_proposal_void() -> None:
    bench = Bench()
    bench.start(1, 2, 3)
    bench.link_all()
    bench.deliver(Prepare)
    bench.deliver(Promise)
    bench.hear(3, 2, Prepare(5, lives(2, 3)))  # 2 gave 1 up
    bench.drop(Promise)
    bench.deliver(Propose)
    assert not [record for record in bench.logs[3] if isinstance(record, AcceptedView)]
    assert nack_of(bench, 3).promised == ViewId(5, 2)


def test_a_member_without_a_link_to_another_refuses() -> None:
    bench = Bench(4)
    bench.start(1, 2, 3)
    bench.link_all()
    bench.sleep()
    bench.hear(3, 1, Prepare(5, lives(1, 2, 3, 4)))
    assert nack_of(bench, 3).reason == UNREACHABLE


def test_a_newcomer_cannot_displace_a_member_of_a_quorate_view() -> None:
    bench = Bench()
    bench.start(2, 3)
    bench.link_all()
    bench.sleep()
    bench.start(1)
    bench.link((1, 2))  # 1 and 3 do not hear each other
    bench.hear(2, 1, Prepare(9, lives(1, 2)))
    assert nack_of(bench, 2).reason == DISPLACING
    bench.sleep(2 * TIMING.recover_ns)
    assert bench[2].view is not None
    assert bench[2].view.nodes == (2, 3)
    assert bench[2].view.id.epoch == 1, "and did not even stop it"
    bench.link((1, 3))
    bench.sleep(2 * TIMING.detect_ns)
    assert bench[2].view.nodes == (1, 2, 3)


@pytest.mark.parametrize(
    "message",
    [
        Prepare(0, lives(1, 2, 3)),
        Prepare(EPOCH_MAX, lives(1, 2, 3)),
        Prepare(5, ()),
        Prepare(5, lives(3, 2, 1)),
        Prepare(5, (life(1), life(1), life(3))),
        Prepare(5, lives(2, 3)),  # 1 proposes what it is not part of
        Prepare(5, tuple(life(n) for n in range(1, 60))),
        Status(ViewId(EPOCH_MAX, 1), ViewId(0, 0), None, 0),
        Status(ViewId(1, 1), ViewId(1, 1), View(ViewId(9, 1), lives(1, 2), False), 0),
        Status(ViewId(1, 1), ViewId(1, 1), View(ViewId(9, 1), lives(2, 1), True), 0),
        Propose(View(ViewId(2, 2), lives(1, 2, 3), True), None, (), (), (), ViewId(0, 0)),  # type: ignore[arg-type]
    ],
    ids=lambda message: f"{type(message).__name__}",
)
def test_what_is_not_as_it_should_be_is_counted_and_dropped(message: Any) -> None:
    bench = Bench().whole()
    length = len(bench.logs[3])
    bench[3].step(bench.now, _received(1, message))
    bench.act(3)
    assert bench[3].dropped == 1
    assert len(bench.logs[3]) == length
    assert not bench[3].stopped


def test_a_promise_with_an_oversize_attachment_is_dropped() -> None:
    bench = Bench()
    bench.start(1, 2, 3)
    bench.link_all()
    bench.deliver(Prepare)
    for sender, _, promise in bench.drop(Promise):
        fat = Promise(promise.epoch, (), (), ViewId(0, 0), ViewId(0, 0), None, 0, bytes(ATTACHMENT_MAX + 1))
        bench.hear(1, sender, fat)
    assert bench[1].dropped == 2
    assert bench.sent(1, Propose) == []


def test_messages_outside_a_session_or_of_another_incarnation_are_dropped() -> None:
    bench = Bench().whole()
    bench[3].step(bench.now, _received(1, Prepare(9, lives(1, 2, 3)), incarnation=9))
    bench[3].step(bench.now, _received(77, Prepare(9, lives(1, 2, 3))))
    assert bench[3].dropped == 2


def test_answers_nobody_asked_for_change_nothing() -> None:
    bench = Bench().whole()
    for message in (
        Accept(ViewId(1, 1)),
        Accept(ViewId(8, 1)),
        Install(ViewId(8, 1)),
        Install(ViewId(1, 1)),
        Nack(3, ViewId(3, 2), PROMISED),
        Promise(1, (), (), ViewId(0, 0), ViewId(0, 0), bench.record, 0, b""),
        Removed(ViewId(1, 1)),
        Reform(ViewId(1, 1), False),
        Reform(ViewId(-4, 1), True),
    ):
        bench.hear(1, 2, message)
    assert not bench[1].stopped
    assert bench[1].state.promised == ViewId(1, 1)
    assert bench.events[1] == []


# --- exclusion and merging -------------------------------------------------------------------------------------------


def test_a_node_left_out_of_a_quorate_view_learns_it_once_and_comes_back_as_another() -> None:
    bench = Bench().whole()
    bench.deaf = {3}
    bench.unlink((1, 3), (2, 3))
    bench.deliver()
    assert bench[3].view is not None
    assert bench[3].view.nodes == (3,), "alone and inquorate, it did not hear of the others' view yet"
    bench.deaf = set()
    bench.link((1, 3), (2, 3))
    bench.sleep()
    assert len(bench.take(3, Excluded)) == 1
    assert bench[3].stopped
    assert bench[1].view is not None
    assert bench[1].view.nodes == (1, 2)
    bench.kill(3)
    bench.start(3, incarnation=11)
    bench.link((1, 3), (2, 3))
    bench.sleep(TIMING.recover_ns - 1)
    assert bench[1].view.nodes == (1, 2), "not before its links were whole for `recover`"
    bench.sleep(TIMING.detect_ns)
    assert bench[1].view.members == (life(1), life(2), life(3, 11))


def test_nodes_that_were_only_inquorate_go_on_together_without_restart() -> None:
    bench = Bench().whole()
    bench.unlink((1, 2), (1, 3), (2, 3))
    bench.deliver()
    for node in (1, 2, 3):
        view = bench[node].view
        assert view is not None
        assert view.nodes == (node,)
        assert not view.quorate
    bench.link_all()
    bench.sleep(2 * TIMING.detect_ns)
    for node in (1, 2, 3):
        assert bench.take(node, Excluded) == []
        assert bench.installed(node).view.members == lives(1, 2, 3)


def test_partitions_share_no_epoch_when_both_were_quorate_in_turn() -> None:
    bench = Bench().whole()
    bench.unlink((1, 2), (1, 3), (2, 3))
    bench.deliver()
    bench.link((2, 3))
    bench.sleep()
    quorate = bench.installed(2).view
    assert quorate.quorate
    bench.link((1, 2), (1, 3))
    bench.sleep()
    assert bench.take(1, Excluded) == [Excluded(quorate)]


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_node_without_memory_gets_it_from_an_installed_quorate_view_that_does_not_count_it() -> None:
    bench = Bench(forgetful=(3,))
    bench.start(1, 2, 3)
    bench.link_all()
    bench.deliver()
    event = bench.installed(3)
    assert event.view.quorate
    assert event.unclean == (life(3),), "it averts no fence"
    assert bench.take(3, RecordChanged) == [RecordChanged(bench.record)]
    kinds = [type(record) for record in bench.logs[3]]
    assert kinds.index(RecordHeld) > kinds.index(InstalledView)


def test_it_makes_no_quorum_and_an_inquorate_view_gives_no_memory() -> None:
    bench = Bench(forgetful=(2, 3))
    bench.start(1, 2, 3)
    bench.link_all()
    bench.deliver()
    assert not bench.installed(3).view.quorate
    assert bench[3].state.record is None


def test_a_cluster_that_forgot_everything_makes_no_view_and_says_what_helps() -> None:
    bench = Bench(forgetful=(1, 2, 3))
    bench.start(1, 2, 3)
    bench.link_all()
    bench.sleep(10 * TIMING.recover_ns)
    assert [bench[node].view for node in (1, 2, 3)] == [None] * 3
    assert "corral init" in bench[1].waiting()


def test_the_lowest_id_with_a_memory_coordinates() -> None:
    bench = Bench(forgetful=(1,))
    bench.start(1, 2, 3)
    bench.link_all()
    bench.deliver()
    assert bench.installed(1).view == View(ViewId(1, 2), lives(1, 2, 3), True)


@pytest.mark.parametrize("known", [10, 11])
def test_an_incarnation_that_others_hold_already_is_given_up(known: int) -> None:
    bench = Bench()
    bench.start(1, 2)
    bench.link((1, 2))
    status = Status(ViewId(3, 1), ViewId(3, 1), None, known)
    fresh = Bench()
    fresh.start(1, 2)
    fresh.link((1, 2))
    fresh.hear(2, 1, status)
    assert fresh.take(2, Outdated) == [Outdated(known)]
    assert fresh.logs[2][-1] == Forgotten(known)
    fresh.sleep(2 * TIMING.recover_ns)
    assert fresh[2].view is None


def test_its_own_promises_explain_why_others_hold_an_incarnation() -> None:
    bench = Bench().whole()
    bench.hear(2, 1, Status(ViewId(1, 1), ViewId(1, 1), None, 10, 1))
    assert bench.take(2, Outdated) == []


def test_a_promise_of_this_life_does_not_explain_an_older_view() -> None:
    """Its first promise was for epoch 1: a view below that had it before its state was lost."""
    bench = Bench().whole()
    bench.hear(2, 1, Status(ViewId(1, 1), ViewId(1, 1), None, 10, 0))
    assert bench.take(2, Outdated) == [Outdated(10)]


def test_a_higher_incarnation_that_comm_hears_of_ends_this_life() -> None:
    """Its hellos are refused, so no Status will ever tell it."""
    bench = Bench()
    bench.start(2)
    bench.step(2, KnownElsewhere(10))
    assert bench.take(2, Outdated) == []
    bench.step(2, KnownElsewhere(12), KnownElsewhere(13))
    assert bench.take(2, Outdated) == [Outdated(12)]
    assert bench.logs[2][-1] == Forgotten(12)
    after = recover(bench.logs[2])
    assert (after.next_incarnation(0), after.record) == (13, None), "above it, and without memory"


# --- fencing ---------------------------------------------------------------------------------------------------------


def joiner_3(*fencing: int) -> Bench:
    """1 and 2 are a view; 3 comes back while those nodes know that an agent works on it."""
    bench = Bench()
    bench.start(1, 2)
    bench.link_all()
    bench.sleep()
    for node in fencing:
        bench.step(node, FencingNow(frozenset({3})))
    bench.start(3, incarnation=11)
    bench.link_all()
    bench.sleep(TIMING.recover_ns)
    return bench


def test_a_node_that_an_agent_works_on_joins_when_it_has_ended() -> None:
    bench = joiner_3(1, 2)
    assert bench.installed(1).view == View(ViewId(1, 1), lives(1, 2), True), "nothing stopped the agent"
    for node in (1, 2):
        bench.step(node, FencingNow(frozenset()))
    bench.sleep()
    assert bench.installed(2).view.members == (life(1), life(2), life(3, 11))


def test_a_joiner_that_coordinates_is_told_to_wait() -> None:
    bench = Bench()
    bench.start(2, 3)
    bench.link_all()
    bench.sleep()
    for node in (2, 3):
        bench.step(node, FencingNow(frozenset({1})))
    bench.start(1)
    bench.link((1, 2), (1, 3))
    bench.hear(2, 1, Prepare(9, lives(1, 2, 3)))
    assert nack_of(bench, 2).reason == WAIT
    bench.sleep(2 * TIMING.recover_ns)
    assert bench[2].view is not None
    assert bench[2].view.id.epoch == 1, "its knocking stopped nobody"
    for node in (2, 3):
        bench.step(node, FencingNow(frozenset()))
    bench.sleep(2 * TIMING.detect_ns)
    assert bench[2].view.nodes == (1, 2, 3)


def test_fencing_an_earlier_life_removes_no_member() -> None:
    bench = Bench().whole()
    for node in (1, 2, 3):
        bench.step(node, FencingNow(frozenset({3})))
    bench.sleep(TIMING.recover_ns)
    bench.peer_down(1, 2)  # the same members agree anew
    bench.link((1, 2))
    bench.sleep(TIMING.recover_ns)
    view = bench[1].view
    assert view is not None
    assert (view.id.epoch > 1, view.nodes) == (True, (1, 2, 3))


@pytest.mark.parametrize("victim", [1, 3], ids=["the coordinator", "another"])
def test_an_expelled_member_is_left_out_and_comes_back_as_another_life(victim: int) -> None:
    bench = Bench().whole()
    for node in (1, 2, 3):
        bench.step(node, Expel(life(victim)))
    bench.sleep(TIMING.recover_ns)
    view = bench[2].view
    assert view is not None
    assert view.nodes == tuple(node for node in (1, 2, 3) if node != victim)
    assert len(bench.take(victim, Excluded)) == 1


def test_no_member_is_expelled_at_the_price_of_the_quorum() -> None:
    bench = Bench()
    bench.start(1, 2)
    bench.link_all()
    bench.sleep()
    assert not bench[1].can_spare(life(2))
    bench.step(1, Expel(life(2)))
    bench.sleep(TIMING.recover_ns)
    assert bench.installed(1).view.nodes == (1, 2)


# --- leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaver", [1, 2, 3])
def test_a_clean_leaver_is_marked_and_writes_its_stop_last(leaver: int) -> None:
    bench = Bench().whole()
    bench.step(leaver, Leave())
    bench.deliver()
    stayed = next(node for node in (1, 2, 3) if node != leaver)
    event = bench.installed(stayed)
    assert leaver not in event.view.nodes
    assert event.left == (life(leaver),)
    assert bench.take(leaver, Left) == [Left(True)]
    assert bench.take(leaver, Excluded) == []
    assert CleanStop() not in bench.logs[leaver]
    bench.step(leaver, ServicesStopped())
    assert bench.logs[leaver][-1] == CleanStop()
    assert bench.take(leaver, CleanlyStopped)


def test_a_leaver_is_unwilling_before_it_says_that_it_left() -> None:
    """Else its heartbeats would go on echoing after `echoes_end` was asked for."""
    bench = Bench().whole()
    bench.step(3, Leave())
    bench.deliver()
    last = [event for event in bench.events[3] if isinstance(event, Left | FlagsChanged)]
    assert [type(event) for event in last] == [FlagsChanged, Left]
    assert not last[0].flags & WILLING


def test_a_leave_survives_an_abandoned_view() -> None:
    """The removal was accepted, its coordinator died: the next view still knows that the leaver left."""
    bench = Bench(5).whole()
    bench.step(5, Leave())
    bench.deliver(type(bench.sent(5, object)[0]))
    bench.deliver(Prepare)
    bench.deliver(Promise)
    bench.deliver(Propose)
    bench.drop(Accept)
    bench.kill(1)
    bench.kill(5)
    bench.sleep()
    event = bench.installed(2)
    assert event.view.nodes == (2, 3, 4)
    assert life(5) in event.left


def test_the_last_node_leaves_by_itself() -> None:
    bench = Bench(1).whole()
    bench.step(1, Leave())
    assert bench.take(1, Left) == [Left(True)]


def test_a_leave_that_nobody_orders_in_time_is_not_clean() -> None:
    bench = Bench().whole()
    bench.step(3, Leave())
    bench.wire.clear()
    for node in (1, 2):
        bench.kill(node)
    bench.sleep(2 * TIMING.recover_ns)
    assert bench.take(3, Left) == [Left(False)]
    bench.step(3, ServicesStopped())
    assert CleanStop() not in bench.logs[3]


def test_a_quiet_leaver_writes_no_clean_stop() -> None:
    bench = Bench().whole()
    bench.quiet = {3}
    bench.tell_links()
    bench.step(3, Leave())
    bench.deliver()
    bench.step(3, ServicesStopped())
    assert CleanStop() not in bench.logs[3]
    assert bench.take(3, CleanlyStopped), "it may end all the same"


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_a_member_that_never_answers_is_left_out_for_a_while() -> None:
    bench = Bench().whole()
    bench.deaf = {3}
    bench.peer_down(1, 2)
    bench.link((1, 2))
    bench.sleep(4 * TIMING.detect_ns)
    assert bench[1].view is not None
    assert bench[1].view.nodes == (1, 2)
    assert not bench[2].stopped


def test_a_coordinator_that_never_moves_is_passed_over() -> None:
    bench = Bench()
    bench.start(1, 2, 3)
    bench.link_all()
    bench.drop(Prepare)  # 1 hangs from here on
    hung = bench.engines.pop(1)
    bench.sleep(TIMING.form_ns + TIMING.patience_ns + TIMING.detect_ns)
    assert bench[2].view is not None
    assert bench[2].view.nodes == (2, 3)
    assert hung.view is None
