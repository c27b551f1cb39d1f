"""What is on disk: the fold, its compaction, and that nothing a crash leaves behind is misread."""

from random import Random

import pytest

from corral.base.ids import NO_VIEW, NodeIncarnation, ViewId
from corral.base.view import View
from corral.cman.quorum import first_record
from corral.cman.state import ACCEPTED_MAX, State, first_state, recover
from corral.cman.wire import (
    RECORDS,
    AcceptedView,
    ActiveView,
    CleanStop,
    ExcludedBy,
    Forgotten,
    InstalledView,
    Promised,
    Record,
    RecordHeld,
    Started,
)

RECORD = first_record({1: 1, 2: 1, 3: 1}, 400)


def view(epoch: int, *nodes: int, quorate: bool = True) -> View:
    return View(ViewId(epoch, nodes[0]), tuple(NodeIncarnation(n, 10) for n in nodes), quorate)


def fields(state: State) -> dict[str, object]:
    return {name: getattr(state, name) for name in State.__slots__}


def test_a_new_cluster_has_memory_and_need_not_be_quiet() -> None:
    state = recover(first_state(RECORD))
    assert state.record == RECORD
    assert not state.quiet


def test_an_empty_state_has_no_memory_and_is_quiet() -> None:
    state = recover([])
    assert state.record is None
    assert state.quiet


@pytest.mark.parametrize(
    ("records", "quiet"),
    [
        ([*first_state(RECORD), Started(10)], True),
        ([*first_state(RECORD), Started(10), CleanStop()], False),
        ([*first_state(RECORD), Started(10), CleanStop(), Started(11)], True),
    ],
)
def test_only_a_clean_stop_ends_the_need_for_quiet(records: list[Record], quiet: bool) -> None:
    assert recover(records).quiet is quiet


@pytest.mark.parametrize(("kept", "wall", "wanted"), [(0, 1000, 1000), (1000, 1000, 1001), (5000, 1000, 5001)])
def test_incarnations_only_rise(kept: int, wall: int, wanted: int) -> None:
    assert recover([Started(kept)]).next_incarnation(wall) == wanted


def test_a_promise_that_falls_stops_the_node() -> None:
    state = recover([Promised(ViewId(5, 2))])
    for epoch in (4, 5):
        with pytest.raises(AssertionError, match="CMAN-4"):
            state.apply(Promised(ViewId(epoch, 1)))


def test_accepted_views_are_kept_from_the_newest_active_one_on() -> None:
    state = recover([AcceptedView(view(epoch, 1, 2)) for epoch in (1, 2, 3)])
    state.apply(AcceptedView(view(4, 1, quorate=False)))
    state.apply(ActiveView(ViewId(2, 1)))
    assert [kept.id.epoch for kept in state.accepted] == [2, 3]
    assert state.accepted_id == ViewId(4, 1)
    assert state.newest == view(3, 1, 2)


def test_accepted_views_are_bounded_and_lose_no_member() -> None:
    state = State()
    for epoch in range(1, 100):
        state.apply(AcceptedView(view(epoch, 1, epoch + 1)))
    assert len(state.accepted) == ACCEPTED_MAX
    assert state.newest == view(99, 1, 100)
    assert state.accepted[0] == view(1, 1, 2)
    assert {m.node for kept in state.accepted for m in kept.members} == set(range(1, 101))


def test_an_incarnation_others_hold_takes_the_memory_away() -> None:
    state = recover([*first_state(RECORD), Started(10), Forgotten(17)])
    assert state.record is None
    assert state.next_incarnation(0) == 18


def test_exclusion_lasts_until_a_view_is_installed() -> None:
    state = recover([ExcludedBy(ViewId(7, 1)), Started(11)])
    assert state.excluded
    state.apply(InstalledView(ViewId(8, 1)))
    assert not state.excluded


def random_history(rng: Random) -> list[Record]:
    records: list[Record] = [Started(10), RecordHeld(RECORD)]
    epoch = 0
    for _ in range(rng.randint(1, 40)):
        epoch += rng.randint(1, 3)
        nodes = sorted(rng.sample((1, 2, 3, 4, 5), rng.randint(1, 4)))
        accepted = view(epoch, *nodes, quorate=rng.random() < 0.6)
        records.append(Promised(accepted.id))
        if rng.random() < 0.7:
            records.append(AcceptedView(accepted, left=(NodeIncarnation(9, epoch),)))
            if rng.random() < 0.7:
                records.append(InstalledView(accepted.id))
                if accepted.quorate and rng.random() < 0.5:
                    records.append(ActiveView(accepted.id))
        if rng.random() < 0.1:
            records.append(Started(10 + epoch))
        if rng.random() < 0.1:
            records.append(ExcludedBy(accepted.id))
    if rng.random() < 0.2:
        records.append(CleanStop())
    return records


def test_compaction_keeps_the_fold() -> None:
    rng = Random(11)
    for _ in range(300):
        state = recover(random_history(rng))
        compact = [RECORDS.decode(RECORDS.encode(record)) for record in state.compact()]
        assert fields(recover(compact)) == fields(state)
        assert len(compact) <= ACCEPTED_MAX + 10


def test_every_prefix_of_a_log_is_a_state() -> None:
    """A crash keeps the first records: none of them needs a later one."""
    history = random_history(Random(3))
    for length in range(len(history) + 1):
        state = recover(history[:length])
        assert state.promised >= NO_VIEW
