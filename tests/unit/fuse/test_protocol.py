"""Requests are decoded as <linux/fuse.h> lays them out, and whatever else arrives is refused without an exception."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.fuse import protocol as p

DATA_SIZE = 8192


def decode(opcode: int, body: bytes, length: int | None = None) -> tuple[object, ...] | None:
    message = bytes(p.HEADER_SIZE) + body
    header = bytearray(message[: p.HEADER_BUFFER].ljust(p.HEADER_BUFFER, b"\xee"))
    data = memoryview(bytearray(message[p.HEADER_BUFFER :].ljust(DATA_SIZE, b"\xee")))
    return p.decode(opcode, len(message) if length is None else length, header, data)


def test_fixed_structures_in_one_buffer_and_across_two() -> None:
    assert decode(p.GETATTR, struct.pack("=IIQ", 1, 0, 77)) == (1, 0, 77)
    lock = (1, 2, 3, 4, 5, 6, 7, 0)
    assert decode(p.SETLKW, struct.pack("=QQQQIIII", *lock)) == lock
    times = (0x1FF, 0, 9, 8, 7, -6, 5, 4, 3, 2, 1, 0o644, 0, 10, 11, 0)
    assert decode(p.SETATTR, struct.pack("=IIQQQqqqIIIIIIIII"[:-1], *times)) == times


@pytest.mark.parametrize("length", [1, 39, 40, 41, 255, 4095])
def test_names_up_to_the_limit(length: int) -> None:
    assert decode(p.LOOKUP, b"x" * length + b"\0") == (b"x" * length,)


def test_structure_and_two_names() -> None:
    body = struct.pack("=QII", 5, 1, 0) + b"old\0new\0"
    assert decode(p.RENAME2, body) == (5, 1, 0, b"old", b"new")
    assert decode(p.SYMLINK, b"name\0../a/b\0") == (b"name", b"../a/b")


def test_write_data_is_a_slice_of_the_buffer() -> None:
    fields = (1, 4096, 5, 0, 0, 0, 0)
    decoded = decode(p.WRITE, struct.pack("=QQIIQII", *fields) + b"hello")
    assert decoded is not None
    assert decoded[:-1] == fields
    assert isinstance(decoded[-1], memoryview)
    assert bytes(decoded[-1]) == b"hello"


def test_batch_forget() -> None:
    assert decode(p.BATCH_FORGET, struct.pack("=IIQQQQ", 2, 0, 5, 1, 6, 3)) == ((5, 1), (6, 3))


HOSTILE = {
    "no name": (p.LOOKUP, b""),
    "empty name": (p.LOOKUP, b"\0"),
    "name without its end": (p.LOOKUP, b"abc"),
    "two names for one": (p.LOOKUP, b"abc\0def\0"),
    "bytes after the name": (p.LOOKUP, b"abc\0d"),
    "a slash": (p.UNLINK, b"a/b\0"),
    "a slash in a link's name": (p.SYMLINK, b"a/b\0target\0"),
    "too long a name": (p.MKDIR, bytes(8) + b"x" * 4096 + b"\0"),
    "one name for two": (p.RENAME, bytes(8) + b"abc\0"),
    "half a structure": (p.READ, bytes(39)),
    "too much structure": (p.READ, bytes(41)),
    "write claims more than there is": (p.WRITE, struct.pack("=QQIIQII", 0, 0, 6, 0, 0, 0, 0) + b"hello"),
    "write claims less than there is": (p.WRITE, struct.pack("=QQIIQII", 0, 0, 4, 0, 0, 0, 0) + b"hello"),
    "write without its structure": (p.WRITE, b"x"),
    "forget counts more than there is": (p.BATCH_FORGET, struct.pack("=IIQQ", 2, 0, 5, 1)),
    "forget counts a billion": (p.BATCH_FORGET, struct.pack("=IIQQ", 1 << 30, 0, 5, 1)),
    "an opcode nobody knows": (7, b""),
}


@pytest.mark.parametrize(("opcode", "body"), HOSTILE.values(), ids=HOSTILE.keys())
def test_what_an_opcode_does_not_promise_is_refused(opcode: int, body: bytes) -> None:
    assert decode(opcode, body) is None


@given(
    opcode=st.integers(0, p.OPCODES - 1),
    body=st.binary(max_size=300),
    length=st.integers(0, 1 << 32),
)
def test_no_bytes_and_no_length_raise(opcode: int, body: bytes, length: int) -> None:
    decode(opcode, body)
    decode(opcode, body, length)


def test_every_opcode_has_a_name_and_a_place() -> None:
    assert all(0 < opcode < p.OPCODES for opcode in p.OPCODE_NAMES)
    assert p.OPCODE_NAMES[p.COPY_FILE_RANGE_64] == "COPY_FILE_RANGE_64"
    assert len(p.OPCODE_NAMES) == 51
    assert all(p.LAYOUTS[opcode] is None for opcode in range(p.OPCODES) if opcode not in p.OPCODE_NAMES)
