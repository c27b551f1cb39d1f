"""A mount as a participant: the filesystem over a lockspace engine in this process (DESIGN 4, 5 gfs).

Two service groups, named after the filesystem: `dlm:NAME` carries its locks, `gfs:NAME` its recovery; the member's slot
in the second is its journal. When a round starts, the journals of failed slots are replayed; until it finishes the gate
of the glock layer is shut.

    mount = NativeMount(world, participant, disk)
    filesystem = await mount.open(notifier)     # returns when this member's first round has finished
    ...
    await mount.close()                         # everything durable, journal clean, groups left
"""

import asyncio
from collections.abc import Awaitable, Sequence
from errno import EIO
from typing import Final, final

from corral.api.cman import LEVEL_GFS
from corral.api.dlm import Request
from corral.api.gfs import Notifier
from corral.base.errors import ClusterError
from corral.base.ids import MemberId
from corral.base.view import Round
from corral.base.world import Disk, World
from corral.gfs.device import Device
from corral.gfs.filesystem import GfsFilesystem
from corral.gfs.mount import mount
from corral.gfs.superblock import Superblock
from corral.gfs.superblock import read as read_superblock
from corral.gfs.volume import Options
from corral.providers.backends import Blocking, Completed, NativeBackend
from corral.providers.locks import LockSpace, PendingLock
from corral.providers.native_dlm import NativeLockspace
from corral.providers.participant import Participant


def group_of(name: str) -> str:
    return f"gfs:{name}"


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

    def submit(self, requests: Sequence[Request], completed: Completed, blocking: Blocking | None = None) -> list[int]:
        return self._backend.submit(requests, completed, blocking)

    async def close(self) -> None:
        """Nothing: `NativeMount.close` gives the locks back."""


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
        self._mounting: asyncio.Future[GfsFilesystem] | None = None

    async def open(self, notifier: Notifier | None) -> GfsFilesystem:
        """Raises ClusterError, or gfs's Refused or JournalDamaged, each with a sentence."""
        self._notifier = notifier
        self.superblock, _ = await read_superblock(Device(self._world, self._disk))
        cluster = self._participant.identity.cluster
        if self.superblock.cluster != cluster:
            raise ClusterError(
                f"this filesystem belongs to cluster {self.superblock.cluster!r}, not to {cluster!r}; mount it there"
            )
        self._native = NativeLockspace(self._world, self._participant, self.superblock.name)
        await self._native.open()
        self._backend = NativeBackend(self._world, self._native)
        self._lockspace = _Unclosed(self._backend, LockSpace(self._world, self._backend))
        await self._participant.register(
            group_of(self.superblock.name), LEVEL_GFS, self, slots=self.superblock.journals
        )
        assert self.filesystem is not None
        return self.filesystem

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
        filesystem: GfsFilesystem = await asyncio.shield(self._mounting)
        self.filesystem = filesystem
        await filesystem.start(round)

    async def _mount(self, slot: int) -> GfsFilesystem:
        return await mount(
            self._world,
            self._disk,
            self._lockspace,
            slot=slot,
            notifier=self._notifier,
            options=self._options,
            guard=self._guard,
        )

    def finish(self, round: Round) -> None:
        assert self.filesystem is not None
        self.filesystem.finish(round)

    def deliver(self, peer: MemberId, payloads: list[bytes]) -> None:
        """Members of gfs speak through their locks only; whatever comes here is a peer's mistake."""

    def blocked_by(self) -> bool:
        """Unknown here: a start that is long counts as this mount's own doing."""
        return False

    # -- the lease

    def _guard(self) -> Awaitable[None] | None:
        """Before each device write: nothing leaves without a lease."""
        return None if self._participant.may_act() else self._wait_lease()

    async def _wait_lease(self) -> None:
        while not self._participant.may_act():
            if self._participant.lost.done():
                raise OSError(EIO, f"this mount may not write any more: {self._participant.lost.result()}")
            await self._world.sleep_until(self._world.now() + self._participant.identity.detect_ns // 20)
