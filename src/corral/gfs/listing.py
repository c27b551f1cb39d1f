"""Listing directories; with attributes, glocks are asked for at once and neighbouring dinodes read at once."""

from contextlib import suppress
from errno import (
    EIO,
    ESTALE,
)
from typing import Final

from corral.api.gfs import Dirent
from corral.gfs import format as fmt
from corral.gfs.directory import Directory, Listed
from corral.gfs.format import BlockDamaged
from corral.gfs.glock import SH
from corral.gfs.inode import S_IFDIR, Inode
from corral.gfs.renames import Renames

READ_CLUSTER: Final = 256  # blocks: neighbouring dinodes read at once


class Listing(Renames):
    """readdir and readdirplus."""

    async def readdir(self, ino: int, handle: int, offset: int, size: int, *, plus: bool) -> list[Dirent]:
        inode, directory = await self.hold_directory(ino, SH)
        try:
            out, room = _dots(self.ino_of(inode.number), self.ino_of(inode.parent), offset, size, plus)
            listed = await self._list(directory, max(offset, 2), room, plus)
        except BlockDamaged as error:
            raise self.damage(error, f"directory {inode.number}") from None
        finally:
            self.drop(inode, SH)
        if plus:
            return out + await self._with_entries(listed)
        out.extend(Dirent(one.name, self.ino_of(one.number), one.type, one.cookie) for one in listed)
        return out

    async def _list(self, directory: Directory, after: int, room: int, plus: bool) -> list[Listed]:
        out: list[Listed] = []
        at = after
        while True:
            listing, at = await directory.listing_at(max(at, after + 1), self.read_block)
            for one in listing:
                if one.cookie <= after:
                    continue
                room -= dirent_size(one.name, plus)
                if room < 0:
                    return out
                out.append(one)
            if not at:
                return out

    async def _with_entries(self, listed: list[Listed]) -> list[Dirent]:
        """All glocks asked for at once, neighbouring dinodes read at once; then one by one what is left."""
        absent = []
        for one in listed:
            known = self.inodes.get(one.number)
            if known is None or not known.loaded:
                with suppress(OSError):
                    absent.append(self.inode(one.number, one.formal))
        await self.prefetch_inodes(absent)
        out: list[Dirent] = []
        for one in listed:
            entry = None
            try:
                inode = await self.hold_named(one.number, one.formal, SH)
                if inode.nlink:
                    entry = self.entry(inode)
                    if not self.locks.table.local:
                        # The kernel dates names out of a listing when it reads the answer, not when it asked: the
                        # directory may have changed hands in between, and nothing would tell it.
                        entry.entry_valid_ns = 0
                self.drop(inode, SH)
            except OSError as error:
                if error.errno not in (ESTALE, EIO) or self.refusal is not None:
                    raise
            out.append(Dirent(one.name, self.ino_of(one.number), one.type, one.cookie, entry))
        return out

    async def prefetch_inodes(self, inodes: list[Inode]) -> None:
        table, locks = self.locks.table, self.locks
        asked = [locks.fetch(inode.glock, SH) for inode in inodes]
        locks.pump()
        for granted in asked:
            if granted is not None:
                await granted
        held = [inode for inode in sorted(inodes, key=_number) if table.try_hold(inode.glock, SH)]
        try:
            await self._read_clusters([inode for inode in held if not inode.loaded])
        finally:
            for inode in held:
                self.drop(inode, SH)

    async def _read_clusters(self, inodes: list[Inode]) -> None:
        """`inodes` sorted by number, held."""
        at = 0
        while at < len(inodes):
            first = inodes[at].number
            upto = at + 1
            while (
                upto < len(inodes)
                and inodes[upto].number < first + READ_CLUSTER
                and inodes[upto].number - inodes[upto - 1].number <= fmt.CLUSTER
            ):
                upto += 1
            count = inodes[upto - 1].number - first + 1
            content = await self.device.read(first, count) if count > 1 else bytearray()
            for inode in inodes[at:upto]:
                if count > 1 and not inode.loaded and self.journal.newest_image(inode.number) is None:
                    begin = (inode.number - first) * fmt.BLOCK
                    await self._load_from(inode, content[begin : begin + fmt.BLOCK])
            at = upto

    async def _load_from(self, inode: Inode, block: bytearray) -> None:
        """As `load`, but whatever is wrong is left for `load` to say."""
        try:
            if fmt.DINODE_HEAD.unpack_from(block, fmt.HEADER_SIZE)[0] == inode.formal:
                await self.take_content(inode, block)
        except (BlockDamaged, OSError):
            pass


def dirent_size(name: bytes, plus: bool) -> int:
    """Bytes of one entry in a FUSE reply."""
    return (24 + len(name) + 7 & ~7) + (128 if plus else 0)


def _dots(ino: int, parent: int, offset: int, size: int, plus: bool) -> tuple[list[Dirent], int]:
    out: list[Dirent] = []
    for cookie, name, number in ((1, b".", ino), (2, b"..", parent)):
        if offset < cookie and size >= dirent_size(name, plus):
            out.append(Dirent(name, number, S_IFDIR >> 12, cookie))
            size -= dirent_size(name, plus)
    return out, size


def _number(inode: Inode) -> int:
    return inode.number
