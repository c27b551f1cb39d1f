"""The campaign's record and its going on; and every engine's seeds that once failed."""

import json
from pathlib import Path

import pytest

from corral.base.time import SECOND
from corral.sim import harness
from tests.sim.campaign import BODIES, SEEDS, Body, Campaign, Run, next_seed, read_results, report, seeds_run


class Counted(Body):
    """A body of two virtual seconds that fails at seed 3."""

    def run(self, seed: int, trace: Path | None = None) -> Run:
        if seed == 3:
            raise AssertionError("X-1: broken\nand more")
        return Run(2 * SECOND, 1, 10)


def campaign_of(tmp_path: Path, commit: str = "abc") -> Campaign:
    body = Counted("", 8, 4, False)
    return Campaign(tmp_path / "campaign" / "results.jsonl", tmp_path / "seeds.txt", commit, {"comm": body})


def test_it_goes_on_where_it_stopped_and_keeps_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = campaign_of(tmp_path)
    first.batch("comm", next_seed(read_results(first.results), "comm"), 1e18)
    with first.results.open("a") as file:
        file.write('{"commit": "abc", "bo')  # its writer was killed
    assert json.loads(first.results.read_text().splitlines()[0]) | {"cpu_seconds": 0} == {
        "commit": "abc",
        "body": "comm",
        "first_seed": 1,
        "count": 4,
        "virtual_seconds": 6.0,
        "operations": 30,
        "faults": 3,
        "cpu_seconds": 0,
        "failures": [{"seed": 3, "error": "AssertionError: X-1: broken\nand more"}],
    }
    assert harness.kept_seeds(first.seeds, "comm") == [3]
    assert "FAILED comm 3: AssertionError: X-1: broken\n    make sim BODY=comm SEED=3" in capsys.readouterr().out
    results = read_results(first.results)
    assert (next_seed(results, "comm"), seeds_run(results, "comm", "abc"), seeds_run(results, "comm", "def")) == (
        5,
        4,
        0,
    )
    assert "failed at abc: comm 3: AssertionError: X-1: broken" in report(results).splitlines()
    first.batch("comm", 5, 1e18)
    assert seeds_run(read_results(first.results), "comm") == 8


def test_what_failed_once_is_run_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = campaign_of(tmp_path)
    harness.keep_seed(one.seeds, "comm", 2)
    one.kept()
    assert one.failures == 0
    harness.keep_seed(one.seeds, "comm", 3)
    one.kept()
    assert one.failures == 1
    assert "FAILED comm 3" in capsys.readouterr().out


def test_sigint_ends_it_after_the_seed_at_work(tmp_path: Path) -> None:
    one = campaign_of(tmp_path)
    one.stop()
    one.go(1e18)
    assert read_results(one.results) == []


@pytest.mark.parametrize("name", [name for name in BODIES if not BODIES[name].whole])
def test_the_seeds_of_an_engine_that_once_failed_and_one_more(name: str) -> None:
    for seed in [*harness.kept_seeds(SEEDS, name), 7]:
        run = BODIES[name].run(seed)
        assert run.operations > 0
        assert run.faults > 0
