"""Recovery of journals: one's own when mounting, a dead node's in a round (DESIGN 5, recovery gate; traps 14-17).

For each slot: hold the journal's glock in EX (a live owner holds it, so it is had only when the owner is gone), scan,
replay, write a clean header. When the gate is open: merge the slot's statfs changes into the master in one transaction
of *our* journal, and free what dead nodes had open.

  GFS-13  until the gate is open nothing but journals is locked: what a lock of the dead protected is on the disk only
          when every journal has been replayed, and whoever read it before would go on with that.

Every step may be repeated, so a recoverer that dies halfway is replaced by the next round. One that is only told of a
newer round goes on, and the newer round waits for it: its writes under way could land on what others write later.
"""

from typing import TYPE_CHECKING, Any

from corral.base.errors import ClusterError
from corral.base.view import Round
from corral.gfs import format as fmt
from corral.gfs.device import Device
from corral.gfs.format import BlockDamaged
from corral.gfs.glock import EX, JOURNAL, NOEXP, TRY, Glock
from corral.gfs.inode import Inode
from corral.gfs.journal import Ring
from corral.gfs.replay import JournalDamaged, JournalState, put_in_place, scan, write_clean_header
from corral.gfs.rgrp import Rgrp

if TYPE_CHECKING:
    from corral.gfs.filesystem import GfsFilesystem


async def replay_slot(device: Device, ring: Ring, slot: int, uuid: bytes, wall: int) -> JournalState:
    """Clean on return; what was done is in the state returned. Raises JournalDamaged, OSError."""
    state = await scan(device, ring, slot, uuid)
    if not state.clean:
        await put_in_place(device, state)
        await write_clean_header(device, ring, slot, uuid, state, wall)
    return state


