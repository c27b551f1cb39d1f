"""docs/format/wire.md says what the code does: tables compared field by field, and bytes built by hand."""

import re
import struct
from pathlib import Path

import msgspec
import pytest

from corral.comm import seal, wire
from corral.wire import frame
from corral.wire.codec import MESSAGE_MAX

PAGE = (Path(__file__).parents[3] / "docs" / "format" / "wire.md").read_text()
SIZES = {"B": 1, "H": 2, "I": 4, "Q": 8}


def table(heading: str, number: int = 0) -> list[list[str]]:
    """The rows of the n-th table under a heading."""
    section = re.split(r"^#+ ", PAGE.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, flags=re.M)
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in tables[number].splitlines()]
    return rows[2:]


@pytest.mark.parametrize(
    ("heading", "header", "magic"),
    [("Frame header", frame.HEADER, frame.MAGIC), ("Datagrams", seal.HEADER, seal.MAGIC)],
)
def test_headers_have_the_documented_offsets_and_sizes(heading: str, header: struct.Struct, magic: int) -> None:
    rows = table(heading)
    sizes = [int(row[1]) for row in rows]
    assert sizes == [SIZES[letter] for letter in header.format.lstrip("<")]
    assert [int(row[0]) for row in rows] == [sum(sizes[:n]) for n in range(len(sizes))]
    assert int(rows[0][3], 16) == magic
    assert f"{header.size} bytes" in PAGE


def test_kinds_and_ports_have_the_documented_numbers() -> None:
    rows = table("Frame header", 1)
    assert {int(row[0]) for row in rows} == frame.KINDS
    for row in rows + table("Frame header", 2):
        assert getattr(frame, row[1]) == int(row[0]), row[1]


@pytest.mark.parametrize("kind", sorted(wire.BODIES))
def test_bodies_have_the_documented_fields(kind: int) -> None:
    struct_type = wire.BODIES[kind]
    rows = table(struct_type.__name__.upper())
    assert [(int(row[0]), row[1]) for row in rows] == list(enumerate(struct_type.__struct_fields__, 1))
    assert struct_type.__struct_config__.tag == kind


def test_refusals_have_the_documented_numbers_and_words() -> None:
    rows = table("REFUSE", 1)
    assert {int(row[0]): row[2] for row in rows} == wire.REFUSALS
    for row in rows:
        assert getattr(wire, f"REFUSE_{row[1]}") == int(row[0])


def test_bounds_are_the_documented_ones() -> None:
    assert f"At most {MESSAGE_MAX} bytes of body" in PAGE
    assert f"at most {wire.BODY_MAX} bytes" in PAGE
    assert f"payload of up to {seal.PAYLOAD_MAX}" in PAGE
    assert f"a window of {seal.WINDOW} counters" in PAGE


def test_a_frame_byte_for_byte() -> None:
    packed = frame.pack_header(frame.DATA, 0x0102, 3, 4, 5, 6, 7)
    assert packed.hex() == (
        "434c" "01" "01" "0201" "0000" "07000000" "03000000" "0400000000000000" "0500000000000000" "0600000000000000"
    )  # fmt: skip


def test_a_close_byte_for_byte() -> None:
    body = wire.control(frame.CLOSE, 1, 0, wire.Close(1, "bye"))[frame.HEADER.size :]
    assert body == b"\x93\x06\x01\xa3bye"
    assert msgspec.msgpack.decode(body) == [6, 1, "bye"]


def test_a_datagram_byte_for_byte() -> None:
    sealed = seal.Sealer(bytes(32), 0x1_0000_0007, 2, 3).seal(b"pp")
    assert sealed[:26].hex() == "43470100" "02000000" "03000000" "07000000" "0100000000000000" "7070"  # fmt: skip
    assert len(sealed) == 26 + seal.TAG
