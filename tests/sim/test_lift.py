"""Recovery control under random faults, and every checker against the bug it exists for."""

import subprocess
import sys

import pytest

from tests.sim import lift_cluster
from tests.sim.lift_plants import PLANTS, Plant

SEEDS = range(300)
PLANT_SEEDS = range(50)


def test_no_violation() -> None:
    total: dict[str, int] = {}
    for seed in SEEDS:
        try:
            counts = lift_cluster.Cluster(seed).go().counts
        except AssertionError as error:
            raise AssertionError(f"python -m tests.sim.lift_cluster {seed}: {error}") from error
        for what, number in counts.items():
            total[what] = total.get(what, 0) + number
    wanted = ("rounds", "finished", "settled", "left", "refused", "evicted", "excluded", "active views", "joined again")
    assert all(total.get(what) for what in wanted), f"these runs tested too little: {total}"


def test_a_seed_is_one_story() -> None:
    """In another process, with another hash seed."""
    code = "from tests.sim.lift_cluster import run; print([run(seed) for seed in range(20)])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.plant.__name__)
def test_a_planted_bug_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant.plant(monkeypatch.setattr)
    verdicts: list[str] = []
    for seed in PLANT_SEEDS:
        try:
            lift_cluster.run(seed)
        except lift_cluster.Violation as error:  # the checker's word, not the engine's own assert
            verdicts.append(str(error))
            if str(error).startswith(f"{plant.caught_by}:"):
                return
        except AssertionError as error:
            verdicts.append(f"the engine: {error}")
    raise AssertionError(f"{plant.caught_by} was never named: {verdicts}")
