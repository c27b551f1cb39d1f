"""Who checks the checkers: every bug that is planted anywhere, and the seed at which it is caught (`make plants`).

    python -m tests.plants [--only TEXT]

A plant is a bug put into the code by a patch. Each must be caught, by the invariant it is there for where it names one,
within 50 seeds, those of the dlm within 150 (a canary of the fuzzer: 400 cases; a plant of the conformance suite: its
one check). The exit status is 1 unless all are. The tests run the same plants; this shows them in one table.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any, Final, NamedTuple

import pytest

from corral.fence.engine import FenceEngine
from corral.gfs.format import BlockDamaged
from corral.gfs.replay import JournalDamaged
from corral.gfs.superblock import Refused
from corral.sim.harness import Body, Failed
from corral.sim.harness import run as run_body
from tests.conformance import test_world_plants, world_suite
from tests.conformance.test_world import RealLaboratory
from tests.fuzz.target import Finding, run_case
from tests.fuzz.targets import targets
from tests.sim import (
    cman_cluster,
    cman_plants,
    dlm_cluster,
    fence_cluster,
    gfs_crash,
    gfs_nodes,
    gfs_plants,
    lift_cluster,
    lift_plants,
    node_plants,
    test_comm,
    test_dlm,
    test_fence,
)
from tests.unit.gfs.world import StuckError

SEEDS: Final = range(50)
GFS_ERRORS: Final = (AssertionError, JournalDamaged, BlockDamaged, Refused, OSError, StuckError)


class Planted(NamedTuple):
    """`verdict(seed)`: what checkers say, empty when nothing. `caught_by`: what that must begin with, one of them."""

    name: str
    caught_by: tuple[str, ...]
    plant: Callable[[pytest.MonkeyPatch], Any]
    verdict: Callable[[int], str]
    seeds: range = SEEDS


def words_of(run: Callable[..., Any], *arguments: Any, errors: Any = AssertionError, **named: Any) -> str:
    try:
        run(*arguments, **named)
    except errors as error:
        return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__
    return ""


# --- where plants are ------------------------------------------------------------------------------------------------


def of_cman() -> Iterator[Planted]:
    for entry in cman_plants.PLANTS:

        def verdict(seed: int, kinds: tuple[str, ...] = entry.kinds) -> str:
            return words_of(cman_cluster.run, seed, kinds=kinds)

        yield Planted(
            f"cman: {entry.plant.__name__}",
            (entry.caught_by,),
            lambda patch, plant=entry.plant: plant(patch.setattr),  # type: ignore[misc]
            verdict,
        )


def of_lift() -> Iterator[Planted]:
    for entry in lift_plants.PLANTS:
        yield Planted(
            f"lift: {entry.plant.__name__}",
            (entry.caught_by,),
            lambda patch, plant=entry.plant: plant(patch.setattr),  # type: ignore[misc]
            lambda seed: words_of(lift_cluster.run, seed, errors=lift_cluster.Violation),
        )


def of_fence() -> Iterator[Planted]:
    for method, bug, invariant in test_fence.PLANTS:
        yield Planted(
            f"fence: {bug.__name__}",
            (invariant,),
            lambda patch, method=method, bug=bug: patch.setattr(FenceEngine, method, bug),  # type: ignore[misc]
            lambda seed: words_of(fence_cluster.run, seed, errors=fence_cluster.Violation),
        )


def of_comm() -> Iterator[Planted]:
    for entry in test_comm.PLANTS:

        def plant(patch: pytest.MonkeyPatch, entry: test_comm.Plant = entry) -> None:
            test_comm.mutate(patch, entry.method, entry.old, entry.new)
            if entry.also is not None:
                test_comm.mutate(patch, *entry.also)

        yield Planted(f"comm: {entry.name}", (entry.caught_by,), plant, test_comm.violation)


def of_dlm() -> Iterator[Planted]:
    for bug, invariants in test_dlm.PLANTS.items():
        yield Planted(
            f"dlm: {bug.__name__}",
            invariants,
            bug,
            lambda seed: words_of(dlm_cluster.run, seed),
            range(test_dlm.PLANT_SEEDS),
        )


def of_gfs() -> Iterator[Planted]:
    for name, bug in gfs_plants.PLANTS.items():
        yield Planted(
            f"gfs: {name}",
            ("",),
            bug,
            lambda seed: words_of(gfs_crash.run, seed, errors=GFS_ERRORS, operations=160, cuts=8),
        )
    for name, bug in gfs_plants.NODE_PLANTS.items():
        yield Planted(
            f"gfs nodes: {name}",
            ("",),
            bug,
            lambda seed: words_of(gfs_nodes.run, seed, errors=GFS_ERRORS, kind=("kill", "sequential")[seed % 2]),
        )


def of_nodes() -> Iterator[Planted]:
    for entry in node_plants.PLANTS:

        def verdict(seed: int, body: Body = entry.body) -> str:
            said = words_of(run_body, seed, body, errors=Failed)
            return said[max(said.find("SIM-"), 0) :]  # before it stands where and when

        yield Planted(f"nodes: {entry.plant.__name__}", entry.caught_by, entry.plant, verdict)


def of_fuzz() -> Iterator[Planted]:
    for target in targets():
        yield Planted(
            f"fuzz: {target.name}",
            (target.name,),
            lambda _patch: None,  # the canary brings its own
            lambda case, target=target: words_of(run_case, target, case, canary=True, errors=Finding),  # type: ignore[misc]
            range(400),
        )


def of_world() -> Iterator[Planted]:
    checks = {each.__name__: each for each in world_suite.CHECKS}
    for name, bug in test_world_plants.PLANTS:

        def verdict(_seed: int, name: str = name) -> str:
            with tempfile.TemporaryDirectory() as directory:
                laboratory = RealLaboratory(Path(directory))
                errors = (AssertionError, OSError, pytest.fail.Exception)
                said = words_of(laboratory.run, checks[name], errors=errors)
                laboratory.close()
            return f"{name}: {said}" if said else ""

        def plant(patch: pytest.MonkeyPatch, bug: Callable[[pytest.MonkeyPatch], None] = bug) -> None:
            patch.setattr(world_suite, "PATIENCE", 1.0)
            bug(patch)

        yield Planted(f"world: {bug.__name__}", (name,), plant, verdict, range(1))


SOURCES: Final = (of_cman, of_lift, of_fence, of_comm, of_dlm, of_gfs, of_nodes, of_fuzz, of_world)


# --- the table -------------------------------------------------------------------------------------------------------


def names(words: str, invariant: str) -> bool:
    """Is this verdict about that invariant? CMAN-10 does not name CMAN-1."""
    after = words[len(invariant) :][:1]
    return words.startswith(invariant) and not (invariant[-1:].isdigit() and after.isdigit())


def catch(planted: Planted) -> tuple[int, str]:
    """The seed at which it was caught and the words, or -1 and the last words that were about something else."""
    last = "nothing was noticed"
    with pytest.MonkeyPatch.context() as patch:
        planted.plant(patch)
        for seed in planted.seeds:
            words = planted.verdict(seed)
            if words and any(names(words, invariant) for invariant in planted.caught_by):
                return seed, words
            last = words or last
    return -1, last


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.plants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="plants whose name contains this")
    asked = parser.parse_args()
    missed = 0
    for source in SOURCES:
        for planted in source():
            if asked.only not in planted.name:
                continue
            began = monotonic()
            seed, words = catch(planted)
            missed += seed < 0
            where = f"seed {seed}" if seed >= 0 else "NOT CAUGHT"
            invariant = " or ".join(filter(None, planted.caught_by)) or "any"
            figures = f"{planted.name:58} {where:>10} {monotonic() - began:6.1f} s"
            print(f"{figures}  {invariant}; said: {words[:80]}", flush=True)
    print(f"{missed} plants were not caught" if missed else "every plant was caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
