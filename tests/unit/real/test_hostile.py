"""Arbitrary bytes into everything of the real World that reads what it did not write a moment ago."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.base.world import StoreDamaged
from corral.real import address
from corral.real.identity import names_of, parse_node_uri
from corral.real.participants import parse_lines
from corral.real.store import FRAME, HEADER_SIZE, MAGIC, pack_frame, parse

HEADER = MAGIC + bytes(HEADER_SIZE - len(MAGIC))
quick = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@quick
@given(st.lists(st.lists(st.binary(max_size=30), min_size=1, max_size=3), max_size=5), st.data())
def test_a_spoiled_store_never_invents_a_record(batches: list[list[bytes]], data: st.DataObject) -> None:
    """Whatever is overwritten, cut or inserted: damage is named, or a beginning of what was appended comes back."""
    content = bytearray(HEADER + b"".join(pack_frame(number, batch) for number, batch in enumerate(batches, 1)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(HEADER_SIZE, len(content)))
        what = data.draw(st.sampled_from(("overwrite", "cut", "insert")))
        junk = data.draw(st.binary(min_size=1, max_size=FRAME.size * 2))
        if what == "overwrite":
            content[at : at + len(junk)] = junk[: len(content) - at]
        elif what == "cut":
            del content[at:]
        else:
            content[at:at] = junk
    try:
        records, sequence, end = parse(bytes(content), "s")
    except StoreDamaged:
        return
    assert records == [record for batch in batches[:sequence] for record in batch]
    assert end <= len(content)


@quick
@given(st.binary(max_size=300))
def test_any_file_is_a_store_or_damaged(content: bytes) -> None:
    with pytest.raises(StoreDamaged):
        parse(content, "s")
    assert parse(HEADER + content, "s")[0] == []


@quick
@given(st.one_of(st.binary(max_size=300), st.text("0123456789 -\n", max_size=300).map(str.encode)))
def test_any_participants_file_can_be_read(content: bytes) -> None:
    for process in parse_lines(content + b"\n 12 34 boot\n" + b" 1 " + b"9" * 5000 + b" boot\n"):
        assert 0 <= process.pid < 10**9
        assert 0 <= process.start < 10**19


@quick
@given(
    st.one_of(
        st.text(max_size=60), st.builds("corral://{}/node/{}".format, st.text(max_size=9), st.integers(-9, 99_999))
    )
)
def test_any_name_in_a_certificate_is_a_node_or_nobody(uri: str) -> None:
    names = parse_node_uri(uri)
    assert names is None or 1 <= names[1] <= 4095
    assert names_of({"subjectAltName": (("URI", uri), ("DNS", uri))}) == names


@quick
@given(st.text(max_size=60))
def test_any_text_is_an_address_or_a_valueerror(text: str) -> None:
    try:
        host, port = address.parse(text)
    except ValueError:
        return
    assert host
    assert 0 <= port <= 65535


def test_reading_a_large_store_full_of_frame_beginnings_is_not_quadratic() -> None:
    """The search for a later frame looks at every frame magic: each look must be cheap."""
    rng = Random(1)
    junk = b"".join(b"FRAM" + rng.randbytes(4) for _ in range(100_000))
    assert parse(HEADER + pack_frame(1, [b"x"]) + junk, "s")[0] == [b"x"]
