"""The parts of the live comparison with Linux that need no Linux."""

import json
import sys
from pathlib import Path

import pytest
from tests.oracle import __main__ as command
from tests.oracle import boot, driver
from tests.oracle.compare import compare, stable
from tests.oracle.generate import CONVERT, MODES, REQUEST, UNLOCK, run

from corral.api import dlm

# --- runs ------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run():
    assert run(5) == run(5)
    assert run(5) != run(6)


def test_runs_use_every_mode_and_every_flag_alone_and_together():
    operations = [operation for seed in range(60) for operation in run(seed)]
    locks = [operation for operation in operations if operation[0] == "lock"]
    converts = [operation for operation in operations if operation[0] == "convert"]
    unlocks = [operation for operation in operations if operation[0] == "unlock"]
    assert {mode for _, _, _, mode, _ in locks} == {mode for _, _, mode, _, _ in converts} == set(MODES)
    for flags, known in (
        ([operation[4] for operation in locks], (*REQUEST, dlm.EXPEDITE)),
        ([operation[3] for operation in converts], CONVERT),
        ([operation[2] for operation in unlocks], UNLOCK),
    ):
        assert all(any(each & flag for each in flags) for flag in known)
        assert max(each.bit_count() for each in flags) >= 3
    assert any(operation[0] == "cancel" for operation in operations)


def test_a_value_comes_with_valblk_only_and_locks_are_named_before_they_are_used():
    for seed in range(20):
        named = set()
        for kind, name, *rest in run(seed):
            if kind == "lock":
                named.add(name)
            assert name in named
            if kind in ("convert", "unlock"):
                flags, value = rest[-2:]
                assert (value is not None) == bool(flags & dlm.VALBLK)


# --- the driver ------------------------------------------------------------------------------------------------------


class Grants:
    """In the place of libdlm: completes each call with what `outcomes` has for it, and fills the block with `text`."""

    def __init__(self, outcomes, text=b""):
        self.outcomes, self.text = iter(outcomes), text
        self.calls, self.due = [], []

    def lock(self, mode, block, flags, name, number):
        return self.called("lock", number, block, flags)

    def unlock(self, block, flags, number):
        return self.called("unlock", number, block, flags)

    def called(self, kind, number, block, flags):
        self.calls.append((kind, number, flags))
        result, status = next(self.outcomes, (0, driver.EUNLOCK))
        block.status = status or 0
        block.id = block.id or number + 1
        if status is not None:
            self.due.append(number)
        return result

    def until_quiet(self):
        for number in self.due:
            lock = driver.player.locks[number]
            if self.text:
                lock.memory.raw = self.text.ljust(driver.BLOCK, b"\0")
            driver.COMPLETED(number)
        self.due.clear()


def driven(operations, library):
    driver.player = driver.Player(library, "1.0")
    return driver.player.play(operations)


def test_what_a_call_returns_and_what_follows_is_a_step():
    steps = driven([["lock", 0, 0, "EX", 0], ["convert", 0, "PW", 8, "v1"]], Grants([(0, 0), (-16, None)]))
    assert steps == [
        [["lock", 0, 0, "EX", 0], [0, [0, "ast", 0, 0, ""]]],
        [["convert", 0, "PW", 8, "v1"], [-16]],
    ]


def test_an_ended_lock_is_not_called_any_more():
    library = Grants([(0, -11), (0, 0), (0, driver.EUNLOCK)])
    operations = [
        ["lock", 0, 0, "EX", 1],
        ["cancel", 0],
        ["lock", 1, 0, "EX", 0],
        ["unlock", 1, 0, None],
        ["cancel", 1],
    ]
    steps = driven(operations, library)
    assert [operation for operation, _ in steps] == [operations[0], operations[2], operations[3]]
    assert steps[0][1] == [0, [0, "ast", "EAGAIN", 0, ""]]
    assert [kind for kind, *_ in library.calls] == ["lock", "lock", "unlock"]  # and none is left to end


def test_locks_that_are_left_are_ended_by_force():
    library = Grants([(0, 0)])
    driven([["lock", 0, 0, "EX", 0]], library)
    assert library.calls[1:] == [("unlock", 0, driver.FORCEUNLOCK)]


def test_a_value_that_nobody_wrote_is_undefined():
    ((_, (_, granted)),) = driven([["lock", 0, 0, "EX", 8]], Grants([(0, 0)], text=b"what was on the stack"))
    assert granted == [0, "ast", 0, 0, "<undefined>"]


# --- what is kept and compared ----------------------------------------------------------------------------------------

