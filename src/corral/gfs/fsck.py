"""fsck: everything the format holds, checked against everything else; findings as records; repairs in place.

    1 superblock, its copies, master directory, rindex        (without these nothing can be found: Refused)
    2 journals: replayed (repair) or reported
    3 every name from the roots down, every inode's blocks    -> who owns each block, how often each inode is named
    4 dinodes nobody names                                    -> lost+found, or freed when they have no names
    5 bitmaps, group counts, statfs                           -> as step 3 and 4 found them

The device must not be mounted anywhere. Repairs go straight to their places and may be repeated.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Final, final

import msgspec

from corral.base.world import Disk, World
from corral.gfs import format as fmt
from corral.gfs.device import Device
from corral.gfs.directory import Listed
from corral.gfs.format import BLOCK, DINODE_STATE, FREE, UNLINKED, USED, BlockDamaged
from corral.gfs.fsckbitmap import Bitmaps
from corral.gfs.glock import INODE, Glock
from corral.gfs.inode import Inode
from corral.gfs.journal import Ring
from corral.gfs.lostfound import Orphan, reattach
from corral.gfs.meta import Meta
from corral.gfs.recovery import replay_slot
from corral.gfs.replay import JournalDamaged, clean_header, scan
from corral.gfs.superblock import Refused, Superblock
from corral.gfs.superblock import read as read_superblock
from corral.gfs.system import read_master, read_rindex_entries, ring_of

FINDINGS_MAX: Final = 10_000
WINDOWS: Final = 64  # clusters of dinodes kept: 16 MiB


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong. `code` is stable; `block` is where; `repaired` says whether it was put right."""

    code: str
    block: int
    message: str
    repaired: bool


class Report(msgspec.Struct):
    """`clean`: nothing was found wrong. Counts are of the filesystem as it is after repairs."""

    findings: list[Finding] = []
    inodes: int = 0
    directories: int = 0
    blocks_used: int = 0
    blocks_free: int = 0
    journals_replayed: list[int] = []

    @property
    def clean(self) -> bool:
        return not self.findings

    @property
    def repaired(self) -> bool:
        """Everything found was put right."""
        return all(finding.repaired for finding in self.findings)


