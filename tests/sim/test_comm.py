"""Comm's simulation: fresh engines hold, a seed replays, and every planted bug is caught within 50 seeds."""

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import pytest

from corral.comm import session as session_module
from corral.comm.session import SessionEngine
from tests.sim.comm_sessions import run


class Plant(NamedTuple):
    """A bug: `old` becomes `new` in the source of one method."""

    name: str
    method: str
    old: str
    new: str
    caught_by: str  # begins the checker's or the assert's words
    also: tuple[str, str, str] | None = None  # method, old, new: a second line of defence removed


PLANTS = [
    Plant("nothing is sent again", "_resume", "if again:", "if not again:", "COMM-9"),
    Plant(
        "all is sent again and repeats are delivered",
        "_resume",
        "self._acknowledged(peer_received)",
        "pass",
        "COMM-1",
        ("receive", "if sequence != received + 1:", "if sequence > received + 1:"),
    ),
    Plant("acknowledges one too many", "_send_ack", "0, self._received,", "0, self._received + 1,", "COMM-9"),
    Plant("tells the end twice", "_end", "if not self.alive:", "if not self.session:", "COMM-2"),
    Plant("keeps the queue for the next session", "_end", "self._unacked.clear()", "pass", "COMM-9"),
    Plant(
        "gives a session up without ending it",
        "tick",
        'self._end(now, f"no connection for {limits.session_timeout_ns // 1_000_000} ms", say=None)',
        'self._lost_at = FOREVER; self._shared.out.append(PeerDown(self.peer, self.session, "given up"))',
        "COMM-",
    ),
    Plant(
        "lets an older incarnation in",
        "judge",
        "if hello.me.incarnation < known.incarnation:",
        "if False:",
        "COMM-5",
        ("_learn", 'assert peer.incarnation >= self.peer.incarnation, "COMM-5"', "pass"),
    ),
    Plant(
        "lets an older attempt in", "judge", "hello.attempt <= (0 if newer else self._seen_attempt)", "False", "COMM-2"
    ),
    Plant("has no bound", "pack", "if size > limits.queue_bytes:", "if False:", "COMM-4"),
    Plant("never calls again", "_retry", "self._backoff *= 2", "self._retry_at = FOREVER", "liveness"),
    Plant(
        "never acknowledges by itself",
        "tick",
        "if self._received != self._received_acked and self.connection:",
        "if False:",
        "liveness",
    ),
    Plant("forgets a deadline that passed", "tick", "if now >= self._ack_at:", "if False:", "COMM-10"),
]


def mutate(monkeypatch: pytest.MonkeyPatch, method: str, old: str, new: str) -> None:
    source = textwrap.dedent(inspect.getsource(getattr(SessionEngine, method)))
    assert source.count(old) == 1, f"the plant no longer fits {method}: {old}"
    namespace: dict[str, Any] = {}
    exec(source.replace(old, new), vars(session_module), namespace)
    planted = namespace[method]
    assert isinstance(planted, FunctionType)
    monkeypatch.setattr(SessionEngine, method, planted)


@pytest.mark.parametrize("seed", range(25))
def test_honest_engines_hold(seed: int) -> None:
    run(seed)


def test_the_same_seed_gives_the_same_trace() -> None:
    assert [run(seed) for seed in range(3)] == [run(seed) for seed in range(3)]
    assert run(0) != run(1)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_bug_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, plant.method, plant.old, plant.new)
    if plant.also is not None:
        mutate(monkeypatch, *plant.also)
    verdict = next((words for seed in range(50) if (words := violation(seed))), "not noticed in 50 seeds")
    assert verdict.startswith(plant.caught_by)


def violation(seed: int) -> str:
    try:
        run(seed)
    except AssertionError as error:
        return str(error)
    return ""


def test_the_trace_does_not_depend_on_the_hash_seed() -> None:
    program = "from tests.sim.comm_sessions import run; print(run(4), run(5))"
    traces = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(traces) == 1
