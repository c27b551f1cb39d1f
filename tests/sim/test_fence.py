"""Fencing under random faults, and every checker against the bug it exists for."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from corral.fence.engine import FenceEngine
from corral.fence.events import AttemptDone
from corral.fence.wire import TurnFailed
from tests.sim import fence_cluster

SEEDS = range(150)
PLANT_SEEDS = range(50)


def test_no_violation() -> None:
    for seed in SEEDS:
        try:
            fence_cluster.run(seed)
        except AssertionError as error:
            raise AssertionError(f"python -m tests.sim.fence_cluster {seed}: {error}") from error


def test_a_seed_is_one_story() -> None:
    """In another process, with another hash seed."""
    code = "from tests.sim.fence_cluster import run; print([run(seed) for seed in range(20)])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(outputs) == 1


# --- plants: (what is done wrong, the invariant that must be named) --------------------------------------------------

original_done = FenceEngine._attempt_done
original_send = FenceEngine._broadcast
original_start = FenceEngine._start
original_waiting = FenceEngine._waiting_victims


def failure_is_success(engine: Any, now: int, event: AttemptDone) -> None:
    original_done(engine, now, event._replace(ok=True) if "timed out" in event.text else event)


def any_rejoin_is_clean(engine: Any, victim: Any) -> bool:
    member = engine._members.get(victim.node)
    return member is not None and member.incarnation > victim.incarnation


def nobody_is_waited_for(engine: Any) -> None:
    if not engine._done:
        engine._done = True
        engine._out.emit.append(fence_cluster.RoundDone(engine._round.id))


def no_turn_is_passed(engine: Any, message: Any) -> None:
    if not isinstance(message, TurnFailed):
        original_send(engine, message)


def everybody_is_first(engine: Any, now: int, event: Any) -> None:
    original_start(engine, now, event)
    if event.round.id == engine._round.id:
        engine._order = (engine._me, *(node for node in engine._order if node != engine._me))


def what_comes_early_is_lost(engine: Any, now: int, peer: Any, message: Any) -> None:
    if engine._round is not None and message.round <= engine._round.id:
        original_receive(engine, now, peer, message)


original_receive = FenceEngine._receive


def agents_of_old_rounds_are_forgotten(engine: Any) -> None:
    original_stop(engine)
    for attempt in list(engine._attempts.values()):
        if attempt.abandoned:
            del engine._attempts[attempt.id]


original_stop = FenceEngine._stop


def no_startup_victims(engine: Any, event: Any) -> Any:
    return original_victims(engine, event._replace(startup=False))


original_victims = FenceEngine._round_victims


def whichever_incarnation_it_has(engine: Any, now: int, victim: Any, method: Any, action: str) -> None:
    member = engine._members.get(victim.node)
    if member is not None:
        victim = fence_cluster.NodeIncarnation(member.node, member.incarnation)
    original_run(engine, now, victim, method, action)


original_run = FenceEngine._run


PLANTS: list[tuple[str, Callable[..., Any], str]] = [
    ("_attempt_done", failure_is_success, "FENCE-1"),
    ("_rejoined_clean", any_rejoin_is_clean, "FENCE-1"),
    ("_finish", nobody_is_waited_for, "FENCE-1"),
    ("_round_victims", no_startup_victims, "FENCE-1"),
    ("_run", whichever_incarnation_it_has, "FENCE-2"),
    ("_broadcast", no_turn_is_passed, "FENCE-3"),
    ("_receive", what_comes_early_is_lost, "FENCE-3"),
    ("_stop", agents_of_old_rounds_are_forgotten, "FENCE-4"),
    ("_start", everybody_is_first, "FENCE-7"),
]


@pytest.mark.parametrize(("method", "bug", "invariant"), PLANTS, ids=[bug.__name__ for _, bug, _ in PLANTS])
def test_a_planted_bug_is_caught(method: str, bug: Callable[..., Any], invariant: str) -> None:
    verdicts: list[str] = []
    with mock.patch.object(FenceEngine, method, bug):
        for seed in PLANT_SEEDS:
            try:
                fence_cluster.run(seed)
            except fence_cluster.Violation as error:  # the checker's word, not the engine's own assert
                verdicts.append(str(error))
                if invariant in str(error):
                    return
    raise AssertionError(f"{invariant} was never named: {verdicts}")
