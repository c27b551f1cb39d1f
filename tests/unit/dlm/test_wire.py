"""The page that tells the messages, and the bytes of version 1, against the code."""

import re
import typing
from pathlib import Path

import msgspec
import pytest

from corral.api.dlm import LockInfo, ResourceInfo
from corral.base.ids import MemberId
from corral.dlm import wire

PAGE = Path(__file__).parents[3] / "docs/design/dlm-wire.md"
TYPES = {bytes: "bytes", int: "int", bool: "bool", bytes | None: "bytes or nil", MemberId: "MemberId"}
TYPES |= {tuple[int, int] | None: "(int, int) or nil"}
TYPES |= {list[bytes]: "array of bytes", list[MemberId]: "array of MemberId"}
TYPES |= {list[wire.RecoverLock]: "array of RecoverLock", list[LockInfo]: "array of LockInfo"}
TYPES |= {MemberId | None: "MemberId or nil", ResourceInfo | None: "ResourceInfo or nil"}


def told():
    """Name -> (number, [(index, field, type)]) as the page says."""
    messages = {}
    for line in PAGE.read_text().splitlines():
        if head := re.match(r"## (?:(\d+) )?(\w+)", line):
            fields = []
            messages[head[2]] = (int(head[1]) if head[1] else None, fields)
        elif row := re.match(r"\| (\d+) \| (\w+) \| ([^|]+) \|", line):
            fields.append((int(row[1]), row[2], row[3]))
    return messages


def test_the_page_tells_what_is_sent():
    coded = {}
    for kind in (*wire.CODEC.types, wire.RecoverLock, ResourceInfo, LockInfo):
        tag = msgspec.inspect.type_info(kind).tag
        hints = typing.get_type_hints(kind)
        first = 0 if tag is None else 1
        fields = [(index, name, TYPES[hints[name]]) for index, name in enumerate(kind.__struct_fields__, first)]
        coded[kind.__name__] = (tag, fields)
    assert told() == coded


RECORD = wire.RecoverLock(b"n", 5, 5, 3, -1, 8, 2, 9, b"v" * 8, 4, True, (0, 9))
INFO = LockInfo(MemberId(1, 2, 3), 4, 5, 5, 32, 3, -1, 7, None, (1, 2))
REPORT = ResourceInfo(b"n", MemberId(1, 2, 3), 1, 0, 0, b"v", True, 4, [INFO])
VERSION_1 = [
    (wire.Request(1, 1, b"n", 5, 8, 1, None, True), "9a01 0101c4016e050801c0c3c0"),
    (wire.Request(1, 1, b"n", 5, 8, 1, None, True, (0, 255)), "9a01 0101c4016e050801c0c39200ccff"),
    (wire.Convert(1, 2, 3, 8, b"v"), "9702 010203 08c40176c0"),
    (wire.Unlock(1, 3, 8, None), "9503 010308c0"),
    (wire.Cancel(1, 3), "9304 0103"),
    (
        wire.Completed(1, 3, 0, 2, 5, 1 << 32, b"v", 7, True),
        "9b05 0103000205cf0000000100000000c4017607c3c0",
    ),
    (wire.Blocking(1, 5), "9306 0105"),
    (wire.Master(b"n", MemberId(1, 2, 3), 4), "9407 c4016e9301020304"),
    (wire.NotMaster(1, 1), "9308 0101"),
    (wire.Remove(b"n", 4), "9309 c4016e04"),
    (wire.Names([b"n"]), "920a 91c4016e"),
    (wire.Claim([b"n"]), "920b 91c4016e"),
    (wire.Masters([b"n"], [MemberId(1, 2, 3)]), "930c 91c4016e9193010203"),
    (wire.RecoverLocks([RECORD]), "920d 919dc4016e050503ff080209c408767676767676767604c3920009c0"),
    (wire.Reached(3, 32), "930e 0320"),
    (wire.Purge(1, 7), "930f 0107"),
    (wire.Purged(1), "9210 01"),
    (wire.Query(1, b"n", 0x638, -1, 9), "9611 01c4016ecd0638ff09"),
    (
        wire.Queried(1, 0, REPORT, None),
        "9512 010099c4016e93010203010000c40176c304919a93010203040505 2003ff07 c0920102 c0",
    ),
]


@pytest.mark.parametrize(("message", "golden"), VERSION_1, ids=lambda value: type(value).__name__)
def test_the_bytes_of_version_1(message, golden):
    payload = bytes.fromhex(golden)
    assert wire.CODEC.encode(message) == payload
    assert wire.CODEC.decode(payload) == message


def test_what_was_told_without_ranges_is_about_everything():
    assert wire.CODEC.decode(bytes.fromhex("9901 0101c4016e050801c0c3")).range is None
    assert wire.CODEC.decode(bytes.fromhex("9602 010203 08c40176")).range is None


def test_every_message_has_golden_bytes():
    assert {type(message) for message, _ in VERSION_1} == set(wire.CODEC.types)
