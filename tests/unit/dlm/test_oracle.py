"""The parts of the live comparison with Linux that need no Linux."""

import json
import socket
import sys
import threading
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


def test_with_two_nodes_both_read_every_value_at_the_end_and_no_conversion_may_choose_its_mode():
    for seed in range(20):
        *operations, one, two, three, four = run(seed, nodes=2)
        readers = [one, two, three, four]
        assert {(number % 2, resource) for _, number, resource, _, _ in readers} == {(0, 0), (0, 1), (1, 0), (1, 1)}
        assert {tuple(rest) for _, _, _, *rest in readers} == {("NL", dlm.EXPEDITE | dlm.VALBLK)}
        assert not any(each[3] & (dlm.ALTPR | dlm.ALTCW) for each in operations if each[0] == "convert")


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


def driven(operations, library, conversions_wait=False):
    return driver.play([driver.Near(library, conversions_wait)], "1.0", operations)


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


def test_a_busy_lock_is_converted_only_if_it_is_the_one_node():
    operations = [["lock", 0, 0, "EX", 0], ["convert", 0, "NL", 0, None], ["unlock", 0, 0, None]]
    outcomes = [(0, None), (-16, None), (0, driver.EUNLOCK)]
    assert [result[0] for _, result in driven(operations, Grants(outcomes))] == [0, -16, 0]
    del outcomes[1]
    steps = driven(operations, Grants(outcomes), conversions_wait=True)
    assert [operation[0] for operation, _ in steps] == ["lock", "unlock"]


class Node:
    """Hears what `later` has for it, one list each time it is asked."""

    def __init__(self, *later):
        self.later, self.called = iter(later), []

    def begin(self, names):
        pass

    def call(self, operation):
        self.called.append(operation[1])
        return 0

    def events(self):
        return next(self.later, [])

    def end(self):
        self.called.append("end")


def test_each_node_has_its_share_of_the_locks_and_a_step_lasts_until_all_are_quiet():
    one, two = Node([], [[0, "ast"]], [], [[2, "bast"]]), Node([[1, "ast"]], [], [])
    steps = driver.play([one, two], "1.0", [["lock", number, 0, "EX", 0] for number in range(3)])
    assert (one.called, two.called) == ([0, 2, "end"], [1, "end"])
    assert [result for _, result in steps] == [[0, [1, "ast"], [0, "ast"]], [0, [2, "bast"]], [0]]


def test_another_node_answers_line_by_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setattr(driver, "PORT", free.getsockname()[1])
    served = threading.Thread(target=driver.serve, args=(driver.Near(Grants([(0, 0), (-16, None)]), False),))
    served.start()
    far = driver.Far("127.0.0.1")
    far.begin("1.0")
    assert far.call(["lock", 0, 0, "EX", 0]) == 0
    assert far.events() == [[0, "ast", 0, 0, ""]]
    assert far.call(["convert", 0, "EX", 0, None]) == -16
    far.end()
    far.close()
    served.join(10)
    assert not served.is_alive()


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


def test_two_nodes_are_compared_without_blocking_callbacks_and_by_completions():
    waits = [WAITS[0], [0]]
    both = {"seed": 4, "recordings": [[TAKEN, WAITS, PASSED_ON], [TAKEN, waits, TURNED], [TAKEN, WAITS, PASSED_ON]]}
    assert compare(both, 2).mismatches == []
    late = {"seed": 4, "recordings": [[TAKEN, WAITS, LATE]] * 3}
    assert [each.step for each in compare(late, 2).mismatches] == [2]


def test_a_conversion_downwards_is_not_held_to_tell_of_an_invalid_value():
    steps = [
        [["lock", 2, 0, "NL", 8], [0, [2, "ast", 0, 0, ""]]],
        [["lock", 1, 0, "EX", 8], [0, [1, "ast", 0, 0, ""]]],
        [["convert", 1, "EX", 8, "v"], [0, [1, "ast", 0, 0, "v"]]],
        [["convert", 1, "PR", 32, None], [0, [1, "ast", 0, 0, "v"]]],
        [["convert", 1, "NL", 0, None], [0, [1, "ast", 0, 0, ""]]],  # of a value that is not valid: flag 2
        [["lock", 3, 0, "NL", 8], [0, [3, "ast", 0, 2, "v"]]],
    ]
    assert compare({"seed": 4, "recordings": [steps] * 3}, 2).mismatches == []
    assert [each.step for each in compare({"seed": 4, "recordings": [steps] * 3}).mismatches] == [4]
    steps[-1][1][1][3] = 0
    assert [each.step for each in compare({"seed": 4, "recordings": [steps] * 3}, 2).mismatches] == [5]


# --- the guest and the command ----------------------------------------------------------------------------------------


def stands_in(tmp_path, script, count=1):
    """Guests that are a shell command, with the node's number as its $0 and its socket as $1."""
    guests = boot.Guests(tmp_path, [{"seed": 1, "operations": run(1)}], count)
    guests.command = lambda node, network: ["sh", "-c", f"cd {tmp_path}; {script}", str(node), str(network)]
    return guests


def test_records_are_read_as_they_come(tmp_path):
    script = "echo '[1]' > record.jsonl; sleep 0.3; echo '[2]' >> record.jsonl; echo done > outcome.$0"
    with stands_in(tmp_path, script) as guests:
        assert list(guests.records()) == [[1], [2]]
    assert json.loads((tmp_path / "plan.jsonl").read_text())["operations"] == run(1)


def test_two_guests_have_a_socket_between_them(tmp_path):
    script = f"{sys.executable} -c 'import os, sys; f = int(sys.argv[1])\n"
    script += 'os.write(f, b"[7]"); print(os.read(f, 9).decode())\' $1 > record.$0; echo done > outcome.$0'
    with stands_in(tmp_path, script, count=2) as guests:
        assert list(guests.records()) == []
    assert [(tmp_path / f"record.{node}").read_text() for node in (1, 2)] == ["[7]\n", "[7]\n"]


def test_a_guest_that_fails_says_why(tmp_path):
    guests = stands_in(tmp_path, "[ $0 = 1 ] && echo done > outcome.1 || echo 'no dlm' > outcome.2", count=2)
    with guests, pytest.raises(boot.GuestFailed, match="node 2: no dlm"):
        list(guests.records())


def test_a_guest_that_dies_or_hangs_is_noticed_and_ended(tmp_path, monkeypatch):
    with stands_in(tmp_path, "exit 3") as guests, pytest.raises(boot.GuestFailed, match="did not come up"):
        list(guests.records())
    monkeypatch.setattr(boot, "SILENCE_SECONDS", 0.3)
    with stands_in(tmp_path, "sleep 60") as guests, pytest.raises(boot.GuestFailed, match="nothing heard"):
        list(guests.records())
    assert guests.processes[0].returncode is not None


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
