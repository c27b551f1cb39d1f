"""The superblock: read with its copies, checked, refused with a sentence that says what to do."""

import msgspec

from corral.gfs import format as fmt
from corral.gfs.device import Device
from corral.gfs.format import SUPER, SUPERBLOCK_AT, BlockDamaged


class Refused(Exception):
    """This device cannot be mounted; the message says why and what to do next."""


class Superblock(msgspec.Struct, frozen=True):
    """The facts that never change while mounted. Field meanings: docs/format/disk.md, section 2."""

    version: int
    block_size: int
    compatible: int
    read_only_compatible: int
    incompatible: int
    uuid: bytes
    created_ns: int
    blocks: int
    master: int
    root: int
    rgrps: int
    rgrp_blocks: int
    journals: int
    cluster_blocks: int
    copy_1: int
    copy_2: int
    lock_table: bytes  # zero-padded

    @property
    def table(self) -> str:
        """cluster:name"""
        return self.lock_table.rstrip(b"\0").decode("ascii", "replace")

    @property
    def cluster(self) -> str:
        return self.table.partition(":")[0]

    @property
    def name(self) -> str:
        return self.table.partition(":")[2]

    def image(self, number: int) -> bytes:
        """The sealed block for address `number`."""
        block = bytearray(fmt.BLOCK)
        SUPER.pack_into(block, fmt.HEADER_SIZE, *msgspec.structs.astuple(self))
        return fmt.seal(block, fmt.SUPERBLOCK, number, 1)


def parse(block: bytes | bytearray, number: int, device_blocks: int) -> Superblock:
    """Raises BlockDamaged or Refused."""
    fmt.check(block, fmt.SUPERBLOCK, number)
    superblock = Superblock(*SUPER.unpack_from(block, fmt.HEADER_SIZE))
    if superblock.version != fmt.VERSION:
        raise Refused(
            f"the filesystem has format version {superblock.version}, this corral reads version {fmt.VERSION}: "
            "use the corral release that made it, or copy its data and run mkfs"
        )
    unknown = superblock.incompatible & ~fmt.FEATURES_INCOMPATIBLE
    if unknown:
        raise Refused(f"the filesystem uses features unknown here (incompatible bits {unknown:#x}): use a newer corral")
    unknown = superblock.read_only_compatible & ~fmt.FEATURES_READ_ONLY
    if unknown:
        raise Refused(f"features unknown here forbid writing (read-only bits {unknown:#x}): use a newer corral")
    if superblock.block_size != fmt.BLOCK or superblock.blocks > device_blocks:
        raise Refused(
            f"the filesystem has {superblock.blocks} blocks of {superblock.block_size} bytes, the device only "
            f"{device_blocks} of {fmt.BLOCK}: was it cut off?"
        )
    limit = superblock.blocks
    if not (fmt.SUPERBLOCK_AT < superblock.master < limit and fmt.SUPERBLOCK_AT < superblock.root < limit):
        raise BlockDamaged(number, "points outside the filesystem")
    return superblock


async def read(device: Device) -> tuple[Superblock, list[str]]:
    """The superblock and what was wrong with the places tried before the good one. Raises Refused."""
    problems: list[str] = []
    places = [SUPERBLOCK_AT, device.blocks - 1]
    for number in places:
        if number <= 0 or number >= device.blocks:
            continue
        try:
            return parse(await device.read(number), number, device.blocks), problems
        except BlockDamaged as error:
            problems.append(f"superblock {'copy ' if problems else ''}at {error}")
    raise Refused(
        "no superblock found: "
        + ("; ".join(problems) or "it is too small to hold one")
        + "; is this a corral filesystem? mkfs makes one"
    )
