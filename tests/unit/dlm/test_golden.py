"""The Linux kernel's own DLM is the oracle: its recorded runs, step by step."""

import json
import os
from pathlib import Path

import pytest

from corral.dlm.replay import replay

TRACES = Path(os.environ.get("CORRAL_DLM_GOLDEN", Path(__file__).parent / "golden"))


@pytest.mark.parametrize("trace", sorted(TRACES.glob("*.jsonl")), ids=lambda path: path.stem)
def test_every_recorded_run_is_reproduced(trace):
    runs = [json.loads(line) for line in trace.read_text().splitlines()]
    mismatches = [next(replay(run), None) for run in runs]
    assert [str(mismatch) for mismatch in mismatches if mismatch] == []


def test_a_replay_that_differs_is_noticed():
    run = {"seed": 1, "steps": [[["lock", 0, 0, "EX", 0], [0, [0, "ast", 0, 0, ""]]], [["lock", 1, 0, "PR", 1], [0]]]}
    (mismatch,) = replay(run)
    assert (mismatch.step, mismatch.got) == (1, [0, [1, "ast", "EAGAIN", 0, ""]])
