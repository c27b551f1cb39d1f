"""The round gate: nothing old, nothing early, FIFO per peer, bounded (COMM-7, COMM-8)."""

from hypothesis import given, settings
from hypothesis import strategies as st

from corral.base.ids import MemberId
from corral.comm.gate import DELIVER, HELD, OLD, OVERFLOW, RoundGate

A = MemberId(1, 1, 0)
B = MemberId(2, 1, 0)


def test_older_is_dropped_current_delivered_newer_held_until_its_round() -> None:
    gate = RoundGate(5)
    assert gate.receive(A, 4, [b"old", b"old"]) == OLD
    assert gate.dropped == 2
    assert gate.receive(A, 5, [b"now"]) == DELIVER
    assert gate.receive(A, 6, [b"1"]) == HELD
    assert gate.receive(A, 6, [b"2", b"3"]) == HELD
    assert gate.receive(B, 6, [b"4"]) == HELD
    assert gate.receive(B, 8, [b"8"]) == HELD
    assert gate.advance(6) == [(A, [b"1", b"2", b"3"]), (B, [b"4"])]
    assert gate.receive(A, 6, [b"now"]) == DELIVER
    assert (gate.held_frames(A), gate.held_bytes(A)) == (0, 0)
    assert gate.advance(8) == [(B, [b"8"])]


def test_a_skipped_round_is_dropped() -> None:
    gate = RoundGate(1)
    gate.receive(A, 2, [b"x"])
    gate.receive(A, 3, [b"y"])
    assert gate.advance(3) == [(A, [b"y"])]
    assert gate.dropped == 1


def test_a_peer_that_went_on_cannot_come_back_to_an_earlier_round() -> None:
    gate = RoundGate(5)
    gate.receive(A, 7, [b"x"])
    assert gate.receive(A, 5, [b"late"]) == OLD
    assert gate.receive(A, 6, [b"late"]) == OLD
    assert gate.receive(B, 5, [b"fine"]) == DELIVER


def test_too_many_frames_or_bytes_overflow_that_peer_only() -> None:
    gate = RoundGate(0, frames_max=3, bytes_max=100)
    assert gate.receive(B, 1, [b"b"]) == HELD
    assert gate.receive(A, 1, [b"a"] * 3) == HELD
    assert gate.receive(A, 1, [b"a"]) == OVERFLOW
    assert gate.held_frames(A) == 0
    assert gate.receive(A, 1, [bytes(101)]) == OVERFLOW
    assert gate.advance(1) == [(B, [b"b"])]


def test_what_a_broken_session_had_sent_is_forgotten() -> None:
    gate = RoundGate(0)
    gate.receive(A, 1, [b"a"])
    gate.forget(A)
    assert gate.advance(1) == []


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abA"), st.integers(0, 6), st.integers(1, 3)), max_size=40))
def test_against_a_list_that_keeps_everything(script: list[tuple[str, int, int]]) -> None:
    """The dumb second implementation: all that was received, filtered when a round starts."""
    gate = RoundGate(0)
    kept: dict[MemberId, list[tuple[int, bytes]]] = {A: [], B: []}
    current = number = 0
    for who, round_id, count in script:
        if who == "A":
            current = max(current, round_id)
            expected = [(peer, [p for r, p in kept[peer] if r == current]) for peer in (A, B)]
            assert gate.advance(current) == [(peer, payloads) for peer, payloads in expected if payloads]
            kept = {peer: [(r, p) for r, p in kept[peer] if r > current] for peer in (A, B)}
            continue
        peer = A if who == "a" else B
        payloads = [b"%d" % (number + n) for n in range(count)]
        number += count
        newest = max((r for r, _ in kept[peer]), default=current)
        if round_id < newest:
            assert gate.receive(peer, round_id, payloads) == OLD
        elif round_id == current:
            assert gate.receive(peer, round_id, payloads) == DELIVER
        else:
            assert gate.receive(peer, round_id, payloads) == HELD
            kept[peer].extend((round_id, payload) for payload in payloads)
