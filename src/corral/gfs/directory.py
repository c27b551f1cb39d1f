"""Directories: dirents in the dinode, or leaves behind a hash table (ExHash; docs/format/disk.md, section 5).

`Dirents` is one area of dirents, in a payload or a leaf; `Directory` hangs on its inode and finds, adds and removes
names. Reading leaves awaits; changing never does: `prepare` loads what a change of this name touches, then the caller
holds space and calls `add` or `remove` in one step.

Source: extendible hashing (Fagin et al. 1979) as in gfs2 `dir.c`. Deviation: the table lies in the dinode up to 2^8
pointers and in blocks of 256 beyond, so that doubling it never moves a leaf.
"""

from collections.abc import Awaitable, Callable
from struct import Struct
from typing import Final, NamedTuple, Protocol, final

from corral.gfs import format as fmt
from corral.gfs.format import DEPTH_MAX, DIRENT, INLINE_DEPTH, TABLE_POINTERS, BlockDamaged, name_cookie, name_hash
from corral.gfs.glock import Glock
from corral.gfs.meta import Meta

_HEAD: Final = DIRENT.size
_NUMBER: Final = Struct("<Q")
_NUMBER_AT: Final = 8


class Found(NamedTuple):
    formal: int
    number: int
    type: int


class Listed(NamedTuple):
    cookie: int
    name: bytes
    formal: int
    number: int
    type: int


class Space(Protocol):
    """What a growing directory takes: blocks from a resource group that the caller holds, and the journal."""

    def allocate_block(self, glock: Glock) -> int: ...
    def free_block(self, meta: Meta) -> None: ...
    def add(self, meta: Meta) -> None: ...


def dirent_length(name: bytes) -> int:
    return _HEAD + len(name) + 7 & ~7


@final
class Dirents:
    """`buffer[base : base + limit]` holds `used` bytes of dirents, `live` of them not holes, for `entries` names."""

    __slots__ = ("_listing", "base", "buffer", "entries", "limit", "live", "names", "used")

    def __init__(self, buffer: bytearray, base: int, limit: int) -> None:
        self.buffer = buffer
        self.base = base
        self.limit = limit
        self.used = 0
        self.live = 0
        self.entries = 0
        self.names: dict[bytes, int] = {}  # name -> offset in buffer
        self._listing: list[Listed] | None = None

    def parse(self, used: int, owner: int) -> None:
        """Builds `names`. Raises BlockDamaged for anything that is not a chain of sound dirents."""
        if used > self.limit:
            raise BlockDamaged(owner, "more dirents than fit")
        buffer, names = self.buffer, self.names
        at, end = self.base, self.base + used
        while at < end:
            if end - at < _HEAD:
                raise BlockDamaged(owner, f"half a dirent at offset {at}")
            _, number, hashed, length, name_length, _ = DIRENT.unpack_from(buffer, at)
            if length < _HEAD + name_length or length & 7 or at + length > end:
                raise BlockDamaged(owner, f"dirent at offset {at} has a wrong length")
            if number:
                name = bytes(buffer[at + _HEAD : at + _HEAD + name_length])
                if not name_length or name in names or name_hash(name) != hashed or b"/" in name or b"\0" in name:
                    raise BlockDamaged(owner, f"dirent at offset {at} has a wrong name or hash")
                names[name] = at
                self.live += length
            at += length
        self.used = used
        self.entries = len(names)

    def get(self, name: bytes) -> Found | None:
        at = self.names.get(name)
        if at is None:
            return None
        formal, number, _, _, _, kind = DIRENT.unpack_from(self.buffer, at)
        return Found(formal, number, kind)

    def has_room(self, length: int) -> bool:
        return self.live + length <= self.limit

    def add(self, name: bytes, hashed: int, formal: int, number: int, kind: int) -> None:
        length = dirent_length(name)
        assert self.has_room(length)
        assert name not in self.names
        if self.used + length > self.limit:
            self._compact()
        at = self.base + self.used
        self.buffer[at : at + length] = bytes(length)
        DIRENT.pack_into(self.buffer, at, formal, number, hashed, length, len(name), kind)
        self.buffer[at + _HEAD : at + _HEAD + len(name)] = name
        self.names[name] = at
        self.used += length
        self.live += length
        self.entries += 1
        self._listing = None

    def replace(self, name: bytes, formal: int, number: int, kind: int) -> None:
        at = self.names[name]
        _, _, hashed, length, name_length, _ = DIRENT.unpack_from(self.buffer, at)
        DIRENT.pack_into(self.buffer, at, formal, number, hashed, length, name_length, kind)
        self._listing = None

    def remove(self, name: bytes) -> None:
        at = self.names.pop(name)
        length = DIRENT.unpack_from(self.buffer, at)[3]
        _NUMBER.pack_into(self.buffer, at + _NUMBER_AT, 0)
        self.live -= length
        self.entries -= 1
        if at + length == self.base + self.used:
            self.used -= length
        self._listing = None

    def _compact(self) -> None:
        buffer = self.buffer
        at = self.base
        for name, old in sorted(self.names.items(), key=lambda item: item[1]):
            length = DIRENT.unpack_from(buffer, old)[3]
            if old != at:
                buffer[at : at + length] = buffer[old : old + length]
                self.names[name] = at
            at += length
        self.used = self.live
        assert at == self.base + self.used

    def listing(self) -> list[Listed]:
        """All names in readdir order; kept until the next change."""
        if self._listing is None:
            listing: list[Listed] = []
            for name, at in self.names.items():
                formal, number, hashed, _, _, kind = DIRENT.unpack_from(self.buffer, at)
                listing.append(Listed(name_cookie(name, hashed), name, formal, number, kind))
            listing.sort()
            self._listing = listing
        return self._listing


