"""The same seed takes the same course; and the check that says so catches an accident that was planted."""

from pathlib import Path

import pytest

from corral.sim.harness import (
    Failed,
    NotDeterministic,
    keep_seed,
    kept_seeds,
    nasty,
    replay,
    run,
    run_elsewhere,
    run_seeds,
)
from corral.sim.simulation import Simulation

from . import story

HERE = story.__name__


@pytest.mark.parametrize("seed", range(6))
def test_a_seed_takes_the_same_course_twice(seed: int) -> None:
    outcome = replay(seed, story.body, knobs=nasty(seed))
    assert outcome.events > 500


def test_different_seeds_take_different_courses() -> None:
    assert len({run(seed, story.body).digest for seed in range(4)}) == 4


def test_a_seed_takes_the_same_course_in_processes_with_other_hash_seeds() -> None:
    here = run(11, story.body)
    assert here.course == run_elsewhere(f"{HERE}:body", 11, hash_seed=1).course
    assert here.course == run_elsewhere(f"{HERE}:body", 11, hash_seed=2).course


def test_the_iteration_of_a_set_is_caught_between_hash_seeds() -> None:
    courses = {run_elsewhere(f"{HERE}:hash_canary", 11, hash_seed=hash_seed).course for hash_seed in (1, 2)}
    assert len(courses) > 1


def test_a_question_to_the_outside_is_caught_by_replay_and_the_first_difference_is_shown() -> None:
    with pytest.raises(NotDeterministic, match=r"entry \d+ is"):
        replay(11, story.chance_canary)


def test_a_failure_says_how_to_see_it_again_and_what_happened_last() -> None:
    async def body(sim: Simulation) -> None:
        sim.machine(1)
        sim.note("the last thing")
        raise AssertionError("CMAN-1")

    with pytest.raises(Failed) as caught:
        run(8841, body)
    first, *tail = str(caught.value).splitlines()
    assert first.startswith("seed=8841 commit=")
    assert first.endswith("AssertionError: CMAN-1")
    assert tail[-1].endswith("body the last thing")


def test_the_whole_story_goes_to_a_file(tmp_path: Path) -> None:
    outcome = run(3, story.body, trace_to=tmp_path / "story")
    assert len((tmp_path / "story").read_text().splitlines()) == outcome.events


def test_failed_seeds_are_kept_once_and_run_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEED", raising=False)
    path = tmp_path / "seeds.txt"
    path.write_text("# name seed\nother 1\nmine 5  # a deadlock\n")

    async def body(sim: Simulation) -> None:
        assert sim.seed < 10

    with pytest.raises(Failed):
        run_seeds("mine", body, path, fresh=1000)
    kept = kept_seeds(path, "mine")
    assert kept[0] == 5
    assert kept[1] >= 10
    keep_seed(path, "mine", 5)
    assert kept_seeds(path, "mine") == kept
    assert kept_seeds(path, "other") == [1]
    assert [outcome.seed for outcome in run_seeds("other", body, path, fresh=0)] == [1]
    path.write_text("mine five\n")
    with pytest.raises(ValueError, match=r"seeds\.txt:1"):
        kept_seeds(path, "mine")
