"""A mount as a participant: the filesystem over a lockspace engine in this process (DESIGN 4, 5 gfs).

Two service groups, named after the filesystem: `dlm:NAME` carries its locks, `gfs:NAME` its recovery; the member's slot
in the second is its journal. When a round starts, the journals of failed slots are replayed; until it finishes the gate
of the glock layer is shut.

What goes wrong in a round
  before this member's first one has finished   `open` raises a sentence. If nothing was written to the disk the groups
                                                are left in order; else the process must end, and a survivor recovers
  a journal that nobody can replay              the round waits with its gate shut, tries again every `recover`, and
                                                says so: the operator unmounts everywhere and repairs it
  this node cannot read or write                tries for `recover`, then withdraws: another may replay it

    mount = NativeMount(world, participant, disk)
    filesystem = await mount.open(notifier)     # returns when this member's first round has finished
    ...
    await mount.close()                         # everything durable, journal clean, groups left
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from errno import EIO
from typing import Final, final

from corral.api.cman import LEVEL_GFS
from corral.api.dlm import Request, SpaceEvent, SpaceState
from corral.api.gfs import Notifier
from corral.base.errors import Busy, ClusterError
from corral.base.ids import MemberId
from corral.base.time import Instant
from corral.base.view import Round
from corral.base.world import Disk, World
from corral.gfs.device import Device
from corral.gfs.filesystem import GfsFilesystem
from corral.gfs.format import BlockDamaged
from corral.gfs.mount import attach, begin
from corral.gfs.replay import JournalDamaged
from corral.gfs.superblock import Refused, Superblock
from corral.gfs.superblock import read as read_superblock
from corral.gfs.volume import Options
from corral.providers.backends import Blocking, Completed, NativeBackend
from corral.providers.locks import LockSpace, PendingLock
from corral.providers.native_dlm import NativeLockspace
from corral.providers.participant import Participant, StartFailed

UNMOUNTABLE: Final = (Refused, JournalDamaged, BlockDamaged, OSError)


def group_of(name: str) -> str:
    return f"gfs:{name}"


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"its disk cannot be read or written here ({error.strerror or error}); repair that and mount it again"
    if isinstance(error, BlockDamaged):
        return f"it is damaged ({error}); unmount it on every node and run `corral gfs fsck`"
    return str(error)


@final
class _Unclosed:
    """The lockspace as the filesystem sees it: its end is ours to decide, after the group was left."""

    def __init__(self, backend: NativeBackend, space: LockSpace) -> None:
        self._backend = backend
        self._space = space

    @property
    def name(self) -> str:
        return self._backend.name

    def lock(self, *arguments: object, **named: object) -> PendingLock:
        return self._space.lock(*arguments, **named)  # type: ignore[arg-type]

    def submit(
        self, requests: Sequence[Request], completed: Completed | None, blocking: Blocking | None = None
    ) -> list[int]:
        return self._backend.submit(requests, completed, blocking)

    @property
    def state(self) -> SpaceState:
        return self._space.state

    def watch(self) -> AsyncIterator[SpaceEvent]:
        return self._space.watch()

    async def close(self) -> None:
        """Nothing: `NativeMount.close` gives the locks back."""

    async def release(self, force: int = 0) -> None:
        raise Busy(f"lockspace {self.name} belongs to a mounted filesystem; unmount it")


@final
class NativeMount:
    """Implements `participant.Service` for `gfs:NAME`."""

    def __init__(self, world: World, participant: Participant, disk: Disk, options: Options | None = None) -> None:
        self.superblock: Superblock
        self.filesystem: GfsFilesystem | None = None
        self._world: Final = world
        self._participant: Final = participant
        self._disk: Final = disk
        self._options = options or Options()
        self._notifier: Notifier | None = None
        self._native: NativeLockspace
        self._backend: NativeBackend
        self._lockspace: _Unclosed
        self._mounting: asyncio.Future[str] | None = None
        self._attached: GfsFilesystem | None = None  # from when its superblock was read; `filesystem` once mounted
        self._joined = False  # this member's first round has finished
        self._wrote = False  # to the disk: what this slot holds may need recovery
        self._needs = ""  # what only an operator can do for the round under way
        self._seen = 0  # reads, writes and flushes begun, when they last went on
        self._seen_at: Instant = 0

    async def open(self, notifier: Notifier | None) -> GfsFilesystem:
        """Raises ClusterError with a sentence: why this cannot be mounted here, and what to do. Then this process must
        end: it may hold a slot that others are to recover."""
        self._notifier = notifier
        try:
            self.superblock, _ = await read_superblock(Device(self._world, self._disk))
        except (Refused, OSError) as error:
            raise ClusterError(_sentence(error)) from None
        cluster = self._participant.identity.cluster
        if self.superblock.cluster != cluster:
            raise ClusterError(
                f"this filesystem belongs to cluster {self.superblock.cluster!r}, not to {cluster!r}; mount it there"
            )
        self._native = NativeLockspace(self._world, self._participant, self.superblock.name)
        await self._native.open()
        self._backend = NativeBackend(self._world, self._native)
        self._lockspace = _Unclosed(self._backend, LockSpace(self._world, self._backend))
        group = group_of(self.superblock.name)
        try:
            await self._participant.register(group, LEVEL_GFS, self, slots=self.superblock.journals)
        except ClusterError:
            if not self._wrote:
                await self._leave_bounded(group)
            raise
        assert self.filesystem is not None
        try:
            await self.filesystem.go_live()
        except UNMOUNTABLE as error:
            raise ClusterError(_sentence(error)) from None
        return self.filesystem

    async def _leave_bounded(self, group: str) -> None:
        """A slot that was not written to needs no recovery. Whoever cannot leave within `recover` counts as failed."""
        leaving = self._world.spawn(self._leave(group), "leave after a failed mount")
        await asyncio.wait((leaving,), timeout=self._participant.identity.recover_ns / 1e9)
        leaving.cancel()

    async def _leave(self, group: str) -> None:
        with suppress(ClusterError):
            await self._participant.leave(group)
            await self._backend.close()

    async def close(self) -> None:
        """Unmounts: a clean leave of both groups."""
        if self.filesystem is not None:
            await self.filesystem.destroy()
        if not self._participant.lost.done():
            await self._participant.leave(group_of(self.superblock.name))
            await self._backend.close()

    # -- the service contract

    def stop(self) -> None:
        if self.filesystem is not None:
            self.filesystem.stop()

    async def start(self, round: Round) -> None:
        self._participant.round_begun(round.group, round.id)
        if self._mounting is None:
            # Not cancelled with the round: a newer one goes on with the same mount, which holds locks already.
            self._mounting = self._world.spawn(self._mount(round.slot_of(self._participant.me)), "mount")
        failure = await asyncio.shield(self._mounting)
        if failure:
            raise StartFailed(failure)
        assert self._attached is not None
        self.filesystem = self._attached
        await self._recover(self.filesystem, round)

    async def _mount(self, slot: int) -> str:
        """Empty, or why it cannot be mounted."""
        try:
            self._attached = await attach(
                self._world,
                self._disk,
                self._lockspace,
                slot=slot,
                notifier=self._notifier,
                options=self._options,
                guard=self._guard,
            )
            await begin(self._attached)
        except (*UNMOUNTABLE, ClusterError) as error:
            return _sentence(error)
        return ""

    async def _recover(self, filesystem: GfsFilesystem, round: Round) -> None:
        """Tries until the journals that this round is about are clean; a newer round cancels it."""
        recover_ns = self._participant.identity.recover_ns
        begun = self._world.now()
        self._needs = ""
        while True:
            if filesystem.withdrawn is not None:
                await self._world.future()  # this process ends, and with it the round
            try:
                await filesystem.start(round)
                break
            except UNMOUNTABLE as error:
                if not self._joined:
                    raise StartFailed(_sentence(error)) from None
                if not isinstance(error, OSError):
                    self._needs = f"a repair ({error}): unmount it on every node, run `corral gfs fsck`, mount again"
                elif self._world.now() - begun > recover_ns:
                    filesystem.withdraw(f"what failed cannot be recovered here: {_sentence(error)}")
            await self._world.sleep_until(self._world.now() + recover_ns // (1 if self._needs else 8))
        self._needs = ""

    def finish(self, round: Round) -> None:
        assert self.filesystem is not None
        self._joined = True
        self.filesystem.finish(round)

    def deliver(self, peer: MemberId, payloads: list[bytes]) -> None:
        """Members of gfs speak through their locks only; whatever comes here is a peer's mistake."""

    def blocked_by(self) -> str:
        """Asked several times in each `detect`. Input and output that go on count as something to wait for: a long
        journal takes as long as it takes."""
        if self._needs:
            return self._needs
        filesystem = self._attached
        if filesystem is None or filesystem.withdrawn is not None:
            return ""
        glock = filesystem.locks.asked()
        if glock is not None:
            return f"lock {glock.kind}/{glock.number}, which another mount holds"
        device, now = filesystem.device, self._world.now()
        done = device.reads + device.writes + device.flushes
        if done != self._seen:
            self._seen, self._seen_at = done, now
        if now - self._seen_at > self._participant.identity.detect_ns:
            return ""  # it hangs
        slot = filesystem.slot if self.filesystem is None else filesystem.recovery.replaying
        return "" if slot is None else f"the replay of journal {slot}"

    # -- the lease

    def _guard(self) -> Awaitable[None] | None:
        """Before each device write: nothing leaves without a lease."""
        self._wrote = True
        return None if self._participant.may_act() else self._wait_lease()

    async def _wait_lease(self) -> None:
        while not self._participant.may_act():
            if self._participant.lost.done():
                raise OSError(EIO, f"this mount may not write any more: {self._participant.lost.result()}")
            await self._world.sleep_until(self._world.now() + self._participant.identity.detect_ns // 20)