TAKEN = [["lock", 0, 0, "EX", 0], [0, [0, "ast", 0, 0, ""]]]
WAITS = [["lock", 1, 0, "PR", 0], [0, [0, "bast"]]]
PASSED_ON = [["unlock", 0, 0, None], [0, [0, "ast", 65538, 0, ""], [1, "ast", 0, 0, ""]]]
TURNED = [["unlock", 0, 0, None], [0, [1, "ast", 0, 0, ""], [0, "ast", 65538, 0, ""]]]
STRANGE = [["unlock", 0, 0, None], [0, [0, "ast", 65538, 0, "other"], [1, "ast", 0, 0, ""]]]
LATE = [["unlock", 0, 0, None], [0, [0, "ast", 65538, 0, ""]]]


def test_the_order_within_a_step_is_nobodys_business():
    steps, unstable = stable([[TAKEN, WAITS, PASSED_ON], [TAKEN, WAITS, TURNED]])
    assert ([len(step[1]) for step in steps], unstable) == ([2, 2, 3], False)


def test_a_value_that_is_not_the_same_each_time_is_undefined():
    steps, unstable = stable([[TAKEN, WAITS, PASSED_ON], [TAKEN, WAITS, STRANGE]])
    assert (steps[2][1][1], unstable) == ([0, "ast", 65538, 0, "<undefined>"], False)


def test_a_run_ends_before_the_first_step_that_was_not_the_same_each_time():
    assert stable([[TAKEN, WAITS, PASSED_ON], [TAKEN, WAITS, LATE]]) == ([TAKEN, WAITS], True)
    assert stable([[TAKEN, WAITS], [TAKEN]]) == ([TAKEN], True)
    assert stable([[TAKEN, WAITS], [TAKEN, TURNED]]) == ([TAKEN], True)


def test_a_difference_is_told_with_run_step_expected_and_got():
    right = compare({"seed": 4, "recordings": [[TAKEN, WAITS]] * 3})
    assert (right.mismatches, right.run) == ([], {"seed": 4, "steps": [TAKEN, WAITS]})
    silent = [WAITS[0], [0]]
    (mismatch,) = compare({"seed": 4, "recordings": [[TAKEN, silent]] * 3}).mismatches
    assert str(mismatch) == 'run 4 step 1 ["lock", 1, 0, "PR", 0]: expected [0], got [0, [0, "bast"]]'


# --- the guest and the command ----------------------------------------------------------------------------------------


def stands_in(tmp_path, script):
    """A guest that is a shell command."""
    guest = boot.Guest(tmp_path, [{"seed": 1, "operations": run(1)}])
    guest.command = ["sh", "-c", script]
    return guest


def test_records_are_read_as_they_come(tmp_path):
    script = f"cd {tmp_path}; echo '[1]' > record.jsonl; sleep 0.3; echo '[2]' >> record.jsonl; echo done > outcome"
    with stands_in(tmp_path, script) as guest:
        assert list(guest.records()) == [[1], [2]]
    assert json.loads((tmp_path / "plan.jsonl").read_text())["operations"] == run(1)


def test_a_guest_that_fails_says_why(tmp_path):
    with (
        stands_in(tmp_path, f"echo 'no dlm' > {tmp_path}/outcome") as guest,
        pytest.raises(boot.GuestFailed, match="no dlm"),
    ):
        list(guest.records())


def test_a_guest_that_dies_or_hangs_is_noticed_and_ended(tmp_path, monkeypatch):
    with stands_in(tmp_path, "exit 3") as guest, pytest.raises(boot.GuestFailed, match="did not come up"):
        list(guest.records())
    monkeypatch.setattr(boot, "SILENCE_SECONDS", 0.3)
    with stands_in(tmp_path, "sleep 60") as guest, pytest.raises(boot.GuestFailed, match="nothing heard"):
        list(guest.records())
    assert guest.process.returncode is not None


def test_where_something_is_missing_it_is_skipped_with_the_reason(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(boot, "PATH", str(tmp_path))
    assert command.main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("skipped: these Debian packages are not installed: corosync dlm-controld")
    monkeypatch.setattr(boot, "PROGRAMS", {})
    monkeypatch.setattr(boot, "LIBRARIES", tmp_path)
    assert boot.missing() == "these Debian packages are not installed: libdlm3"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "libdlm_lt.so.3").touch()
    monkeypatch.setattr(boot, "MODULES", tmp_path)
    assert "no dlm module" in boot.missing()
    module = tmp_path / "6.1" / "kernel" / "fs" / "dlm" / "dlm.ko"
    module.parent.mkdir(parents=True)
    module.touch()
    monkeypatch.setattr(boot, "MEMORY_DIRECTORY", tmp_path / "none")
    assert "is not writable" in boot.missing()
    monkeypatch.setattr(boot, "MEMORY_DIRECTORY", tmp_path)
    assert boot.missing() == ""


def test_the_driver_needs_nothing_but_the_standard_library():
    source = Path(driver.__file__).read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= sys.stdlib_module_names
