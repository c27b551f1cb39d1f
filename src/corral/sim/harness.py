"""Running seeds: one run, the same run twice, the same run in another process; and the file of seeds that once failed.

A *body* is `async def body(sim: Simulation)`: it builds machines, starts programs, lets faults happen and asserts. What
leaves it fails the run, and `Failed` says in its first line how to see it again.
"""

import importlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from random import Random
from time import process_time
from typing import Any, NamedTuple

from corral.base.time import SECOND
from corral.sim.knobs import Knobs
from corral.sim.simulation import Simulation

Body = Callable[[Simulation], Coroutine[Any, Any, Any]]

TAIL = 40  # lines of the trace shown with a failure
ELSEWHERE_SECONDS = 300


class Outcome(NamedTuple):
    """What a run came to. Everything but `cpu_seconds` and `result` is the same whenever the seed is run."""

    seed: int
    digest: int  # of the trace
    events: int  # entries in the trace
    steps: int  # callbacks run
    virtual_ns: int
    cpu_seconds: float
    result: Any

    @property
    def course(self) -> tuple[int, int, int, int]:
        """Two runs of a seed must agree in this."""
        return self.digest, self.events, self.steps, self.virtual_ns


class Failed(AssertionError):
    """A run failed; its cause is `__cause__`."""


class NotDeterministic(AssertionError):
    """Two runs of one seed took different courses: something asked the outside, or an order was an accident."""


def run(seed: int, body: Body, *, knobs: Knobs | None = None, trace_to: Path | None = None) -> Outcome:
    """One run. `trace_to`: the whole story goes to this file."""
    began = process_time()
    simulation = Simulation(seed, knobs, whole_trace=trace_to is not None)
    with simulation as sim:
        try:
            result = sim.run(body(sim))
        except Exception as error:
            cause = error.__cause__ or error
            tail = "\n".join(f"    {line}" for line in sim.trace.lines(TAIL))
            raise Failed(
                f"seed={seed} commit={commit()} after {sim.now / SECOND:.3f} virtual seconds: "
                f"{type(cause).__name__}: {error}\n{tail}"
            ) from error
        finally:
            if trace_to is not None:
                trace_to.write_text(sim.trace.text() + "\n")
        return Outcome(
            seed, sim.trace.digest, sim.trace.count, sim.scheduler.steps, sim.now, process_time() - began, result
        )


def nasty(seed: int) -> Knobs:
    """The knobs that belong to a seed."""
    return Knobs.drawn(Random(seed))


def replay(seed: int, body: Body, *, knobs: Knobs | None = None) -> Outcome:
    """Runs the seed twice and raises NotDeterministic, naming the first difference, unless both took one course."""
    first, second = run(seed, body, knobs=knobs), run(seed, body, knobs=knobs)
    if first.course == second.course:
        return first
    raise NotDeterministic(f"seed={seed} commit={commit()}: {_difference(seed, body, knobs)}")


def _difference(seed: int, body: Body, knobs: Knobs | None) -> str:
    stories = []
    for _ in range(2):
        with Simulation(seed, knobs, whole_trace=True) as sim:
            try:
                sim.run(body(sim))
            except Exception as error:
                sim.note(f"failed: {type(error).__name__}")
            stories.append(list(sim.trace.lines()))
    for number, (one, other) in enumerate(zip(*stories, strict=False)):
        if one != other:
            return f"entry {number} is\n    {one}\nand then\n    {other}"
    return f"one run has {len(stories[0])} entries, another {len(stories[1])}"


def run_elsewhere(target: str, seed: int, *, hash_seed: int) -> Outcome:
    """Runs the body `package.module:function` in a Python of its own with this PYTHONHASHSEED."""
    environment = dict(os.environ, PYTHONHASHSEED=str(hash_seed), PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    done = subprocess.run(
        [sys.executable, "-m", "corral.sim", target, str(seed)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=ELSEWHERE_SECONDS,
        check=False,
    )
    if done.returncode:
        raise Failed(f"seed={seed} in a process with hash seed {hash_seed}:\n{done.stderr}")
    fields = json.loads(done.stdout.splitlines()[-1])
    return Outcome(**fields, result=None)


def find_body(target: str) -> Body:
    """`package.module:function`."""
    module, _, name = target.partition(":")
    body: Body = getattr(importlib.import_module(module), name)
    return body


def commit() -> str:
    """The commit this source is at, as far as git knows."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


# --- the file of seeds that once failed: lines of `name seed`, anything after a # is for people ---


def kept_seeds(path: Path, name: str) -> list[int]:
    """The seeds kept for this test, oldest first."""
    seeds = []
    if path.exists():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) != 2 or not words[1].isdigit():
                raise ValueError(f"{path}:{number}: expected `name seed`, found {line!r}")
            if words[0] == name:
                seeds.append(int(words[1]))
    return seeds


def keep_seed(path: Path, name: str, seed: int) -> None:
    """Adds a seed that failed, once."""
    if seed not in kept_seeds(path, name):
        with path.open("a") as file:
            file.write(f"{name} {seed}\n")


def fresh_seeds(count: int) -> list[int]:
    """Seeds nobody has run: the one place here that asks for real chance. SEED=n in the environment: only n."""
    chosen = os.environ.get("SEED")
    return [int(chosen)] if chosen else [secrets.randbits(32) for _ in range(count)]


def run_seeds(name: str, body: Body, path: Path, *, fresh: int, drawn_knobs: bool = True) -> list[Outcome]:
    """Every kept seed of this test, then `fresh` new ones; one that fails is kept before the failure is raised."""
    chosen = os.environ.get("SEED")
    outcomes = []
    for seed in ([] if chosen else kept_seeds(path, name)) + fresh_seeds(fresh):
        try:
            outcomes.append(run(seed, body, knobs=nasty(seed) if drawn_knobs else None))
        except Failed:
            keep_seed(path, name, seed)
            raise
    return outcomes