@final
class Leaf(Meta):
    __slots__ = ("area", "depth", "directory", "next")

    kind = fmt.LEAF

    def __init__(self, number: int, glock: Glock, directory: int, depth: int) -> None:
        super().__init__(number, glock)
        self.directory = directory
        self.depth = depth
        self.next = 0
        self.area = Dirents(bytearray(fmt.BLOCK), fmt.LEAF_AT, fmt.LEAF_SIZE)

    def load(self, block: bytearray) -> None:
        self.generation = fmt.check(block, fmt.LEAF, self.number)
        self.depth, used, entries, self.next, directory = fmt.LEAF_HEAD.unpack_from(block, fmt.HEADER_SIZE)
        if directory != self.directory or self.depth > DEPTH_MAX:
            raise BlockDamaged(self.number, f"is not a leaf of directory {self.directory}")
        self.area = Dirents(block, fmt.LEAF_AT, fmt.LEAF_SIZE)
        self.area.parse(used, self.number)
        if self.area.entries != entries:
            raise BlockDamaged(self.number, "counts other names than it has")

    def pack(self) -> bytearray:
        block, area = self.area.buffer, self.area
        end = area.base + area.used
        block[end:] = bytes(fmt.BLOCK - end)
        fmt.LEAF_HEAD.pack_into(block, fmt.HEADER_SIZE, self.depth, area.used, area.entries, self.next, self.directory)
        return block


@final
class TableBlock(Meta):
    """256 pointers of a table that has outgrown the dinode."""

    __slots__ = ("directory", "index", "pointers")

    kind = fmt.TABLE

    def __init__(self, number: int, glock: Glock, directory: int, index: int, pointers: list[int]) -> None:
        super().__init__(number, glock)
        self.directory = directory
        self.index = index
        self.pointers = pointers

    def load(self, block: bytearray) -> None:
        self.generation = fmt.check(block, fmt.TABLE, self.number)
        index, directory = fmt.TABLE_HEAD.unpack_from(block, fmt.HEADER_SIZE)
        if index != self.index or directory != self.directory:
            raise BlockDamaged(self.number, f"is not table block {self.index} of directory {self.directory}")
        self.pointers = list(_POINTERS.unpack_from(block, fmt.TABLE_AT))

    def pack(self) -> bytearray:
        block = bytearray(fmt.BLOCK)
        fmt.TABLE_HEAD.pack_into(block, fmt.HEADER_SIZE, self.index, self.directory)
        _POINTERS.pack_into(block, fmt.TABLE_AT, *self.pointers)
        return block


