"""The Linux kernel's own DLM is the oracle: its recorded runs, and `corral dlm replay`, which plays them."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from corral.cli.main import main
from corral.dlm.replay import Malformed, replay, runs

TRACES = Path(os.environ.get("CORRAL_DLM_GOLDEN", Path(__file__).parent / "golden"))


@pytest.mark.parametrize("trace", sorted(TRACES.glob("*.jsonl")), ids=lambda path: path.stem)
def test_every_recorded_run_is_reproduced(trace):
    replayed = [replay(run) for run in runs(trace.read_text())]
    assert [str(mismatches[0]) for mismatches, _ in replayed if mismatches] == []
    assert [str(parting) for _, parting in replayed if parting] == []


def test_a_replay_that_differs_is_noticed():
    run = {"seed": 1, "steps": [[["lock", 0, 0, "EX", 0], [0, [0, "ast", 0, 0, ""]]], [["lock", 1, 0, "PR", 1], [0]]]}
    (mismatch,), _ = replay(run)
    assert (mismatch.step, mismatch.got) == (1, [0, [1, "ast", "EAGAIN", 0, ""]])


# What the kernel's device does and the recordings at hand do not show.


def same(*steps):
    mismatches, parting = replay({"seed": 0, "steps": list(steps)})
    assert [str(mismatch) for mismatch in mismatches] == []
    assert parting is None


def test_a_conversion_of_a_busy_lock_is_refused_and_its_block_is_what_the_waiting_one_writes():
    same(
        [["lock", 0, 0, "PW", 8], [0, [0, "ast", 0, 0, ""]]],
        [["lock", 1, 0, "CR", 0], [0, [1, "ast", 0, 0, ""]]],
        [["convert", 0, "EX", 8, "first"], [0, [1, "bast"]]],  # reads, but there is no value to read yet
        [["convert", 0, "NL", 8, "second"], [-16]],
        [["unlock", 1, 0, None], [0, [1, "ast", 65538, 0, ""], [0, "ast", 0, 0, "second"]]],
    )


def test_what_is_illegal_is_so_of_a_busy_lock_too():
    same(
        [["lock", 0, 0, "EX", 0], [0, [0, "ast", 0, 0, ""]]],
        [["lock", 1, 0, "EX", 0], [0, [0, "bast"]]],
        [["convert", 1, "NL", 0, None], [-16]],
        [["convert", 1, "NL", 1024, None], [-22]],
        [["convert", 1, "EX", 64 | 1, None], [-22]],
        [["convert", 1, "EX", 16, None], [-16]],  # but whether it may queue behind others is asked of an idle lock
        [["unlock", 0, 1, None], [-22]],
    )


def test_a_plain_unlock_ends_a_lock_that_waits():
    same(
        [["lock", 0, 0, "EX", 0], [0, [0, "ast", 0, 0, ""]]],
        [["lock", 1, 0, "EX", 0], [0, [0, "bast"]]],
        [["unlock", 1, 0, None], [0, [1, "ast", 65538, 0, ""]]],
        [["unlock", 1, 0, None], [-2]],
    )


def test_an_unlock_takes_no_flags_from_a_refused_conversion():
    same(
        [["lock", 0, 0, "EX", 8], [0, [0, "ast", 0, 0, ""]]],
        [["convert", 0, "EX", 8, "one"], [0, [0, "ast", 0, 0, "one"]]],
        [["convert", 0, "EX", 0, None], [0, [0, "ast", 0, 0, "one"]]],
        [["convert", 0, "PR", 16 | 8, "two"], [-22]],
        [["unlock", 0, 0, None], [0, [0, "ast", 65538, 0, "two"]]],
    )


def test_a_cancelled_conversion_that_was_demoted_is_null_for_the_program_as_well():
    same(
        [["lock", 0, 0, "PR", 0], [0, [0, "ast", 0, 0, ""]]],
        [["lock", 1, 0, "PR", 8], [0, [1, "ast", 0, 0, ""]]],
        [["convert", 0, "EX", 0, None], [0, [1, "bast"]]],
        [["convert", 1, "EX", 64 | 8, "x"], [0, [0, "ast", 0, 0, ""], [0, "bast"]]],
        [["cancel", 1], [0, [1, "ast", 65537, 0, "x"]]],
        [["convert", 1, "NL", 0, None], [0, [1, "ast", 0, 0, ""]]],
    )


def test_a_block_that_only_a_refused_conversion_handed_over_is_not_written():
    same(
        [["lock", 0, 0, "PW", 0], [0, [0, "ast", 0, 0, ""]]],
        [["convert", 0, "CW", 16 | 8, "refused"], [-22]],
        [["lock", 1, 0, "CR", 8], [0, [1, "ast", 0, 0, ""]]],
        [["unlock", 0, 8, "lost"], [0, [0, "ast", 65538, 0, "lost"]]],
        [["convert", 1, "PR", 8, "mine"], [0, [1, "ast", 0, 0, "mine"]]],
    )


def test_a_lock_that_was_refused_is_unknown_to_the_kernel_and_to_libdlm():
    same(
        [["lock", 0, 0, "NL", 16], [-22]],
        [["convert", 0, "NL", 0, None], [-2]],
        [["cancel", 0], [-22]],
        [["unlock", 0, 0, None], [-22]],
    )


FORGETTING = [
    [["lock", 0, 0, "PR", 0], [0, [0, "ast", 0, 0, ""]]],
    [["lock", 1, 0, "NL", 0], [0, [1, "ast", 0, 0, ""]]],
    [["lock", 2, 0, "PR", 0], [0, [2, "ast", 0, 0, ""]]],
    [["convert", 1, "EX", 256, None], [0, [0, "bast"], [2, "bast"]]],
    [["convert", 0, "CW", 256 | 32768, None], [0]],
    [["unlock", 1, 0, None], [0, [0, "ast", 0, 4, ""], [0, "ast", 0, 4, ""], [1, "ast", 65538, 0, ""]]],
    [["lock", 3, 0, "CW", 1], [0, [3, "ast", 0, 0, ""]]],
]


def test_a_run_parts_where_linux_forgets_what_a_lock_holds():
    assert replay({"seed": 7, "steps": FORGETTING}) == ([], (7, 5))


# --- the command -----------------------------------------------------------------------------------------------------

GOOD = {"seed": 3, "steps": [[["lock", 0, 0, "EX", 0], [0, [0, "ast", 0, 0, ""]]]]}
BAD = {"seed": 4, "steps": [[["lock", 0, 0, "EX", 0], [0, [0, "ast", 0, 2, ""]]]]}


def played(tmp_path, *lines, json_too=False):
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return CliRunner().invoke(main, ["dlm", "replay", str(file), *(["--json"] if json_too else [])])


def test_the_command_counts_runs(tmp_path):
    done = played(tmp_path, GOOD, GOOD)
    assert (done.exit_code, done.stdout) == (0, "2 passed, 0 failed\n")


def test_the_command_prints_each_mismatch_and_fails(tmp_path):
    done = played(tmp_path, GOOD, BAD)
    assert done.exit_code == 1
    first, last = done.stdout.splitlines()
    assert first.endswith(
        'run 4 step 0 ["lock", 0, 0, "EX", 0]: expected [0, [0, "ast", 0, 2, ""]], got [0, [0, "ast", 0, 0, ""]]'
    )
    assert last == "1 passed, 1 failed"
    document = json.loads(played(tmp_path, GOOD, BAD, json_too=True).stdout)
    assert (document["passed"], document["failed"], document["mismatches"][0]["seed"]) == (1, 1, 4)


def test_the_command_says_where_a_run_parts(tmp_path):
    run = {"seed": 7, "steps": FORGETTING}
    done = played(tmp_path, run)
    assert (done.exit_code, done.stdout) == (0, "1 passed, 0 failed\n")
    assert "run 7 step 5: from here" in done.stderr
    assert json.loads(played(tmp_path, run, json_too=True).stdout)["partings"] == [{"seed": 7, "step": 5}]


@pytest.mark.parametrize("line", ['{"seed": 1', "[]", '{"seed": 1, "steps": [[["dance", 0], [0]]]}', '{"steps": []}'])
def test_a_file_that_is_no_recording_is_named_in_one_sentence(tmp_path, line):
    done = played(tmp_path, GOOD, line)
    assert done.exit_code == 1
    assert "is not a recording" in done.stderr
    with pytest.raises(Malformed):
        [replay(run) for run in runs(line)]
