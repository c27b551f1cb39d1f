"""The filesystem as a door sees it: `corral.api.gfs.Filesystem`, whole, plus what the recovery of its group calls.

stop()          at once: nothing new from the lock manager passes, cached glocks stay usable
start(round)    the journals this node is to replay are clean on return (and what needs them: statfs merged)
finish(round)   the gate opens; files that dead nodes had open and unlinked are freed in the background
"""

from errno import EAGAIN, EINTR, ENOSYS
from typing import Any, Final

from corral.api.dlm import EX as DLM_EX
from corral.api.dlm import NOQUEUE, PR, Completion, Lockspace, Request
from corral.api.gfs import FilesystemUsage, LockRange
from corral.base.view import Round
from corral.gfs import format as fmt
from corral.gfs.files import Files
from corral.gfs.glock import EX, FLOCK, PHASE_NAMES, SH, STATE_NAMES
from corral.gfs.inode import Inode
from corral.gfs.journal import Ring
from corral.gfs.posixlocks import F_RDLCK, F_UNLCK, PosixLocks
from corral.gfs.recovery import Recovery
from corral.gfs.system import ring_of

_DLM_EAGAIN: Final = -11
OFFSET_MAX: Final = (1 << 63) - 1


class GfsFilesystem(Files):
    """One mount. Made by `corral.gfs.mount.mount`; ends with `destroy`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lockspace: Lockspace | None = arguments[3]
        self.posix = PosixLocks(self.world)
        self.recovery = Recovery(self)
        self.flocks: dict[tuple[int, int], tuple[int, int]] = {}  # (inode, owner) -> (lock handle, mode)
        self.destroyed = False
        self._live = False
        self._tidying: Any = None  # its task

    # --- recovery ----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        self.locks.table.close_gate()

    async def start(self, round: Round | None = None) -> None:
        await self.recovery.start(round)

    def finish(self, round: Round | None = None) -> None:
        if self.recovery.finish(round):
            self.locks.open_gate()
            if self._live:
                self._tidy_up()

    async def go_live(self) -> None:
        """After the first `finish`: this slot's statfs change and inum range, held in EX as long as the mount lives.
        Not before: another node that recovered this slot may have changed them, and have died with that in its own
        journal (GFS-13)."""
        slot = self.slot
        change = await self.hold_system(b"statfs_change%d" % slot, EX)
        _, self.free_change, self.dinode_change = self.record(change, fmt.STATFS)
        self.statfs_change = change
        numbers = await self.hold_system(b"inum_range%d" % slot, EX)
        self.next_formal, self.end_formal = self.record(numbers, fmt.INUM_RANGE)
        self.inum_range = numbers
        self.kept = [change, numbers]
        self._live = True
        self._tidy_up()

    def statistics(self) -> dict[str, Any]:
        """Figures and, for each waiting state, what is waited for."""
        return {
            **super().statistics(),
            "gate_closed": self.locks.table.gate_closed,
            "replayed": list(self.recovery.replayed),
            "replay_failed": dict(sorted(self.recovery.failed.items())),
            "handles": len(self.handles),
        }

    def glock_dump(self, limit: int = 1000) -> list[dict[str, Any]]:
        """Who holds and who waits, busiest first: for the operator's question what a mount is waiting for."""
        glocks = sorted(self.locks.table.glocks.items(), key=lambda item: (-len(item[1].queue), item[0]))
        return [
            {
                "glock": f"{glock.kind}/{glock.number}",
                "state": STATE_NAMES[glock.state],
                "holders": glock.holders,
                "waiting": [STATE_NAMES[holder.state] for holder in glock.queue],
                "phase": PHASE_NAMES[glock.phase],
                "demote": STATE_NAMES[glock.demote] if glock.demote < EX else None,
                "dirty": glock.dirty,
            }
            for _, glock in glocks[:limit]
        ]

    async def ring_of(self, slot: int) -> Ring:
        return await ring_of(self.device, self.superblock, self.system, slot)

    def _tidy_up(self) -> None:
        """What recoveries leave to be done with ordinary locks, in the background."""
        if self.recovery.leaves_work and (self._tidying is None or self._tidying.done()):
            self._tidying = self.world.spawn(self._finish_recovery(), "gfs: tidy up after recovery")

    async def _finish_recovery(self) -> None:
        while self.recovery.leaves_work:
            try:
                await self.recovery.tidy_up()
            except (OSError, fmt.BlockDamaged):
                self.counts["tidying_failed"] = self.counts.get("tidying_failed", 0) + 1

    # --- the whole filesystem ----------------------------------------------------------------------------------------

    async def statfs(self) -> FilesystemUsage:
        """The master's totals and this slot's own changes; other slots' newest changes follow within their quantum."""
        master = await self.hold_system(b"statfs", SH)
        try:
            total, free, dinodes = self.record(master, fmt.STATFS)
        finally:
            self.drop(master, SH)
        free = max(0, free + self.free_change)
        return FilesystemUsage(fmt.BLOCK, total, free, free, max(0, dinodes + self.dinode_change) + free, free)

    async def sync_statfs(self) -> None:
        """Moves this slot's changes into the master, in one transaction."""
        if not self.free_change and not self.dinode_change:
            return
        master = await self.hold_system(b"statfs", EX)
        try:
            total, free, dinodes = self.record(master, fmt.STATFS)
            fmt.STATFS.pack_into(master.payload, 0, total, free + self.free_change, dinodes + self.dinode_change)
            self.free_change = self.dinode_change = 0
            self.count_blocks(0, 0)
            self.touch(master)
        finally:
            self.drop(master, EX)

    async def sync(self) -> None:
        """Everything done before the call is durable on return."""
        self.refuse()
        await self.journal.commit()
        await self.data.write_all()
        await self.device.flush()

    async def destroy(self) -> None:
        """Unmount: everything committed and in place, the journal marked clean, every lock given back."""
        if self.destroyed:
            return
        self.destroyed = True
        self._stop_timer()
        if self.withdrawn is None:
            for handle in sorted(self.handles):
                await self.release(0, handle, None)
            await self._stop_tidying()
            if not self.locks.table.gate_closed:  # else the change stays this slot's: its next owner counts on with it
                await self.sync_statfs()
            await self.drain()
            await self.data.write_all()
            await self.journal.close()
            await self.device.flush()
        self.locks.stop()
        if self.lockspace is not None:
            await self.lockspace.close()

    async def _stop_tidying(self) -> None:
        """Between two steps of it: another mount, or the next one of this slot, does the rest."""
        self.recovery.give_up_work()
        if self._tidying is None or self._tidying.done():
            return
        if self.locks.table.gate_closed:
            self._tidying.cancel()  # it waits for a lock
        ended = self.world.future()
        self._tidying.add_done_callback(lambda _task: ended.set_result(None))
        await ended

    # --- record locks ------------------------------------------------------------------------------------------------

    async def getlk(self, ino: int, handle: int, owner: int, lock: LockRange) -> LockRange:
        self._needs_local()
        conflict = self.posix.conflict(self._by_handle(ino, handle).number, owner, lock)
        return conflict or LockRange(lock.start, lock.end, F_UNLCK)

    async def setlk(self, ino: int, handle: int, owner: int, lock: LockRange, *, wait: bool, flock: bool) -> None:
        inode = self._by_handle(ino, handle)
        if flock:
            if self.locks.table.local:
                await self.posix.set(-inode.number, owner, LockRange(0, OFFSET_MAX, lock.type, lock.pid), wait=wait)
            else:
                await self._flock(inode, owner, lock.type, wait=wait)
            return
        self._needs_local()
        await self.posix.set(inode.number, owner, lock, wait=wait)

    def _needs_local(self) -> None:
        """Never node-local where others mount too: until ranges go through the dlm the answer is ENOSYS."""
        if not self.has_record_locks:
            raise OSError(ENOSYS, "record locks over several nodes are not there yet; flock works")

    async def _flock(self, inode: Inode, owner: int, kind: int, *, wait: bool) -> None:
        """One dlm lock for each open file description. Changing the mode releases first, as flock(2) warns."""
        assert self.lockspace is not None
        key = (inode.number, owner)
        mode = PR if kind == F_RDLCK else DLM_EX
        held = self.flocks.pop(key, None)
        if held is not None:
            if kind != F_UNLCK and held[1] == mode:
                self.flocks[key] = held
                return
            await self._submit(Request("unlock", lock=held[0]))
        if kind == F_UNLCK:
            return
        name = b"%8x%16x" % (FLOCK, inode.number)
        request = Request("lock", name, mode, 0 if wait else NOQUEUE)
        handle, completion = await self._submit(request)
        if completion.status == _DLM_EAGAIN:
            raise OSError(EAGAIN, "locked")
        if completion.status:
            raise OSError(EINTR, "the lock request was given up")
        self.flocks[key] = (handle, mode)

    async def _submit(self, request: Request) -> tuple[int, Completion]:
        """One request and its answer. A wish withdrawn while it waits (a signal) leaves no lock behind."""
        assert self.lockspace is not None
        future = self.world.future()
        answered: list[Completion] = []
        abandoned = False

        def completed(handle: int, completion: Completion) -> None:
            answered.append(completion)
            if abandoned:
                if request.op == "lock" and completion.status == 0:
                    self._give_back(handle)
            elif not future.done():  # cancelled a moment ago: seen below
                future.set_result(None)

        (handle,) = self.lockspace.submit([request], completed, None)
        try:
            await future
        except BaseException:
            abandoned = True
            if request.op == "lock":
                if not answered:
                    self.lockspace.submit([Request("cancel", lock=handle)], _ignore, None)
                elif answered[0].status == 0:
                    self._give_back(handle)
            raise
        return handle, answered[0]

    def _give_back(self, handle: int) -> None:
        """Granted after the wish was withdrawn."""
        assert self.lockspace is not None
        self.lockspace.submit([Request("unlock", lock=handle)], _ignore, None)

    async def flush(self, ino: int, handle: int, lock_owner: int) -> None:
        if self.posix.any:
            self.posix.drop_owner(self._by_handle(ino, handle).number, lock_owner)

    async def release(self, ino: int, handle: int, flock_owner: int | None) -> None:
        found = self.handles.get(handle)
        if found is not None and flock_owner is not None:
            number = found.inode.number
            self.posix.drop_owner(-number, flock_owner)
            held = self.flocks.pop((number, flock_owner), None)
            if held is not None:
                await self._submit(Request("unlock", lock=held[0]))
        await super().release(ino, handle, flock_owner)


def _ignore(handle: int, completion: Completion) -> None:
    """The answer changes nothing."""