class Recovery:
    """What `stop`, `start` and `finish` of a filesystem do with journals."""

    def __init__(self, filesystem: "GfsFilesystem") -> None:
        self.filesystem = filesystem
        self.started = -1
        self.replayed: list[int] = []  # slots, for status
        self.scan_wanted = False  # a journal was replayed, or nobody was here before: look for unlinked inodes
        self.unmerged: set[int] = set()  # slots recovered here whose statfs changes are not in the master yet
        self.failed: dict[int, str] = {}  # slots whose replay failed: the gate stays shut
        self.replaying: int | None = None  # the slot whose journal is being replayed, or waited for
        self._under_way: dict[int, list[Any]] = {}  # slot -> futures of those who wait for its replay

    async def start(self, round: Round | None) -> None:
        """`round` None: the only mount there is. Raises JournalDamaged or BlockDamaged when a journal cannot be
        replayed by anybody, OSError when not by this node now. May be called again."""
        identity = round.id if round is not None else 0
        self.started = -1
        self.failed.clear()
        for slot in self._slots(round):
            self.replaying = slot
            try:
                await self._recover(slot)
            except (JournalDamaged, BlockDamaged) as error:
                self.failed[slot] = str(error)
                raise
            except OSError as error:
                self.failed[slot] = error.strerror or str(error)
                raise
            finally:
                self.replaying = None
        self.started = identity

    def _slots(self, round: Round | None) -> list[int]:
        """A survivor replays the failed members' journals, a first mounter all; nobody those of live owners."""
        own = self.filesystem.slot
        every = range(self.filesystem.superblock.journals)
        if round is None:
            self.scan_wanted = True
            return [slot for slot in every if slot != own]
        alive = {entry.slot for entry in round.members}
        newcomers = set(round.joined)
        survivors = [entry for entry in round.members if entry.member not in newcomers]
        if not survivors:
            self.scan_wanted = True
            return [slot for slot in every if slot not in alive]
        return [slot for slot in sorted({entry.slot for entry in round.failed}) if slot not in alive]

    def finish(self, round: Round | None) -> bool:
        """False for a stale round, or while a journal is known to be unreadable."""
        identity = round.id if round is not None else 0
        return identity == self.started and not self.failed

    async def _recover(self, slot: int) -> None:
        filesystem = self.filesystem
        waiters = self._under_way.get(slot)
        if waiters is None:
            glock = filesystem.locks.table.get(JOURNAL, slot)
            await filesystem.locks.hold(glock, EX, NOEXP)
            waiters = self._under_way[slot] = []
            filesystem.world.spawn(self._carry_out(slot, glock), f"gfs: replay journal {slot}")
        waiter = filesystem.world.future()
        waiters.append(waiter)
        error = await waiter
        if error is not None:
            raise error

    async def _carry_out(self, slot: int, glock: Glock) -> None:
        """A task of its own: a cancelled round must not tear it from its writes."""
        failure: Exception | None = None
        try:
            await self._replay(slot)
        except (JournalDamaged, BlockDamaged, OSError, ClusterError) as error:
            failure = error
        finally:
            self.filesystem.locks.drop(glock, EX)
        if failure is None:
            self.filesystem.locks.give_up(glock)
        for waiter in self._under_way.pop(slot):
            if not waiter.done():
                waiter.set_result(failure)

    async def _replay(self, slot: int) -> None:
        filesystem = self.filesystem
        ring = await filesystem.ring_of(slot)
        device, uuid = filesystem.device, filesystem.superblock.uuid
        state = await scan(device, ring, slot, uuid)
        if not state.clean:
            await put_in_place(device, state)
            await self._bury(state)
            await write_clean_header(device, ring, slot, uuid, state, filesystem.world.wall_ns())
            self.replayed.append(slot)
            self.scan_wanted = True
        self.unmerged.add(slot)

    # --- behind the gate ---------------------------------------------------------------------------------------------

    @property
    def leaves_work(self) -> bool:
        return self.scan_wanted or bool(self.unmerged)

    def give_up_work(self) -> None:
        self.scan_wanted = False
        self.unmerged.clear()

    async def tidy_up(self) -> None:
        """With ordinary locks, once the gate is open (GFS-13). Every step may be left undone by a mount that dies."""
        while self.unmerged:
            slot = min(self.unmerged)
            self.unmerged.discard(slot)
            await self._merge_statfs(slot)
        if self.scan_wanted:
            self.scan_wanted = False
            await self.filesystem.scan_unlinked()

    # --- replay ------------------------------------------------------------------------------------------------------

    async def _bury(self, state: JournalState) -> None:
        """Freed dinodes whose tombstones may not have been written: their blocks must not look like files."""
        filesystem = self.filesystem
        for number in sorted(state.revoked_numbers):
            try:
                rgrp = filesystem.rgrp_of(number)
                probe = Rgrp(rgrp.number, rgrp.data0, rgrp.blocks, rgrp.index, rgrp.glock)
                # The dead node held this group in EX if it freed something in it after the tail.
                probe.load(await filesystem.device.read(rgrp.number))
            except BlockDamaged:
                continue
            if probe.state(number) == fmt.FREE and number not in state.images and rgrp.number in state.images:
                await filesystem.device.write(number, [fmt.ZERO_BLOCK])

    async def _merge_statfs(self, slot: int) -> None:
        """Into the master, and zero, in one transaction of this node's journal (trap 17)."""
        filesystem = self.filesystem
        try:
            change = await filesystem.hold_system(b"statfs_change%d" % slot, EX, TRY)
        except BlockingIOError:
            return  # the slot has an owner again, who counts on with it
        try:
            _, free, dinodes = filesystem.record(change, fmt.STATFS)
            if free or dinodes:
                await self._add_to_master(change, free, dinodes)
        finally:
            filesystem.drop(change, EX)
        filesystem.locks.give_up(change.glock)

    async def _add_to_master(self, change: Inode, free: int, dinodes: int) -> None:
        filesystem = self.filesystem
        master = await filesystem.hold_system(b"statfs", EX)
        try:
            total, all_free, all_dinodes = filesystem.record(master, fmt.STATFS)
            fmt.STATFS.pack_into(master.payload, 0, total, all_free + free, all_dinodes + dinodes)
            fmt.STATFS.pack_into(change.payload, 0, 0, 0, 0)
            filesystem.touch(master)
            filesystem.touch(change)
            await filesystem.journal.commit()
        finally:
            filesystem.drop(master, EX)
