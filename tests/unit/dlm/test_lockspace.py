"""What concerns a lockspace as a whole: lengths of value blocks, warnings, orphans' bookkeeping."""

import pytest
from tests.unit.dlm.members import Members, member

from corral.api.dlm import CR, EX, NL, NODLCKWT, ORPHAN, PERSISTENT, PR, VALBLK, Request
from corral.base.time import SECOND
from corral.dlm.events import Done, Misfit, RoundDone, SpaceLost, Stop, Waiting


def test_value_blocks_have_the_length_of_the_lockspace():
    for size in (8, 64, 4096):
        members = Members(1, 2, value_size=size)
        members.ask(2, 1, 1, Request("lock", b"v", EX, VALBLK))
        assert members.ask(2, 1, 1, Request("convert", mode=EX, flags=VALBLK, value=b"x" * (size + 1))).status == -22
        members.ask(2, 1, 1, Request("convert", mode=NL, flags=VALBLK, value=b"x" * size))
        assert members.ask(1, 1, 1, Request("lock", b"v", PR, VALBLK)).value == b"x" * size


def test_who_comes_with_another_length_stays_out_and_the_others_go_on():
    members = Members(1, 2)
    members.ask(2, 1, 1, Request("lock", b"v", EX))
    members.join(3, value_size=16)
    members.heard.clear()
    members.recover(3)
    told = [event for node, event in members.heard if node == 3]
    assert [type(event) for event in told] == [Misfit, SpaceLost]
    assert (told[0].peer, told[0].value_size) == (member(1), 8)
    assert not [event for node, event in members.heard if node != 3 and isinstance(event, RoundDone)]
    del members.engines[3]
    members.recover()
    assert members.ask(1, 1, 1, Request("lock", b"v", PR, 1)).status == -11


def test_of_two_that_come_together_the_higher_stays_out():
    members = Members()
    members.join(1, value_size=16)
    members.join(2, value_size=8)
    members.recover(1, 2)
    assert [(node, type(event)) for node, event in members.heard] == [(2, Misfit), (2, SpaceLost)]


def test_a_member_is_busy_by_its_locks_and_by_what_it_masters_for_others():
    members = Members(1, 2)
    members.submit(1, 1, 1, Request("lock", b"r", NL))
    members.submit(2, 1, 1, Request("lock", b"r", NL))
    assert [members.engines[1].busy(force) for force in range(4)] == [True, True, False, False]
    members.submit(1, 1, 1, Request("unlock"))
    assert [members.engines[1].busy(force) for force in range(4)] == [True, False, False, False]
    members.submit(2, 1, 1, Request("unlock"))
    assert not members.engines[1].busy(0)


def test_who_waits_long_is_told_once_and_only_if_it_wants_to_be():
    members = Members(1, 2, warn_ns=5 * SECOND)
    members.submit(1, 1, 1, Request("lock", b"r", EX))
    members.submit(2, 1, 1, Request("lock", b"r", EX))
    cookie = members.cookie
    members.submit(2, 1, 2, Request("lock", b"r", EX, NODLCKWT))
    members.submit(2, 1, 3, Request("lock", b"s", EX))
    members.heard.clear()
    members.wait(5 * SECOND - 1)
    assert members.heard == []
    members.wait(2)
    ((node, waiting),) = members.heard
    assert isinstance(waiting, Waiting)
    assert (node, waiting.client, waiting.cookie) == (2, 1, cookie)
    assert (waiting.waits.lock, waiting.waits.resource, waiting.waits.mode) == (1, b"r", EX)
    assert 5 * SECOND <= waiting.waits.waited_ns < 6 * SECOND
    assert [(lock.member.node, lock.lock, lock.granted) for lock in waiting.waits.blockers] == [(1, 1, EX)]
    members.wait(100 * SECOND)
    assert len(members.heard) == 1
    assert members.engines[2].counters.warned == 1


def waits(members):
    return {
        (node, event.waits.lock): [(lock.member.node, lock.lock) for lock in event.waits.blockers]
        for node, event in members.heard
        if isinstance(event, Waiting)
    }


@pytest.mark.parametrize("name", [b"a", b"b", b"c", b"d"])
def test_who_waits_hears_who_is_in_its_way_wherever_the_resource_is_mastered(name):
    members = Members(1, 2, warn_ns=5 * SECOND)
    for node, handle, mode in ((1, 1, PR), (2, 1, PR), (1, 2, CR)):
        members.submit(node, 1, handle, Request("lock", name, mode))
    members.submit(2, 1, 1, Request("convert", lock=1, mode=EX))
    members.submit(1, 1, 3, Request("lock", name, PR))  # its mode is free; it is behind the conversion
    members.submit(2, 1, 4, Request("lock", name, EX))
    members.heard.clear()
    members.wait(6 * SECOND)
    assert waits(members) == {
        (2, 1): [(1, 1), (1, 2)],
        (1, 3): [(2, 1)],
        (2, 4): [(1, 1), (1, 2), (2, 1)],
    }