_POINTERS: Final = Struct(f"<{TABLE_POINTERS}Q")


@final
class Directory:
    """The names of one directory inode. `area` while stuffed; else `depth`, `pointers` or `tables`, and leaves.

    `owner`: the inode's Meta, journaled by the caller whenever the directory changes. `read(number)` gives a block.
    """

    __slots__ = ("area", "depth", "entries", "glock", "leaf_count", "leaves", "number", "owner", "pointers", "tables")

    def __init__(self, owner: Meta) -> None:
        self.owner = owner
        self.number = owner.number
        self.glock = owner.glock
        self.entries = 0
        self.depth = 0
        self.area: Dirents | None = Dirents(bytearray(fmt.PAYLOAD), 0, fmt.PAYLOAD)
        self.pointers: list[int] = []
        self.tables: list[TableBlock] = []
        self.leaves: dict[int, Leaf] = {}
        self.leaf_count = 0

    # --- bytes -------------------------------------------------------------------------------------------------------

    async def load(
        self,
        payload: bytearray,
        *,
        stuffed: bool,
        items: int,
        depth: int,
        entries: int,
        leaf_count: int,
        read: Callable[[int], Awaitable[bytearray]],
    ) -> None:
        self.entries = entries
        if stuffed:
            self.area = Dirents(payload, 0, fmt.PAYLOAD)
            self.area.parse(items, self.number)
            if self.area.entries != entries:
                raise BlockDamaged(self.number, "counts other names than it has")
            return
        if depth > DEPTH_MAX:
            raise BlockDamaged(self.number, "directory table is too deep")
        self.area = None
        self.depth = depth
        self.leaf_count = leaf_count
        if depth <= INLINE_DEPTH:
            self.pointers = list(Struct(f"<{1 << depth}Q").unpack_from(payload))
            return
        count = 1 << depth - INLINE_DEPTH
        for index, number in enumerate(Struct(f"<{count}Q").unpack_from(payload)):
            table = TableBlock(number, self.glock, self.number, index, [])
            table.load(await read(number))
            self.tables.append(table)

    def pack_payload(self) -> bytes | bytearray:
        if self.area is not None:
            area = self.area
            area.buffer[area.used :] = bytes(fmt.PAYLOAD - area.used)
            return area.buffer
        numbers = self.pointers if self.depth <= INLINE_DEPTH else [table.number for table in self.tables]
        return Struct(f"<{len(numbers)}Q").pack(*numbers)

    @property
    def items(self) -> int:
        return self.area.used if self.area is not None else 0

    # --- the table ---------------------------------------------------------------------------------------------------

    def index_of(self, hashed: int) -> int:
        return hashed >> 32 - self.depth

    def pointer(self, index: int) -> int:
        if self.depth <= INLINE_DEPTH:
            return self.pointers[index]
        return self.tables[index >> INLINE_DEPTH].pointers[index & TABLE_POINTERS - 1]

    def _set_pointers(self, space: Space, first: int, count: int, number: int) -> None:
        if self.depth <= INLINE_DEPTH:
            self.pointers[first : first + count] = [number] * count
            return
        for index in range(first, first + count):
            table = self.tables[index >> INLINE_DEPTH]
            table.pointers[index & TABLE_POINTERS - 1] = number
            space.add(table)

    async def leaf(self, number: int, read: Callable[[int], Awaitable[bytearray]]) -> Leaf:
        leaf = self.leaves.get(number)
        if leaf is None:
            leaf = Leaf(number, self.glock, self.number, 0)
            leaf.load(await read(number))
            leaf = self.leaves.setdefault(number, leaf)
        return leaf

    async def prepare(self, hashed: int, read: Callable[[int], Awaitable[bytearray]]) -> None:
        """Loads the leaves where names with this hash are."""
        if self.area is not None:
            return
        number = self.pointer(self.index_of(hashed))
        seen = 0
        while number and seen <= self.leaf_count:
            leaf = self.leaves.get(number)
            if leaf is None:
                leaf = await self.leaf(number, read)
            number = leaf.next
            seen += 1
        if number:
            raise BlockDamaged(number, f"leaf chain of directory {self.number} has no end")

    def _areas(self, hashed: int) -> list[tuple[Leaf | None, Dirents]]:
        """Where a name may be; everything is loaded (`prepare`)."""
        if self.area is not None:
            return [(None, self.area)]
        number = self.pointer(self.index_of(hashed))
        out: list[tuple[Leaf | None, Dirents]] = []
        while number:
            leaf = self.leaves[number]
            out.append((leaf, leaf.area))
            number = leaf.next
        return out

    # --- names -------------------------------------------------------------------------------------------------------

    def ready(self, hashed: int) -> bool:
        """Nothing needs to be read for this hash (chains apart, which `prepare` follows)."""
        if self.area is not None:
            return True
        leaf = self.leaves.get(self.pointer(self.index_of(hashed)))
        return leaf is not None and not leaf.next

    def find(self, name: bytes, hashed: int) -> Found | None:
        for _, area in self._areas(hashed):
            found = area.get(name)
            if found is not None:
                return found
        return None

    def growth(self, name: bytes, hashed: int) -> int:
        """Blocks to have at hand before `add`; 0 when the name fits as things are."""
        length = dirent_length(name)
        if any(area.has_room(length) for _, area in self._areas(hashed)):
            return 0
        tables = 1 << max(0, self.depth + 1 - INLINE_DEPTH)
        return 4 + (tables if self.depth >= INLINE_DEPTH else 0)

    def add(self, space: Space, name: bytes, hashed: int, formal: int, number: int, kind: int) -> None:
        """The name is not there. May raise ENOSPC from `space` before the name is in (splits done stay: harmless)."""
        length = dirent_length(name)
        while True:
            for leaf, area in self._areas(hashed):
                if area.has_room(length):
                    area.add(name, hashed, formal, number, kind)
                    self.entries += 1
                    if leaf is not None:
                        space.add(leaf)
                    return
            self._grow(space, hashed)

    def replace(self, space: Space, name: bytes, hashed: int, formal: int, number: int, kind: int) -> None:
        for leaf, area in self._areas(hashed):
            if name in area.names:
                area.replace(name, formal, number, kind)
                if leaf is not None:
                    space.add(leaf)
                return
        raise KeyError(name)

    def remove(self, space: Space, name: bytes, hashed: int) -> None:
        for leaf, area in self._areas(hashed):
            if name in area.names:
                area.remove(name)
                self.entries -= 1
                if leaf is not None:
                    space.add(leaf)
                return
        raise KeyError(name)

    # --- growth ------------------------------------------------------------------------------------------------------

    def _grow(self, space: Space, hashed: int) -> None:
        """One step: to a table, a split, a doubling or a longer chain. Each leaves a sound directory."""
        if self.area is not None:
            self._unstuff(space)
            return
        leaf = self.leaves[self.pointer(self.index_of(hashed))]
        if leaf.depth < self.depth:
            self._split(space, leaf, self.index_of(hashed))
        elif self.depth < DEPTH_MAX:
            self._double(space)
        else:
            while leaf.next:
                leaf = self.leaves[leaf.next]
            leaf.next = self._new_leaf(space, leaf.depth).number
            space.add(leaf)

    def _new_leaf(self, space: Space, depth: int) -> Leaf:
        leaf = Leaf(space.allocate_block(self.glock), self.glock, self.number, depth)
        self.leaves[leaf.number] = leaf
        self.leaf_count += 1
        space.add(leaf)
        return leaf

    def _unstuff(self, space: Space) -> None:
        area = self.area
        assert area is not None
        leaf = self._new_leaf(space, 0)
        self._move(area, leaf)
        self.area = None
        self.depth = 0
        self.pointers = [leaf.number]

    @staticmethod
    def _move(area: Dirents, leaf: Leaf) -> None:
        for entry in area.listing():
            leaf.area.add(entry.name, entry.cookie - 3 >> 20, entry.formal, entry.number, entry.type)

    def _split(self, space: Space, leaf: Leaf, index: int) -> None:
        """Half of the pointers that share this leaf get a new one; chains do not occur below the greatest depth."""
        share = 1 << self.depth - leaf.depth
        first = index & ~(share - 1)
        other = self._new_leaf(space, leaf.depth + 1)
        middle = (first + share // 2) << 32 - self.depth  # hashes from here on move
        old = leaf.area
        leaf.area = Dirents(bytearray(fmt.BLOCK), fmt.LEAF_AT, fmt.LEAF_SIZE)
        leaf.depth += 1
        space.add(leaf)
        for entry in old.listing():
            hashed = entry.cookie - 3 >> 20
            target = other if hashed >= middle else leaf
            target.area.add(entry.name, hashed, entry.formal, entry.number, entry.type)
        self._set_pointers(space, first + share // 2, share // 2, other.number)

    def _double(self, space: Space) -> None:
        if self.depth < INLINE_DEPTH:
            self.pointers = [number for number in self.pointers for _ in range(2)]
            self.depth += 1
            return
        lists = [self.pointers] if self.depth == INLINE_DEPTH else [table.pointers for table in self.tables]
        doubled = [number for pointers in lists for number in pointers for _ in range(2)]
        count = len(doubled) // TABLE_POINTERS
        fresh = [
            TableBlock(space.allocate_block(self.glock), self.glock, self.number, index, [])
            for index in range(len(self.tables), count)
        ]
        self.tables.extend(fresh)
        for index, table in enumerate(self.tables):
            table.pointers = doubled[index * TABLE_POINTERS : (index + 1) * TABLE_POINTERS]
            space.add(table)
        self.pointers = []
        self.depth += 1

    # --- whole ------------------------------------------------------------------------------------------------------

    async def listing_at(self, cookie: int, read: Callable[[int], Awaitable[bytearray]]) -> tuple[list[Listed], int]:
        """The names of the leaf (or all) that covers `cookie`, in order, and the cookie where the next leaf begins
        (0: there is none)."""
        if self.area is not None:
            return self.area.listing(), 0
        hashed = min(max(cookie - 3, 0) >> 20, 0xFFFFFFFF)
        await self.prepare(hashed, read)
        index = self.index_of(hashed)
        areas = self._areas(hashed)
        head = areas[0][0]
        assert head is not None
        share = 1 << self.depth - head.depth
        following = (index & ~(share - 1)) + share
        listing = areas[0][1].listing()
        if len(areas) > 1:
            listing = sorted(entry for _, area in areas for entry in area.listing())
        if following >= 1 << self.depth:
            return listing, 0
        return listing, ((following << 32 - self.depth) << 20) + 3

    def reset(self) -> None:
        """Empty and stuffed again: its blocks were freed."""
        self.area = Dirents(bytearray(fmt.PAYLOAD), 0, fmt.PAYLOAD)
        self.depth = self.entries = self.leaf_count = 0
        self.pointers, self.tables, self.leaves = [], [], {}

    async def blocks(self, read: Callable[[int], Awaitable[bytearray]]) -> list[Meta]:
        """All leaves and table blocks, loaded: for freeing the directory."""
        out: list[Meta] = list(self.tables)
        if self.area is None:
            pointers = self.pointers if self.depth <= INLINE_DEPTH else [n for t in self.tables for n in t.pointers]
            for number in sorted(set(pointers)):
                while number:
                    leaf = await self.leaf(number, read)
                    out.append(leaf)
                    number = leaf.next
        return out
