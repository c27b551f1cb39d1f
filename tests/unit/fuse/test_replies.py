"""What the kernel is answered: structure sizes, times before 1970, directory records."""

import struct

from corral.api.gfs import Attributes, Dirent, Entry
from corral.fuse import replies

SECOND = 1_000_000_000


def attributes(ino: int = 7) -> Attributes:
    return Attributes(ino, 0o100644, 1, 2, 3, 0, 4, 8, atime_ns=-1, mtime_ns=5 * SECOND + 6, ctime_ns=-2 * SECOND)


def test_times_before_1970_keep_a_positive_nanosecond_part() -> None:
    payload = replies.attributes_out(attributes(), 1_500_000_000)
    assert struct.unpack_from("=QI", payload) == (1, 500_000_000)
    assert struct.unpack_from("=qqq", payload, 16 + 24) == (-1, 5, -2)
    assert struct.unpack_from("=III", payload, 16 + 48) == (999_999_999, 6, 0)


def test_entry_timeouts_are_zero_when_they_must_be() -> None:
    entry = Entry(7, 9, attributes(), entry_valid_ns=3 * SECOND + 1, attr_valid_ns=4 * SECOND + 2)
    believed = replies.entry_out(entry, entry_timeouts=True)
    assert struct.unpack_from("=QQQQII", believed) == (7, 9, 3, 4, 1, 2)
    assert struct.unpack_from("=QQQQII", replies.entry_out(entry, entry_timeouts=False)) == (7, 9, 0, 4, 0, 2)


def test_directory_records_are_padded_and_fit() -> None:
    entries = [Dirent(b"x" * length, 100 + length, 8, length) for length in range(1, 20)]
    payload, count = replies.directory(entries, 200, plus=False, entry_timeouts=True)
    assert len(payload) <= 200
    assert len(payload) % 8 == 0
    assert _names(payload) == [entry.name for entry in entries[:count]]
    assert len(payload) + 24 + len(entries[count].name) > 200


def test_readdirplus_tells_which_nodes_the_kernel_would_count() -> None:
    entries = [
        Dirent(b".", 1, 4, 1),
        Dirent(b"file", 7, 8, 2, Entry(7, 1, attributes(7))),
        Dirent(b"a longer name", 9, 8, 3, Entry(9, 1, attributes(9))),
    ]
    payload, count = replies.directory(entries, 4096, plus=True, entry_timeouts=True)
    assert count == 3
    assert replies.directory_nodes(payload) == [7, 9]


def _names(payload: bytes) -> list[bytes]:
    names, at = [], 0
    while at < len(payload):
        length = struct.unpack_from("=I", payload, at + 16)[0]
        names.append(payload[at + 24 : at + 24 + length])
        at += (24 + length + 7) // 8 * 8
    return names
