"""The extent tree against a dictionary of blocks, through its bytes and back."""

from random import Random
from typing import Any

import pytest
from tests.unit.gfs.world import World

from corral.gfs import extent as module
from corral.gfs import format as fmt
from corral.gfs.extent import ExtentTree, Node, pack_items
from corral.gfs.format import BlockDamaged
from corral.gfs.glock import INODE, Glock
from corral.gfs.meta import Meta

BLOCKS = 1 << 30


class Blocks:
    def __init__(self) -> None:
        self.next = 1 << 20
        self.nodes: dict[int, Meta] = {}

    def allocate_node(self) -> int:
        self.next += 1
        return self.next

    def free_node(self, node: Node) -> None:
        self.nodes.pop(node.number, None)

    def add(self, meta: Meta) -> None:
        self.nodes[meta.number] = meta

    async def read(self, number: int) -> bytearray:
        return bytearray(self.nodes[number].seal())


def reload(tree: ExtentTree, blocks: Blocks) -> ExtentTree:
    payload = bytearray(fmt.PAYLOAD)
    pack_items(payload, 0, tree.height, tree.root)
    fresh = ExtentTree(tree.inode, tree.glock)
    World().run(fresh.load(payload, tree.height, len(tree.root), blocks.read, BLOCKS))
    return fresh


def mapping(tree: ExtentTree) -> dict[int, int]:
    return {logical + at: physical + at for logical, physical, count, _ in tree.extents() for at in range(count)}


@pytest.mark.parametrize("limits", [(160, 168), (4, 5)])
def test_random_growth_and_shrinking(limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOT_ITEMS", limits[0])
    monkeypatch.setattr(module, "NODE_ITEMS", limits[1])
    monkeypatch.setattr(fmt, "HEIGHT_MAX", 9)
    rng = Random(limits[0])
    tree, blocks, model = ExtentTree(7, Glock(INODE, 7)), Blocks(), {}
    place = 100
    for _ in range(1500):
        if rng.random() < 0.8:
            first = rng.choice([rng.randrange(3000), max(model, default=0) + 1])
            count = 0
            while count < rng.randrange(1, 9) and first + count not in model:
                count += 1
            if count:
                place += rng.choice([0, 5])
                before = blocks.next
                allowed = tree.insert_cost
                tree.insert(blocks, first, place, count)
                assert blocks.next - before <= allowed
                model.update({first + at: place + at for at in range(count)})
                place += count
        else:
            end = rng.randrange(3100)
            while True:
                physical, count = tree.trim(blocks, end)
                if not count:
                    break
                gone = {block for block, where in model.items() if physical <= where < physical + count}
                assert len(gone) == count
                assert min(gone) >= end
                for block in gone:
                    del model[block]
            assert all(block < end for block in model)
        assert {node.number for node in tree.nodes()} == set(blocks.nodes)
    assert mapping(tree) == model
    assert mapping(reload(tree, blocks)) == model
    for _ in range(200):
        first, count = rng.randrange(3000), rng.randrange(1, 50)
        runs = tree.runs(first, count)
        assert sum(run[2] for run in runs) == count
        for logical, physical, length, _ in runs:
            for at in range(length):
                assert model.get(logical + at, 0) == (physical + at if physical else 0)


def test_neighbours_become_one_extent() -> None:
    tree, blocks = ExtentTree(7, Glock(INODE, 7)), Blocks()
    for number in range(1000):
        tree.insert(blocks, number, 5000 + number, 1)
    assert tree.extents() == [(0, 5000, 1000, 0)]


def test_a_file_that_grows_at_its_end_fills_its_nodes() -> None:
    tree, blocks = ExtentTree(7, Glock(INODE, 7)), Blocks()
    for number in range(2000):
        tree.insert(blocks, 2 * number, 5000 + 2 * number, 1)
    assert len(blocks.nodes) <= 2000 // fmt.NODE_ITEMS + 3


@pytest.mark.parametrize(
    "extents",
    [
        [(0, 100, 0, 0)],
        [(5, 100, 2, 0), (6, 200, 1, 0)],
        [(5, 100, 2, 0), (1, 200, 1, 0)],
        [(0, BLOCKS, 1, 0)],
        [(0, 3, 1, 0)],
        [(0, 100, 1, 8)],
    ],
)
def test_impossible_extents_are_refused(extents: list[Any]) -> None:
    payload = bytearray(fmt.PAYLOAD)
    pack_items(payload, 0, 0, extents)
    tree = ExtentTree(7, Glock(INODE, 7))
    with pytest.raises(BlockDamaged):
        World().run(tree.load(payload, 0, len(extents), Blocks().read, BLOCKS))
