"""Datagrams: authentic, fresh, of this session and this direction, or dropped and counted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.base.time import MILLISECOND
from corral.comm import seal
from corral.comm.seal import FORGED, FRESH, REPLAYED, WINDOW, Opener, Sealer, derive, parse
from tests.unit.comm.rig import Host, Rig

KEY = derive(bytes(32), b"1" * 32, True)


def pair() -> tuple[Sealer, Opener]:
    return Sealer(KEY, 7, 1, 0), Opener(KEY, 7)


def test_what_was_sealed_opens_once() -> None:
    sealer, opener = pair()
    datagram = sealer.seal(b"beat")
    assert parse(datagram)[:3] == (1, 0, 7)
    assert seal.payload_of(datagram) == b"beat"
    assert opener.open(datagram, parse(datagram)) == FRESH
    assert opener.open(datagram, parse(datagram)) == REPLAYED


def test_within_the_window_any_order_opens_and_behind_it_nothing() -> None:
    sealer, opener = pair()
    datagrams = [sealer.seal(bytes([n])) for n in range(WINDOW + 1)]
    assert opener.open(datagrams[WINDOW], parse(datagrams[WINDOW])) == FRESH
    for datagram in reversed(datagrams[1:WINDOW]):
        assert opener.open(datagram, parse(datagram)) == FRESH
    assert opener.open(datagrams[0], parse(datagrams[0])) == REPLAYED


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=80))
def test_the_window_agrees_with_a_set_that_remembers_everything(order: list[int]) -> None:
    sealer, opener = pair()
    datagrams = [sealer.seal(b"") for _ in range(300)]
    seen: set[int] = set()
    for counter in order:
        datagram = datagrams[counter - 1]
        fresh = counter not in seen and counter > max(seen, default=0) - WINDOW
        assert (opener.open(datagram, parse(datagram)) == FRESH) == fresh
        seen.add(counter) if fresh else None


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 63), st.integers(1, 255))
def test_no_changed_byte_opens_and_no_forgery_moves_the_window(where: int, change: int) -> None:
    sealer, opener = pair()
    good = sealer.seal(b"x" * 24)
    forged = bytearray(good)
    forged[where] ^= change
    try:
        header = parse(bytes(forged))
    except seal.PeerError:
        return
    assert opener.open(bytes(forged), header) in (FORGED, REPLAYED)
    assert opener.open(good, parse(good)) == FRESH


def test_the_two_directions_have_different_keys() -> None:
    assert derive(b"a" * 32, b"b" * 32, True) != derive(b"a" * 32, b"b" * 32, False)


# --- through the engine ----------------------------------------------------------------------------------------------


@pytest.fixture
def hosts() -> tuple[Rig, Host, Host]:
    rig = Rig()
    one, two = rig.pair()
    rig.run(50 * MILLISECOND)
    return rig, one, two


def test_the_peer_opens_what_its_peer_sealed_both_ways(hosts: tuple[Rig, Host, Host]) -> None:
    _, one, two = hosts
    for sender, receiver in ((one, two), (two, one)):
        sealed = sender.engine.seal(receiver.member, b"beat")
        assert sealed is not None
        address, datagram = sealed
        assert address == receiver.address
        assert receiver.engine.open(datagram) == (sender.member, b"beat")


def test_forged_replayed_and_reflected_datagrams_are_counted_and_dropped(hosts: tuple[Rig, Host, Host]) -> None:
    _, one, two = hosts
    sealed = one.engine.seal(two.member, b"beat")
    assert sealed is not None
    datagram = sealed[1]
    assert two.engine.open(datagram) == (one.member, b"beat")
    assert two.engine.open(datagram) is None
    assert two.engine.open(datagram[:-1] + bytes([datagram[-1] ^ 1])) is None
    assert one.engine.open(datagram) is None  # reflected: names its own node
    later = one.engine.seal(two.member, b"beat")
    assert later is not None
    assert two.engine.open(later[1][:-1] + bytes([later[1][-1] ^ 1])) is None
    assert two.engine.open(b"junk") is None
    assert two.rejects() == {"datagram forged": 1, "datagram replayed": 2, "malformed datagram": 1}
    assert one.rejects() == {"datagram under an unknown key": 1}


def test_after_a_reconnect_the_old_key_still_opens_and_after_the_session_none_does(
    hosts: tuple[Rig, Host, Host],
) -> None:
    rig, one, two = hosts
    early = one.engine.seal(two.member, b"early")
    assert early is not None
    rig.break_all()
    rig.run(100 * MILLISECOND)
    assert two.engine.open(early[1]) == (one.member, b"early")
    late = one.engine.seal(two.member, b"late")
    assert late is not None
    one.engine.end_session(rig.now, two.member, "for a test")
    rig.act(one)
    assert one.engine.seal(two.member, b"none") is None
    rig.run(200 * MILLISECOND)
    assert two.engine.open(late[1]) is None
