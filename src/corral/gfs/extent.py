"""Where a file's blocks lie: a tree of extents whose root is in the dinode (docs/format/disk.md, section 4).

The whole tree of an inode is in memory while it is used, so every change is a plain function. Only the nodes changed
are journaled. Items of a level-0 node are (logical, physical, count, flags), above it (logical, Node).

Invariant GFS-10: extents are in order and do not overlap; no extent is empty.
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, Final, Protocol, final

from corral.gfs import format as fmt
from corral.gfs.format import EXTENT, INDEX, NODE_ITEMS, ROOT_ITEMS, BlockDamaged
from corral.gfs.glock import Glock
from corral.gfs.meta import Meta

COUNT_MAX: Final = (1 << 32) - 1
_LAST: Final = (1 << 64,)  # after any item that begins at the same block

Extent = tuple[int, int, int, int]


class Blocks(Protocol):
    """What the tree needs while it changes: blocks for nodes and the journal."""

    def allocate_node(self) -> int: ...
    def free_node(self, node: "Node") -> None: ...
    def add(self, meta: Meta) -> None: ...


@final
class Node(Meta):
    __slots__ = ("inode", "items", "level")

    kind = fmt.EXTENT_NODE

    def __init__(self, number: int, glock: Glock, inode: int, level: int, items: list[Any]) -> None:
        super().__init__(number, glock)
        self.inode = inode
        self.level = level
        self.items = items

    def pack(self) -> bytearray:
        block = bytearray(fmt.BLOCK)
        fmt.NODE_HEAD.pack_into(block, fmt.HEADER_SIZE, self.level, len(self.items), self.inode)
        pack_items(block, fmt.NODE_AT, self.level, self.items)
        return block


def pack_items(block: bytearray, at: int, level: int, items: list[Any]) -> None:
    if level == 0:
        for item in items:
            EXTENT.pack_into(block, at, *item)
            at += EXTENT.size
    else:
        for logical, child in items:
            INDEX.pack_into(block, at, logical, child.number)
            at += INDEX.size


def parse_extents(block: bytes | bytearray, at: int, count: int, number: int) -> list[Extent]:
    """Raises BlockDamaged unless ordered, disjoint and not empty."""
    items: list[Extent] = []
    end = 0
    for index in range(count):
        item = EXTENT.unpack_from(block, at + index * EXTENT.size)
        if item[0] < end or not item[2] or item[0] + item[2] > 1 << 51 or item[3]:
            raise BlockDamaged(number, f"extent {index} is empty, out of order or of an unknown kind")
        end = item[0] + item[2]
        items.append(item)
    return items


@final
class ExtentTree:
    """`height` levels of nodes below the root. `root` holds the dinode's items."""

    __slots__ = ("glock", "height", "inode", "root")

    def __init__(self, inode: int, glock: Glock) -> None:
        self.inode = inode
        self.glock = glock
        self.height = 0
        self.root: list[Any] = []

    # --- reading -----------------------------------------------------------------------------------------------------

    async def load(
        self, payload: bytes | bytearray, height: int, items: int, read: Callable[[int], Any], blocks: int
    ) -> None:
        """From the dinode's payload; `read(number)` gives a block. Raises BlockDamaged."""
        limit = ROOT_ITEMS
        if height > fmt.HEIGHT_MAX or items > limit:
            raise BlockDamaged(self.inode, "extent tree is too high or too wide")
        self.height = height
        self.root = await self._parse(payload, 0, height, items, read, self.inode, blocks)

    async def _parse(
        self,
        block: bytes | bytearray,
        at: int,
        level: int,
        count: int,
        read: Callable[[int], Any],
        owner: int,
        blocks: int,
    ) -> list[Any]:
        if level == 0:
            extents = parse_extents(block, at, count, owner)
            for _, physical, length, _ in extents:
                if physical <= fmt.SUPERBLOCK_AT or physical + length > blocks:
                    raise BlockDamaged(owner, "extent lies outside the filesystem")
            return extents
        items: list[Any] = []
        for index in range(count):
            logical, child = INDEX.unpack_from(block, at + index * INDEX.size)
            if child <= fmt.SUPERBLOCK_AT or child >= blocks:
                raise BlockDamaged(owner, "index entry lies outside the filesystem")
            content = await read(child)
            generation = fmt.check(content, fmt.EXTENT_NODE, child)
            found, length, inode = fmt.NODE_HEAD.unpack_from(content, fmt.HEADER_SIZE)
            if found != level - 1 or length > NODE_ITEMS or inode != self.inode or not length:
                raise BlockDamaged(child, f"is not a level {level - 1} extent node of inode {self.inode}")
            node = Node(child, self.glock, inode, found, [])
            node.generation = generation
            node.items = await self._parse(content, fmt.NODE_AT, found, length, read, child, blocks)
            items.append((logical, node))
        return items

    # --- looking up --------------------------------------------------------------------------------------------------

    def runs(self, first: int, count: int) -> list[tuple[int, int, int, int]]:
        """Covers [first, first + count): (logical, physical, count, flags), holes with physical 0."""
        out: list[tuple[int, int, int, int]] = []
        end = first + count
        at = first
        for logical, physical, length, flags in self._from(first):
            if logical >= end:
                break
            if logical > at:
                out.append((at, 0, logical - at, 0))
                at = logical
            skip = at - logical
            take = min(length - skip, end - at)
            out.append((at, physical + skip, take, flags))
            at += take
            if at == end:
                return out
        if at < end:
            out.append((at, 0, end - at, 0))
        return out

    def _from(self, first: int) -> Any:
        """Extents in order, beginning with the one that covers or follows block `first`."""
        if self.height:
            yield from self._descend(self.root, self.height, first)
            return
        items = self.root
        index = max(0, bisect_right(items, (first, *_LAST)) - 1)
        if index < len(items) and items[index][0] + items[index][2] <= first:
            index += 1
        while index < len(items):
            yield items[index]
            index += 1

    def _descend(self, items: list[Any], level: int, first: int) -> Any:
        if level == 0:
            for item in items:
                if item[0] + item[2] > first:
                    yield item
            return
        index = max(0, bisect_right(items, first, key=_logical) - 1)
        while index < len(items):
            yield from self._descend(items[index][1].items, level - 1, first)
            index += 1

    def extents(self) -> list[Extent]:
        return list(self._from(0))

    def nodes(self) -> list[Node]:
        """All nodes below the dinode."""
        out: list[Node] = []
        level = [child for _, child in self.root] if self.height else []
        while level:
            out.extend(level)
            level = [child for node in level if node.level for _, child in node.items]
        return out

    @property
    def last(self) -> Extent | None:
        items, level = self.root, self.height
        while level:
            if not items:
                return None
            items = items[-1][1].items
            level -= 1
        return items[-1] if items else None

    def last_path(self) -> list[int]:
        """Blocks of the nodes that lead to the last extent."""
        out: list[int] = []
        items, level = self.root, self.height
        while level and items:
            node = items[-1][1]
            out.append(node.number)
            items = node.items
            level -= 1
        return out

    # --- changing ----------------------------------------------------------------------------------------------------

    @property
    def insert_cost(self) -> int:
        """Most blocks that one `insert` may need for nodes."""
        return self.height + 2

    def insert(self, blocks: Blocks, logical: int, physical: int, count: int, flags: int = 0) -> None:
        """Maps a range that is a hole now. The caller journals the dinode."""
        path: list[tuple[Node | None, list[Any]]] = [(None, self.root)]
        items, level = self.root, self.height
        while level:
            index = max(0, bisect_right(items, logical, key=_logical) - 1)
            node = items[index][1]
            items = node.items
            path.append((node, items))
            level -= 1
        index = bisect_right(items, (logical, *_LAST))
        node = path[-1][0]
        if node is not None:
            blocks.add(node)
        if index:
            before = items[index - 1]
            assert before[0] + before[2] <= logical, "GFS-10"
            if (
                before[0] + before[2] == logical
                and before[1] + before[2] == physical
                and before[3] == flags
                and before[2] + count <= COUNT_MAX
            ):
                items[index - 1] = (before[0], before[1], before[2] + count, flags)
                return
        assert index == len(items) or logical + count <= items[index][0], "GFS-10"
        items.insert(index, (logical, physical, count, flags))
        self._split(blocks, path, appended=index == len(items) - 1)

    def _split(self, blocks: Blocks, path: list[tuple[Node | None, list[Any]]], *, appended: bool) -> None:
        """Restores the item limits from the leaf upwards."""
        for depth in range(len(path) - 1, 0, -1):
            node, items = path[depth]
            assert node is not None
            if len(items) <= NODE_ITEMS:
                return
            # A file that grows at its end leaves full nodes behind.
            half = len(items) - 1 if appended else len(items) // 2
            other = Node(blocks.allocate_node(), self.glock, self.inode, node.level, items[half:])
            del items[half:]
            blocks.add(node)
            blocks.add(other)
            parent_node, parent = path[depth - 1]
            at = next(index for index, item in enumerate(parent) if item[1] is node)
            parent.insert(at + 1, (other.items[0][0], other))
            if parent_node is not None:
                blocks.add(parent_node)
        if len(self.root) > ROOT_ITEMS:
            child = Node(blocks.allocate_node(), self.glock, self.inode, self.height, self.root)
            blocks.add(child)
            self.root = [(child.items[0][0], child)]
            self.height += 1
            if self.height > fmt.HEIGHT_MAX:
                raise AssertionError("GFS-10: extent tree too high")

    def trim(self, blocks: Blocks, end: int) -> tuple[int, int]:
        """Takes the part of the last extent at or after block `end` away: (physical, count), or (0, 0)."""
        path: list[tuple[Node | None, list[Any]]] = [(None, self.root)]
        items, level = self.root, self.height
        while level:
            node = items[-1][1]
            items = node.items
            path.append((node, items))
            level -= 1
        if not items or items[-1][0] + items[-1][2] <= end:
            return 0, 0
        logical, physical, count, flags = items[-1]
        keep = max(0, end - logical)
        if keep:
            items[-1] = (logical, physical, keep, flags)
            if path[-1][0] is not None:
                blocks.add(path[-1][0])
            return physical + keep, count - keep
        del items[-1]
        self._shrink(blocks, path)
        return physical, count

    def _shrink(self, blocks: Blocks, path: list[tuple[Node | None, list[Any]]]) -> None:
        for depth in range(len(path) - 1, 0, -1):
            node, items = path[depth]
            assert node is not None
            if items:
                blocks.add(node)
                return
            blocks.free_node(node)
            del path[depth - 1][1][-1]
        if not self.root:
            self.height = 0


def _logical(item: Any) -> int:
    return int(item[0])
