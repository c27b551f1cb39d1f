"""One resource group: header and two-bit bitmap, and where in it the next block is found.

Three views of the same bits: `bits` is the truth that is journaled; `open_bits` shows freed blocks as used until the
commit that freed them is durable (GFS-5); `data_bits` also hides inode clusters, so data does not scatter dinodes.
Searching is done by bytes.find and one compiled pattern, never by a loop over blocks.

Invariants: GFS-9 free + dinodes + unlinked + used = blocks, each equal to its count in the bitmap.
"""

import re
from typing import Final, final

from corral.gfs import format as fmt
from corral.gfs.format import DINODE_STATE, FREE, UNLINKED, USED, BlockDamaged
from corral.gfs.glock import Glock
from corral.gfs.meta import Meta

FILL: Final = (0x00, 0x55, 0xAA, 0xFF)  # a byte of four equal states
STATES: Final = tuple(tuple(byte >> shift & 3 for shift in (0, 2, 4, 6)) for byte in range(256))
_HAS_FREE: Final = re.compile(
    b"[" + b"".join(re.escape(bytes([b])) for b in range(256) if FREE in STATES[b]) + b"]", re.S
)
_NOT_FREE: Final = re.compile(rb"[^\x00]", re.S)
_COUNT: Final = tuple(bytes(states.count(state) for states in STATES) for state in range(4))
_EMPTY_CLUSTER: Final = bytes(fmt.CLUSTER_BYTES)
_FULL_CLUSTER: Final = bytes([FILL[USED]]) * fmt.CLUSTER_BYTES


def count_state(bits: bytes | bytearray, state: int) -> int:
    return sum(bits.translate(_COUNT[state]))


def set_range(bits: bytearray, start: int, count: int, state: int) -> None:
    """Sets `count` entries from `start`."""
    if not count:
        return  # `start` may be the end of the bits
    end = start + count
    fill = FILL[state]
    first, last = start >> 2, end >> 2
    head = (1 << (start & 3) * 2) - 1  # bits of the first byte that stay
    tail = (1 << (end & 3) * 2) - 1  # bits of the last byte that change
    if first == last:
        mask = tail & ~head & 0xFF
        bits[first] = bits[first] & ~mask & 0xFF | fill & mask
        return
    if head:
        bits[first] = bits[first] & head | fill & ~head & 0xFF
        first += 1
    if last > first:
        bits[first:last] = bytes([fill]) * (last - first)
    if tail:
        bits[last] = bits[last] & ~tail & 0xFF | fill & tail


def get(bits: bytes | bytearray, index: int) -> int:
    return bits[index >> 2] >> (index & 3) * 2 & 3


def first_free(bits: bytes | bytearray, start: int, end: int) -> int:
    """Index of the first FREE entry in [start, end), or -1."""
    if start & 3:
        byte = STATES[bits[start >> 2]]
        for index in range(start, min((start | 3) + 1, end)):
            if byte[index & 3] == FREE:
                return index
        start = (start | 3) + 1
    match = _HAS_FREE.search(bits, start >> 2, end + 3 >> 2)
    if match is None:
        return -1
    index = match.start() * 4 + STATES[bits[match.start()]].index(FREE)
    return index if index < end else -1


def free_run(bits: bytes | bytearray, start: int, limit: int) -> int:
    """How many entries from `start` are FREE, at most `limit`; `start` is FREE."""
    count = 0
    index = start
    while index & 3 and count < limit:
        if get(bits, index) != FREE:
            return count
        index += 1
        count += 1
    if count >= limit:
        return limit
    match = _NOT_FREE.search(bits, index >> 2, min(len(bits), (index + limit - count + 3) >> 2))
    if match is None:
        return limit
    at = match.start()
    count += at * 4 - index
    for state in STATES[bits[at]]:
        if state != FREE:
            break
        count += 1
    return min(count, limit)


