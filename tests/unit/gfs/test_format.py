"""docs/format/disk.md and corral.gfs.format say the same, and damaged blocks are told from whole ones."""

import re
from pathlib import Path

import pytest

from corral.gfs import format as fmt

DOCUMENT = Path(__file__).parents[3] / "docs" / "format" / "disk.md"
ROW = re.compile(r"^\| (\d+) \| (\d+) \| (\w+) \|")


def tables() -> dict[str, list[tuple[int, int, str]]]:
    found: dict[str, list[tuple[int, int, str]]] = {}
    title = ""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("#"):
            title = line.lstrip("# ")
        elif match := ROW.match(line):
            found.setdefault(title, []).append((int(match[1]), int(match[2]), match[3]))
    return found


@pytest.mark.parametrize("layout", fmt.LAYOUTS, ids=lambda layout: layout.name)
def test_document_describes_every_structure(layout: fmt.Layout) -> None:
    assert tables()[layout.name] == list(layout.fields)


def test_document_describes_nothing_else() -> None:
    assert set(tables()) == {layout.name for layout in fmt.LAYOUTS}


def test_areas_do_not_overlap() -> None:
    assert fmt.HEADER.size == fmt.HEADER_SIZE == 32
    assert fmt.HEADER_SIZE + fmt.RGRP_HEAD.size == fmt.BITMAP_AT
    assert fmt.HEADER_SIZE + fmt.DINODE_HEAD.size == fmt.PAYLOAD_AT
    for head in (fmt.NODE_HEAD, fmt.LEAF_HEAD, fmt.TABLE_HEAD, fmt.LOG_LIST, fmt.RINDEX_HEAD):
        assert fmt.HEADER_SIZE + head.size == 64, head.name
    assert fmt.RGRP_BLOCKS_MAX % fmt.CLUSTER == 0
    assert fmt.RGRP_BLOCKS_MAX // fmt.CLUSTER <= 32 * 8


def test_a_sealed_block_checks() -> None:
    image = fmt.seal(bytearray(fmt.BLOCK), fmt.LEAF, 77, 5)
    assert fmt.check(image, fmt.LEAF, 77) == 5
    assert fmt.verified(image)


@pytest.mark.parametrize("at", [0, 5, 9, 16, 24, 100, 4095])
def test_every_flipped_bit_is_noticed(at: int) -> None:
    image = bytearray(fmt.seal(bytearray(fmt.BLOCK), fmt.LEAF, 77, 5))
    image[at] ^= 4
    with pytest.raises(fmt.BlockDamaged):
        fmt.check(image, fmt.LEAF, 77)


def test_a_block_in_the_wrong_place_is_noticed() -> None:
    image = fmt.seal(bytearray(fmt.BLOCK), fmt.LEAF, 77, 5)
    with pytest.raises(fmt.BlockDamaged, match="says it is block 77"):
        fmt.check(image, fmt.LEAF, 78)
    with pytest.raises(fmt.BlockDamaged, match="instead of a dinode"):
        fmt.check(image, fmt.DINODE, 77)


def test_cookies_do_not_collide_where_hashes_do() -> None:
    assert fmt.name_cookie(b"a", 1) != fmt.name_cookie(b"b", 1)
    assert fmt.name_cookie(b"a", 0xFFFFFFFF) < 1 << 53
