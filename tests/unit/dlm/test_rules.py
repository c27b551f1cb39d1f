"""The tables against those of the manual, what is legal, and the traps by name."""

import pytest
from tests.unit.dlm.dumb import EXCLUDES, ORDER, READS, WRITES

import corral.api.dlm as api
from corral.api.dlm import CR, CW, EX, NL, PR, PW, Request
from corral.base.engine import TICK
from corral.dlm.events import Blocked, ClientGone, Done, Submit
from corral.dlm.modes import COMPATIBLE, QUECVT_LEGAL, VALUE_TRANSFER, check_convert, check_request, check_unlock
from corral.dlm.solo import solo


def test_the_matrices_are_those_of_the_manual():
    for asked, name in enumerate(ORDER):
        for held, other in enumerate(ORDER):
            assert COMPATIBLE[asked][held] == (other not in EXCLUDES[name].split())
    for row, name in enumerate(["new", *ORDER]):
        for column, asked in enumerate(ORDER):
            expected = 1 if asked in READS[name].split() else 0 if asked in WRITES.get(name, "").split() else -1
            assert VALUE_TRANSFER[row][column] == expected
    rising = {NL: {CR, CW, PR, PW, EX}, CR: {CW, PR, PW, EX}, CW: {PR, PW, EX}, PR: {CW, PW, EX}, PW: {EX}, EX: set()}
    for held, legal in rising.items():
        assert {mode for mode in range(6) if QUECVT_LEGAL[held][mode]} == legal


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        (6, 0), (-1, 0), (NL, api.CANCEL), (EX, api.QUECVT), (EX, api.CONVDEADLK), (EX, api.EXPEDITE),
        (NL, api.EXPEDITE | api.NOQUEUE), (NL, 1 << 20), (NL, api.CONVERT),
    ],
)  # fmt: skip
def test_illegal_requests(mode, flags):
    assert check_request(b"r", mode, flags) == -22


def test_illegal_names():
    assert check_request(b"", NL, 0) == check_request(b"x" * 65, NL, 0) == -22
    assert check_request(b"x" * 64, NL, 0) == 0


def test_illegal_conversions_and_unlocks():
    assert check_convert(PR, EX, api.CONVDEADLK | api.NOQUEUE) == -22
    assert check_convert(EX, PR, api.QUECVT) == -22
    assert check_convert(PR, CW, api.QUECVT) == 0
    assert check_convert(NL, NL, api.EXPEDITE) == -22
    assert check_unlock(api.NOQUEUE) == check_unlock(api.CANCEL | api.FORCEUNLOCK) == -22


# --- the traps -------------------------------------------------------------------------------------------------------


class Table:
    """A lockspace at which locks are named by small numbers."""

    def __init__(self):
        self.engine = solo(0, "traps", 8)
        self.cookie = 0

    def __call__(self, handle, op, mode=NL, flags=0, value=None, timeout_ns=0, now=0):
        self.cookie += 1
        asked = Request(op, b"r", mode, flags, value=value, timeout_ns=timeout_ns)
        self.engine.step(now, Submit(1, [(handle, self.cookie, asked)]))
        return self.heard()

    def heard(self):
        said = []
        for event in self.engine.ready().emit:
            if isinstance(event, Done):
                done = event.completion
                said.append((event.handle, done.status, done.value.rstrip(b"\0"), done.value_valid))
            elif isinstance(event, Blocked):
                said.append((event.handle, "bast", event.mode))
        return said