@final
class Rgrp(Meta):
    __slots__ = (
        "bits",
        "blocks",
        "clusters",
        "data0",
        "data_bits",
        "dinodes",
        "flags",
        "free",
        "goal",
        "index",
        "loaded",
        "newest_dinode",
        "open_bits",
        "pending",
        "unlinked",
    )

    kind = fmt.RGRP

    def __init__(self, number: int, data0: int, blocks: int, index: int, glock: Glock) -> None:
        super().__init__(number, glock)
        self.data0 = data0
        self.blocks = blocks
        self.index = index
        self.flags = 0
        self.free = self.dinodes = self.unlinked = 0
        self.clusters = 0  # bit mask
        self.bits = bytearray()
        self.open_bits = bytearray()
        self.data_bits = bytearray()
        self.pending = 0  # blocks freed, not yet to be given out
        self.goal = 0
        self.newest_dinode = -1  # index of the one made here last, by this node since it mounted
        self.loaded = False

    # --- bytes -------------------------------------------------------------------------------------------------------

    def make_empty(self) -> None:
        """As mkfs finds it: everything free."""
        self.bits = bytearray(fmt.BITMAP_SIZE)
        set_range(self.bits, self.blocks, fmt.RGRP_BLOCKS_MAX - self.blocks, USED)
        self.free = self.blocks
        self._open()

    def load(self, block: bytearray) -> None:
        """Raises BlockDamaged when the block is not this group's header."""
        self.generation = fmt.check(block, fmt.RGRP, self.number)
        head = fmt.RGRP_HEAD.unpack_from(block, fmt.HEADER_SIZE)
        self.flags, self.free, self.dinodes, self.unlinked, data0, blocks, _, clusters = head
        if data0 != self.data0 or blocks != self.blocks:
            raise BlockDamaged(self.number, "does not describe the blocks the rindex says")
        self.clusters = int.from_bytes(clusters, "little")
        self.bits = block[fmt.BITMAP_AT :]
        counted = tuple(count_state(self.bits, state) for state in (FREE, DINODE_STATE, UNLINKED))
        if counted != (self.free, self.dinodes, self.unlinked):
            raise BlockDamaged(self.number, "counts do not match its bitmap")
        self._open()

    def _open(self) -> None:
        self.open_bits = bytearray(self.bits)
        self.data_bits = bytearray(self.bits)
        for cluster in range(self.blocks // fmt.CLUSTER):
            if self.clusters >> cluster & 1:
                at = cluster * fmt.CLUSTER_BYTES
                self.data_bits[at : at + fmt.CLUSTER_BYTES] = _FULL_CLUSTER
        self.pending = 0
        self.loaded = True

    def unload(self) -> None:
        self.bits = self.open_bits = self.data_bits = bytearray()
        self.loaded = False

    def pack(self) -> bytearray:
        block = bytearray(fmt.BITMAP_AT)
        fmt.RGRP_HEAD.pack_into(
            block,
            fmt.HEADER_SIZE,
            self.flags,
            self.free,
            self.dinodes,
            self.unlinked,
            self.data0,
            self.blocks,
            self.index,
            self.clusters.to_bytes(32, "little"),
        )
        return block + self.bits

    # --- looking -----------------------------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Blocks that can be given out now."""
        return self.free - self.pending

    def contains(self, number: int) -> bool:
        return self.data0 <= number < self.data0 + self.blocks

    def state(self, number: int) -> int:
        return get(self.bits, number - self.data0)

    # --- giving out --------------------------------------------------------------------------------------------------

    def _take(self, start: int, count: int, state: int) -> None:
        set_range(self.bits, start, count, state)
        set_range(self.open_bits, start, count, USED)
        set_range(self.data_bits, start, count, USED)
        self.free -= count

    def allocate(self, want: int, goal: int) -> tuple[int, int]:
        """A run of up to `want` blocks, beginning at block number `goal` if that is free. (number, count), count ≥ 1;
        (0, 0) when nothing is available."""
        start = goal - self.data0
        bits = self.data_bits
        if not (0 <= start < self.blocks and get(bits, start) == FREE):
            start = self._find_run(want)
            if start < 0:
                bits = self.open_bits  # only clusters are left
                start = first_free(bits, 0, self.blocks)
                if start < 0:
                    return 0, 0
        count = free_run(bits, start, min(want, self.blocks - start))
        self._take(start, count, USED)
        self.goal = start + count
        return self.data0 + start, count

    def _find_run(self, want: int) -> int:
        """Where to begin: a hole long enough behind the goal, else anywhere, else the first free block."""
        goal = self.goal if self.goal < self.blocks else 0
        size = want >> 2
        while size >= 2:
            for begin in (goal >> 2, 0):
                at = self.data_bits.find(bytes(size), begin)
                if at >= 0:
                    return at * 4
            size >>= 2
        start = first_free(self.data_bits, goal, self.blocks)
        return start if start >= 0 else first_free(self.data_bits, 0, goal)

    def allocate_dinode(self, goal: int) -> int:
        number = self.find_dinode(goal)
        if number:
            self.take_dinode(number)
        return number

    def take_dinode(self, number: int) -> None:
        """The block that `find_dinode` put aside becomes a dinode."""
        self.pending -= 1
        self.newest_dinode = number - self.data0
        self._take(self.newest_dinode, 1, DINODE_STATE)
        self.dinodes += 1

    def put_back(self, number: int) -> None:
        """The block that `find_dinode` put aside is not needed."""
        self.reopen(number, 1)

    def find_dinode(self, goal: int) -> int:
        """A block for a dinode: in the cluster of block `goal` (of the newest dinode here, when the goal is in another
        group), in a new cluster (at once when the goal is 0), in any cluster, anywhere. 0: none.
        It is only put aside: its glock is to be had, and more blocks found, before it is taken."""
        start = self.newest_dinode if goal and not self.contains(goal) else goal - self.data0
        index = -1
        if 0 <= start < self.blocks:
            index = self._in_cluster(start // fmt.CLUSTER)
        if index < 0:
            index = self._new_cluster()
        cluster = 0
        while index < 0 and self.clusters >> cluster:
            index = self._in_cluster(cluster)
            cluster += 1
        if index < 0:
            index = first_free(self.open_bits, 0, self.blocks)
        if index < 0:
            return 0
        self.pending += 1
        set_range(self.open_bits, index, 1, USED)
        set_range(self.data_bits, index, 1, USED)
        return self.data0 + index

    def free_in_cluster(self, number: int, most: int) -> list[int]:
        """Blocks behind `number` in its inode cluster that may become dinodes next."""
        index = number - self.data0
        end = (index // fmt.CLUSTER + 1) * fmt.CLUSTER
        found: list[int] = []
        while len(found) < most and (index := first_free(self.open_bits, index + 1, end)) >= 0:
            found.append(self.data0 + index)
        return found

    def _in_cluster(self, cluster: int) -> int:
        if not self.clusters >> cluster & 1:
            return -1
        first = cluster * fmt.CLUSTER
        return first_free(self.open_bits, first, first + fmt.CLUSTER)

    def _new_cluster(self) -> int:
        """From the end of the group, away from data that grows from its start."""
        at = self.blocks // 4 & ~(fmt.CLUSTER_BYTES - 1)
        while at > 0:
            at = self.data_bits.rfind(_EMPTY_CLUSTER, 0, at)
            if at < 0:
                return -1
            at &= ~(fmt.CLUSTER_BYTES - 1)
            if self.data_bits[at : at + fmt.CLUSTER_BYTES] == _EMPTY_CLUSTER:
                self.clusters |= 1 << at // fmt.CLUSTER_BYTES
                self.data_bits[at : at + fmt.CLUSTER_BYTES] = _FULL_CLUSTER
                return at * 4
        return -1

    # --- taking back -------------------------------------------------------------------------------------------------

    def release(self, number: int, count: int) -> None:
        """FREE in the bitmap; given out again after `reopen`."""
        start = number - self.data0
        set_range(self.bits, start, count, FREE)
        self.free += count
        self.pending += count

    def reopen(self, number: int, count: int) -> None:
        """The commit that freed them is durable."""
        if not self.loaded or not self.pending:
            return  # dropped from memory since: loading showed them free
        start = number - self.data0
        self.pending -= count
        set_range(self.open_bits, start, count, FREE)
        first, last = start // fmt.CLUSTER, (start + count - 1) // fmt.CLUSTER
        if not self.clusters >> first & (1 << last - first + 1) - 1:
            set_range(self.data_bits, start, count, FREE)
            return
        for cluster in range(first, last + 1):
            begin = max(start, cluster * fmt.CLUSTER)
            end = min(start + count, (cluster + 1) * fmt.CLUSTER)
            self._reopen_in_cluster(cluster, begin, end - begin)

    def _reopen_in_cluster(self, cluster: int, start: int, count: int) -> None:
        at = cluster * fmt.CLUSTER_BYTES
        if not self.clusters >> cluster & 1:
            set_range(self.data_bits, start, count, FREE)
        elif self.open_bits[at : at + fmt.CLUSTER_BYTES] == _EMPTY_CLUSTER:
            self.clusters &= ~(1 << cluster)
            self.data_bits[at : at + fmt.CLUSTER_BYTES] = _EMPTY_CLUSTER

    def unlink_dinode(self, number: int) -> None:
        """Its last name is gone: DINODE to UNLINKED."""
        assert self.state(number) == DINODE_STATE, "GFS-9"
        set_range(self.bits, number - self.data0, 1, UNLINKED)
        self.dinodes -= 1
        self.unlinked += 1

    def free_dinode(self, number: int) -> None:
        assert self.state(number) == UNLINKED, "GFS-9"
        self.unlinked -= 1
        self.release(number, 1)

    def unlinked_numbers(self) -> list[int]:
        """Dinodes that wait for their last close."""
        return self.numbers_in(UNLINKED) if self.unlinked else []

    def numbers_in(self, *states: int) -> list[int]:
        """Blocks in one of these states (not FREE), in order; bytes of free blocks cost nothing."""
        bits, data0 = self.bits, self.data0
        return [
            data0 + match.start() * 4 + offset
            for match in _NOT_FREE.finditer(bits)
            for offset, state in enumerate(STATES[bits[match.start()]])
            if state in states
        ]