def test_who_waits_for_a_recovery_hears_so():
    members = Members(1, 2, warn_ns=5 * SECOND)
    members.submit(1, 1, 1, Request("lock", b"r", EX))
    members.step(2, Stop())
    members.submit(2, 1, 1, Request("lock", b"r", EX))
    members.heard.clear()
    members.wait(6 * SECOND)
    assert waits(members) == {(2, 1): []}


def test_a_wait_that_ends_while_it_is_asked_about_is_not_told():
    members = Members(1, 2, warn_ns=5 * SECOND)
    members.submit(1, 1, 1, Request("lock", b"r", EX))
    members.submit(2, 1, 1, Request("lock", b"r", EX))
    members.held_back = True
    members.wait(6 * SECOND)
    members.submit(2, 1, 1, Request("cancel", lock=1))
    members.held_back = False
    members.heard.clear()
    members.talk()
    assert waits(members) == {}


def test_a_handle_used_again_does_not_inherit_the_waiting_of_the_last():
    members = Members(1, warn_ns=5 * SECOND)
    members.submit(1, 1, 1, Request("lock", b"r", EX))
    members.submit(1, 2, 1, Request("lock", b"r", EX))
    members.wait(4 * SECOND)
    members.submit(1, 1, 1, Request("unlock"))
    members.submit(1, 2, 1, Request("unlock"))
    members.submit(1, 1, 1, Request("lock", b"r", EX))
    members.submit(1, 2, 1, Request("lock", b"r", EX))
    members.heard.clear()
    members.wait(4 * SECOND)
    assert members.heard == []
    members.wait(2 * SECOND)
    assert len(members.heard) == 1


def test_a_client_that_dies_hears_nothing_of_what_its_own_end_grants_it():
    members = Members(1)
    members.submit(1, 1, 1, Request("lock", b"r", EX))
    members.submit(1, 1, 2, Request("lock", b"r", EX))
    members.submit(1, 1, 3, Request("lock", b"r", PR, PERSISTENT))
    members.heard.clear()
    members.gone(1, 1)
    assert members.heard == []
    assert members.engines[1].space.lock_count == 0


def test_an_adopted_lock_is_a_lock_like_any_other_wherever_it_is_mastered():
    for master in (1, 2):
        members = Members(1, 2)
        members.submit(master, 1, 9, Request("lock", b"r", NL))
        members.submit(1, 2, 5, Request("lock", b"r", EX, PERSISTENT | VALBLK))
        members.gone(1, 2)
        adopted = members.ask(1, 3, 5, Request("lock", b"r", EX, ORPHAN | PERSISTENT))
        assert (adopted.status, adopted.mode) == (0, EX)
        assert members.ask(1, 3, 5, Request("lock", b"r", EX, ORPHAN)).status == -17
        assert members.ask(1, 3, 5, Request("convert", mode=PR, flags=VALBLK | PERSISTENT, value=b"x")).mode == PR
        members.gone(1, 3)  # an orphan once more
        assert members.ask(1, 4, 1, Request("lock", b"r", EX, ORPHAN)).status == -11
        assert members.ask(1, 4, 1, Request("lock", b"r", PR, ORPHAN)).value.rstrip(b"\0") == b"x"
        del members.engines[3 - master]
        members.recover()
        if master == 2:
            continue  # the orphan lived on 1
        members.gone(1, 4)
        members.gone(1, 1)
        space = members.engines[1].space
        assert (space.lock_count, space.adopted, space.gone) == (0, {}, set())
        assert set(space.locks.clients) <= {3}


def test_a_number_at_the_master_means_the_adopted_lock_and_not_who_has_its_old_handle():
    members = Members(1, 2)
    members.submit(2, 9, 1, Request("lock", b"r", NL))
    members.submit(1, 2, 5, Request("lock", b"r", PR, PERSISTENT))
    members.gone(1, 2)
    members.ask(1, 3, 1, Request("lock", b"r", PR, ORPHAN))
    heard = members.submit(2, 9, 2, Request("lock", b"r", EX))
    ((node, blocked),) = heard
    assert (node, blocked.client, blocked.handle) == (1, 3, 1)
    members.submit(1, 3, 1, Request("unlock"))
    assert any(isinstance(event, Done) and node == 2 for node, event in members.heard)