async def check(
    world: World,
    disk: Disk,
    *,
    repair: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Raises Refused when there is no superblock or no way to the system files, OSError when the device fails."""
    checker = Checker(world, Device(world, disk), repair=repair, progress=progress)
    await checker.run()
    return checker.report


@final
class Known:
    """What is known of one inode after its blocks were walked."""

    __slots__ = ("entries", "formal", "inode", "is_directory", "links", "nlink", "parent", "subdirectories")

    def __init__(self, inode: Inode) -> None:
        self.inode: Inode | None = inode
        self.formal = inode.formal
        self.nlink = inode.nlink
        self.is_directory = inode.is_directory
        self.parent = inode.parent
        self.links = 0
        self.subdirectories = 0


@final
class Checker:
    def __init__(
        self,
        world: World,
        device: Device,
        *,
        repair: bool,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self.world = world
        self.device = device
        self.repair = repair
        self.progress = progress
        self.report = Report()
        self.superblock: Superblock
        self.system: dict[bytes, tuple[int, int]] = {}
        self.bitmaps: Bitmaps
        self.known: dict[int, Known] = {}
        self.bad: set[int] = set()  # inodes that cannot be read
        self.formals: dict[int, int] = {}
        self.lost: list[Orphan] = []
        self.windows: dict[int, bytearray] = {}  # clusters read lately

    # --- findings ----------------------------------------------------------------------------------------------------

    def found(self, code: str, block: int, message: str, *, repaired: bool = False) -> None:
        if len(self.report.findings) < FINDINGS_MAX:
            self.report.findings.append(Finding(code, block, message, repaired))

    def note(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    async def write_meta(self, meta: Meta) -> None:
        self.windows.pop(meta.number // fmt.CLUSTER, None)
        await self.device.write(meta.number, [meta.seal()])

    # --- the run -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        await self._superblock()
        try:
            # A journal may hold the master directory's newest state: read, replay, read again.
            self.system = await read_master(self.device, self.superblock)
            await self._journals()
            self.system = await read_master(self.device, self.superblock)
            entries = await read_rindex_entries(self.device, self.superblock, self.system)
        except BlockDamaged as error:
            raise Refused(f"the system files cannot be found: {error}; restore the superblock or the disk") from None
        self.bitmaps = Bitmaps(entries)
        await self.bitmaps.load(self.device, self)
        self._claim_fixed()
        await self._walk(self.superblock.master, "system files")
        await self._walk(self.superblock.root, "directories")
        await self._orphans()
        await self._links()
        await self._compare()
        await self._statfs()
        if self.repair:
            await self.device.flush()
            if self.lost:
                await reattach(self.world, self.device.disk, self.lost)
        self.note("done", 1, 1)

    async def _superblock(self) -> None:
        self.superblock, problems = await read_superblock(self.device)
        superblock = self.superblock
        for problem in problems:
            self.found("superblock", fmt.SUPERBLOCK_AT, problem, repaired=self.repair)
        for number in (fmt.SUPERBLOCK_AT, superblock.copy_1, superblock.copy_2):
            if not number:
                continue
            image = superblock.image(number)
            if bytes(await self.device.read(number)) != image:
                if number != fmt.SUPERBLOCK_AT:
                    self.found("superblock copy", number, "differs from the superblock", repaired=self.repair)
                if self.repair:
                    await self.device.write(number, [image])

    async def _journals(self) -> None:
        for slot in range(self.superblock.journals):
            self.note("journals", slot, self.superblock.journals)
            uuid = self.superblock.uuid
            try:
                ring = await ring_of(self.device, self.superblock, self.system, slot)
                if self.repair:
                    state = await replay_slot(self.device, ring, slot, uuid, self.world.wall_ns())
                    if state.images:
                        self.report.journals_replayed.append(slot)
                else:
                    state = await scan(self.device, ring, slot, uuid)
                    if not state.clean:
                        self.found(
                            "journal", ring.address(0), f"journal {slot} is not clean: mount or repair replays it"
                        )
            except JournalDamaged as error:
                await self._discard_journal(slot, str(error))

    async def _discard_journal(self, slot: int, problem: str) -> None:
        """Its committed but unplaced changes are lost; the rest of the check puts right what they leave behind."""
        ring: Ring | None = None
        with suppress(JournalDamaged):
            ring = await ring_of(self.device, self.superblock, self.system, slot)
        self.found("journal", 0, problem, repaired=self.repair and ring is not None)
        if not self.repair or ring is None:
            return
        for position in range(ring.blocks):
            await self.device.write(ring.address(position), [fmt.ZERO_BLOCK])
        header = clean_header(ring, slot, self.superblock.uuid, 0, 1, self.world.wall_ns())
        await self.device.write(ring.address(0), [header])

    def _claim_fixed(self) -> None:
        for number in (self.superblock.copy_1, self.superblock.copy_2):
            if number and self.bitmaps.covers(number):
                self.bitmaps.claim(number, 1, USED)

    # --- the tree ----------------------------------------------------------------------------------------------------

    async def read_inode(self, number: int) -> Inode:
        """Raises BlockDamaged."""
        if not self.bitmaps.covers(number):
            raise BlockDamaged(number, "lies in no resource group")
        inode = Inode(number, Glock(INODE, number))
        await inode.load(await self._read_near(number), self.device.read, self.superblock.blocks)
        return inode

    async def _read_near(self, number: int) -> bytearray:
        """Dinodes lie in clusters: one read brings the neighbours, which are asked for next."""
        window = number // fmt.CLUSTER
        content = self.windows.pop(window, None)
        first = window * fmt.CLUSTER
        if content is None:
            content = await self.device.read(first, min(fmt.CLUSTER, self.device.blocks - first))
            if len(self.windows) >= WINDOWS:
                del self.windows[next(iter(self.windows))]
        self.windows[window] = content
        at = (number - first) * BLOCK
        return content[at : at + BLOCK]

    async def _enter(self, number: int, state: int = DINODE_STATE) -> Known | None:
        """Reads an inode met for the first time and claims all its blocks."""
        try:
            inode = await self.read_inode(number)
            await self._claim_inode(inode, state)
        except BlockDamaged as error:
            self.bad.add(number)
            self.found("inode", number, f"inode {number} cannot be read: {error}")
            return None
        known = Known(inode)
        other = self.formals.setdefault(inode.formal, number)
        if other != number:
            self.found("formal number", number, f"inodes {other} and {number} share the formal number {inode.formal}")
        self.known[number] = known
        self.report.inodes += 1
        return known

    async def _claim_inode(self, inode: Inode, state: int) -> None:
        """Every block of it, once. Raises BlockDamaged for what cannot be walked."""
        total = 1
        self._claim(inode.number, 1, state, inode.number)
        if inode.extents is not None:
            for node in inode.extents.nodes():
                self._claim(node.number, 1, USED, inode.number)
                total += 1
            self._claim_extents(inode)
            total += sum(count for _, _, count, _ in inode.extents.extents())
        if inode.directory is not None:
            for meta in await inode.directory.blocks(self.device.read):
                self._claim(meta.number, 1, USED, inode.number)
                total += 1
        if inode.blocks != total:
            self.found(
                "block count", inode.number, f"inode says {inode.blocks} blocks, has {total}", repaired=self.repair
            )
            if self.repair:
                inode.blocks = total
                await self.write_meta(inode)

    def _claim_extents(self, inode: Inode) -> None:
        assert inode.extents is not None
        for _, physical, count, _ in inode.extents.extents():
            self._claim(physical, count, USED, inode.number)

    def _claim(self, number: int, count: int, state: int, owner: int) -> None:
        if not self.bitmaps.covers(number, count):
            self.found("range", owner, f"inode {owner} claims blocks {number}+{count} outside the resource groups")
            return
        twice = self.bitmaps.claim(number, count, state)
        if twice:
            self.found("double", owner, f"inode {owner} claims {twice} blocks from {number} that others claim too")

    async def _walk(self, start: int, what: str) -> None:
        """Depth of the tree does not matter: directories wait in a list."""
        first = await self._enter(start)
        if first is None:
            return
        if not first.is_directory:
            self.found("root", start, f"the top of the {what} is not a directory")
            return
        if first.parent != start:
            self.found("parent", start, "the root directory is not its own parent")
        first.links += 1
        waiting = [start]
        done = 0
        while waiting:
            number = waiting.pop()
            done += 1
            self.note(what, done, done + len(waiting))
            known = self.known[number]
            inode, known.inode = known.inode, None  # memory: an inode's content only while it is walked
            assert inode is not None
            self.report.directories += 1
            waiting.extend(await self._walk_directory(number, known, inode))

    async def _walk_directory(self, number: int, known: Known, inode: Inode) -> list[int]:
        waiting: list[int] = []
        for entry in await self._names(inode):
            child = self.known.get(entry.number)
            if child is None and entry.number not in self.bad:
                child = await self._enter(entry.number)
            problem = self._entry_problem(entry, child, number)
            if problem is not None:
                self.found("dirent", number, problem, repaired=self.repair)
                if self.repair:
                    await self._remove_dirent(inode, entry)
                continue
            assert child is not None
            child.links += 1
            if child.is_directory:
                known.subdirectories += 1
                await self._check_parent(child, entry.number, number, inode.formal)
                waiting.append(entry.number)
            else:
                child.inode = None
        return waiting

    async def _check_parent(self, child: Known, number: int, parent: int, formal: int) -> None:
        assert child.inode is not None
        if (child.inode.parent, child.inode.parent_formal) != (parent, formal):
            self.found("parent", number, f"directory says its parent is {child.parent}", repaired=self.repair)
            if self.repair:
                child.inode.parent, child.inode.parent_formal = parent, formal
                await self.write_meta(child.inode)

    def _entry_problem(self, entry: Listed, child: Known | None, directory: int) -> str | None:
        name = entry.name.decode("utf-8", "backslashreplace")
        if child is None:
            return f"{name!r} names block {entry.number}, which is no sound inode"
        if child.formal != entry.formal:
            return f"{name!r} names formal number {entry.formal}, the inode has {child.formal}"
        if child.is_directory and child.links:
            return f"{name!r} is a second name of directory {entry.number}"
        return None

    async def _names(self, inode: Inode) -> list[Listed]:
        directory = inode.directory
        assert directory is not None
        out: list[Listed] = []
        cookie = 3
        seen: set[int] = set()
        while True:
            listing, following = await directory.listing_at(cookie, self.device.read)
            first, last = cookie, following or 1 << 60
            for entry in listing:
                if not first <= entry.cookie < last:
                    # The name is in a leaf that its hash does not lead to: lookup would not find it.
                    self.found("hash", inode.number, f"{entry.name!r} lies in the wrong leaf")
            out.extend(listing)
            if not following:
                break
            seen.add(cookie)
            cookie = following
        names = {entry.name for entry in out}
        if len(names) != len(out) or len(out) != directory.entries:
            self.found(
                "entries",
                inode.number,
                f"directory says {directory.entries} names, has {len(out)}",
                repaired=self.repair,
            )
            if self.repair:
                directory.entries = len(out)
                await self.write_meta(inode)
        if not directory.area and inode.size != directory.leaf_count * BLOCK:
            self.found("size", inode.number, "directory size is not that of its leaves")
        return out

    async def _remove_dirent(self, inode: Inode, entry: Listed) -> None:
        directory = inode.directory
        assert directory is not None
        changed: list[Meta] = []

        class Collect:
            def allocate_block(self, glock: Glock) -> int:
                raise AssertionError("removing needs no space")

            def free_block(self, meta: Meta) -> None:
                raise AssertionError("removing frees nothing")

            def add(self, meta: Meta) -> None:
                changed.append(meta)

        directory.remove(Collect(), entry.name, fmt.name_hash(entry.name))
        for meta in [*changed, inode]:
            await self.write_meta(meta)

    # --- what nobody names -------------------------------------------------------------------------------------------

    async def _orphans(self) -> None:
        """UNLINKED ones wait for the next mount. The others get a name in lost+found, whole trees by their top."""
        orphans: list[int] = []
        for number in self.bitmaps.dinodes():
            if number in self.known:
                continue
            state = self.bitmaps.recorded(number)
            known = None if number in self.bad else await self._enter(number, state)
            if known is None:
                self.bitmaps.claim_nothing(number)
            elif state == UNLINKED:
                await self._unlinked(number, known)
            else:
                orphans.append(number)
        for number in orphans:
            known = self.known[number]
            if known.inode is not None and known.is_directory:
                inode, known.inode = known.inode, None
                for child in await self._walk_directory(number, known, inode):
                    if child not in orphans:
                        orphans.append(child)
        for number in orphans:
            known = self.known[number]
            if known.links == 0:
                self.found("orphan", number, f"inode {number} has no name", repaired=self.repair)
                self.lost.append(Orphan(number, 0, known.subdirectories))

    async def _unlinked(self, number: int, known: Known) -> None:
        inode, known.inode = known.inode, None
        assert inode is not None
        if inode.nlink:
            self.found("unlinked", number, "is UNLINKED but counts names", repaired=self.repair)
            if self.repair:
                inode.nlink = 0
                await self.write_meta(inode)

    async def _links(self) -> None:
        for number, known in sorted(self.known.items()):
            if not known.links:
                continue
            wanted = 2 + known.subdirectories if known.is_directory else known.links
            if known.nlink != wanted:
                self.found("links", number, f"inode says {known.nlink} links, has {wanted}", repaired=self.repair)
                if self.repair:
                    inode = await self.read_inode(number)
                    inode.nlink = wanted
                    await self.write_meta(inode)

    # --- sums --------------------------------------------------------------------------------------------------------

    async def _compare(self) -> None:
        await self.bitmaps.compare(self.device, self, self.repair)
        self.report.blocks_free = self.bitmaps.total(FREE)
        self.report.blocks_used = self.bitmaps.blocks - self.report.blocks_free

    async def _statfs(self) -> None:
        try:
            master = await self.read_inode(self.system[b"statfs"][1])
            total, all_free, all_dinodes = master.record(fmt.STATFS)
            free = dinodes = 0
            changes: list[Inode] = []
            for slot in range(self.superblock.journals):
                change = await self.read_inode(self.system[b"statfs_change%d" % slot][1])
                _, more_free, more_dinodes = change.record(fmt.STATFS)
                free += more_free
                dinodes += more_dinodes
                changes.append(change)
        except (BlockDamaged, KeyError) as error:
            self.found("statfs", self.system[b"statfs"][1], f"cannot be read: {error}")
            return
        said = (total, all_free + free, all_dinodes + dinodes)
        real = (self.bitmaps.blocks, self.bitmaps.total(FREE), self.bitmaps.total(DINODE_STATE))
        if said != real:
            self.found("statfs", master.number, f"total, free, dinodes say {said}, are {real}", repaired=self.repair)
            if self.repair:
                fmt.STATFS.pack_into(master.payload, 0, *real)
                await self.write_meta(master)
                for change in changes:
                    fmt.STATFS.pack_into(change.payload, 0, 0, 0, 0)
                    await self.write_meta(change)