def test_trap_1_values_move_by_the_matrix_and_not_otherwise():
    table = Table()
    table(1, "lock", NL)  # keeps the value alive
    table(2, "lock", EX, api.VALBLK)
    table(2, "convert", PW, api.VALBLK, b"one")
    assert table(2, "convert", EX, api.VALBLK, b"lost") == [(2, 0, b"one", True)], "PW to EX reads"
    assert table(2, "convert", EX, api.VALBLK, b"two") == [(2, 0, b"two", True)], "EX to EX writes"
    table(2, "unlock")
    table(3, "lock", PR, api.VALBLK)
    table(3, "unlock", NL, api.VALBLK, b"never")
    assert table(4, "lock", EX, api.VALBLK) == [(4, 0, b"two", True)], "PR writes nothing"
    table(4, "unlock", NL, api.IVVALBLK)
    assert table(5, "lock", EX, api.VALBLK) == [(5, 0, b"two", False)]
    table(5, "unlock")
    assert table(6, "lock", EX, api.VALBLK) == [(6, 0, b"two", False)], "a plain unlock leaves validity too"


def test_trap_2_null_locks_wait_behind_a_conversion_unless_expedited():
    table = Table()
    table(1, "lock", PR)
    table(2, "lock", PR)
    table(1, "convert", EX)
    assert table(3, "lock", NL) == []
    assert table(4, "lock", NL, api.EXPEDITE) == [(4, 0, b"", True)]


def test_trap_3_compatible_conversions_in_place_overtake_unless_quecvt():
    table = Table()
    for handle in (1, 2, 3):
        table(handle, "lock", CR)
    table(1, "convert", EX)  # waits for the others
    assert (2, 0, b"", True) in table(2, "convert", PR)
    assert table(3, "convert", PR, api.QUECVT) == [(3, -35, b"", True)]
    assert table(3, "convert", PR, api.QUECVT | api.NODLCKWT) == [], "waits behind the first"


def test_trap_4_a_failed_noqueue_request_is_silent_unless_noqueuebast_which_tells_converting_locks_too():
    table = Table()
    table(1, "lock", PR)
    table(2, "lock", PR)
    table(1, "convert", PW)
    assert table(3, "lock", EX, api.NOQUEUE) == [(3, -11, b"", True)]
    said = table(4, "lock", EX, api.NOQUEUE | api.NOQUEUEBAST)
    assert sorted(map(str, said)) == sorted(map(str, [(1, "bast", EX), (2, "bast", EX), (4, -11, b"", True)]))


def test_a_second_cancel_is_illegal_and_one_of_nothing_is_not():
    table = Table()
    table(1, "lock", PR)
    table(2, "lock", PR)
    assert table(1, "cancel") == [(1, 0, b"", True)]
    table(1, "convert", EX)
    assert [status for _, status, *_ in table(1, "cancel")] == [0, api.ECANCEL]
    assert table(1, "cancel")[0][1] == -22


def test_a_timeout_leaves_a_conversion_at_its_old_mode():
    table = Table()
    table(1, "lock", PR)
    table(2, "lock", PR)
    table(1, "convert", EX, timeout_ns=50)
    assert table.engine.deadline == 50
    table.engine.step(50, TICK)
    assert table.heard() == [(1, -110, b"", True)]
    assert table(2, "convert", EX) == [(1, "bast", EX)]


def test_persistent_locks_are_adopted():
    table = Table()
    table(1, "lock", EX, api.PERSISTENT)
    table(2, "lock", EX)
    table.engine.step(0, ClientGone(1))
    assert table.heard() == []
    adopt = Request("lock", b"r", PR, api.ORPHAN)
    table.engine.step(0, Submit(2, [(1, 100, adopt)]))
    assert table.heard()[0][1] == -11, "an orphan, but in another mode"
    adopt = Request("lock", b"r", EX, api.ORPHAN)
    table.engine.step(0, Submit(2, [(1, 101, adopt)]))
    assert table.heard()[0][1] == 0
    table.engine.step(0, Submit(2, [(1, 102, Request("unlock"))]))
    assert table.heard()[0][1] == api.EUNLOCK


def test_the_tables_do_not_grow_with_use():
    table = Table()
    for number_of_lock in range(1, 3000):
        table(number_of_lock, "lock", EX, timeout_ns=10**12)
        table(number_of_lock, "unlock")
    engine = table.engine
    assert engine.space.lock_count == 0
    assert len(engine._timeouts) <= 1024 + 1
    assert len(engine.space.resources) == 1
