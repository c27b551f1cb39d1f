"""The tables of a lockspace against plain dicts, and how long what nobody uses stays in them."""

import random

import pytest

from corral.api.dlm import EX, VALBLK, Request
from corral.base.engine import TICK
from corral.base.time import FOREVER, SECOND
from corral.dlm import space
from corral.dlm.events import Submit
from corral.dlm.resource import NOBODY, Lock, Resource
from corral.dlm.solo import solo
from corral.dlm.tables import PAGE_SHIFT, Addresses, Names

TOSS = 10 * SECOND


def test_names_are_as_in_a_dict():
    rng = random.Random(1)
    names, plain = Names(), {}
    for _ in range(3000):
        name = b"name-%d" % rng.randrange(300)
        if name in plain and rng.random() < 0.5:
            names.remove(name)
            del plain[name]
        elif name not in plain:
            plain[name] = names.make(name)
        assert names.get(name) is plain.get(name)
        assert len(names) == len(plain)
    assert sorted(names) == sorted(plain)
    assert names.in_order() == [plain[name] for name in sorted(plain)]
    names.clear()
    assert len(names) == 0


def test_addresses_are_as_in_a_dict_of_dicts():
    rng = random.Random(2)
    locks, plain = Addresses(), {}
    resource = Resource(b"x", None)
    for _ in range(5000):
        client = rng.randrange(4)
        address = client << 32 | rng.randrange(6) << PAGE_SHIFT | rng.randrange(3)
        if address in plain and rng.random() < 0.6:
            locks.remove(address)
            del plain[address]
        elif address not in plain:
            plain[address] = locks.page(address)[address] = Lock(address, resource, None, 1)
        assert locks.get(address) is plain.get(address)
        if rng.random() < 0.01:
            mine = [plain[other] for other in sorted(plain) if other >> 32 == client]
            assert locks.of(client) == mine
            assert locks.forget(client) == (not mine)
            assert (client in locks.clients) == bool(mine)
    assert locks.in_order() == [plain[address] for address in sorted(plain)]


def test_pages_that_became_empty_go_when_their_client_opens_another():
    locks = Addresses()
    for number in range(100):
        address = 5 << 32 | number << PAGE_SHIFT
        locks.page(address)[address] = Lock(address, Resource(b"x", None), None, 1)
        locks.remove(address)
    assert len(locks._pages) == 1
    assert locks.forget(5)
    assert not locks._pages


def lock(engine, now, name=b"x", handle=1):
    assert engine.complete_now(now, 1, handle, Request("lock", name, EX, VALBLK)) is not None


def unlock(engine, now, handle=1):
    assert engine.complete_now(now, 1, handle, Request("unlock", lock=handle)) is not None


def test_what_nobody_uses_is_forgotten_after_the_toss_time():
    engine = solo(0, "space", toss_ns=TOSS)
    lock(engine, 0)
    assert engine.deadline == FOREVER
    unlock(engine, 5)
    assert engine.deadline == TOSS + 5
    engine.step(TOSS + 4, TICK)
    assert len(engine.space.resources) == 1
    engine.step(TOSS + 5, TICK)
    assert len(engine.space.resources) == 0
    assert engine.deadline == FOREVER


def test_what_was_used_meanwhile_stays_for_another_toss_time():
    engine = solo(0, "space", toss_ns=TOSS)
    for now in (0, 5):
        lock(engine, now)
        unlock(engine, now)
    engine.step(TOSS, TICK)
    assert len(engine.space.resources) == 1
    assert engine.deadline == 2 * TOSS
    engine.step(2 * TOSS, TICK)
    assert len(engine.space.resources) == 0


def test_what_is_in_use_when_its_time_comes_is_tossed_anew_when_it_is_left():
    engine = solo(0, "space", toss_ns=TOSS)
    lock(engine, 0)
    unlock(engine, 0)
    lock(engine, 1)
    engine.step(TOSS, TICK)
    assert engine.deadline == FOREVER
    unlock(engine, TOSS + 1)
    assert engine.deadline == 2 * TOSS + 1
    engine.step(2 * TOSS + 1, TICK)
    assert len(engine.space.resources) == 0


@pytest.mark.interpreted
def test_unused_resources_are_bounded(monkeypatch):
    monkeypatch.setattr(space, "TOSSED_MAX", 3)
    engine = solo(0, "space", toss_ns=TOSS)
    for number in range(10):
        lock(engine, number, b"name-%d" % number)
        unlock(engine, number)
    assert sorted(engine.space.resources) == [b"name-7", b"name-8", b"name-9"]


def test_a_lock_does_not_join_the_queue_that_all_share():
    engine = solo(0, "space")
    lock(engine, 0)
    lock(engine, 0, b"y", 2)
    engine.step(0, Submit(1, [(3, 1, Request("lock", b"x", EX, VALBLK))]))
    first, second = (engine.space.resources.get(name) for name in (b"x", b"y"))
    assert len(first.granted) == len(first.waiting) == len(second.granted) == 1
    assert second.waiting is NOBODY
    assert not NOBODY
