"""Recipes on simulated nodes, a fault after the other: a few fresh seeds, and those that once failed."""

from pathlib import Path

from corral.sim import harness
from tests.sim import recipes

SEEDS = Path(__file__).parent / "seeds.txt"


def test_what_members_saw_is_as_if_one_had_done_it_all() -> None:
    for outcome in harness.run_seeds("recipes.shared", recipes.shared, SEEDS, fresh=1):
        assert outcome.result["operations"] > 1000
