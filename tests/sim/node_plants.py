"""Bugs planted into whole simulated nodes, each with the invariants that must name it (tests/plants.py runs them)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from corral.base.time import SECOND
from corral.base.world import Completed
from corral.cman.heartbeat import HeartbeatEngine
from corral.cman.lift_events import LocalGone
from corral.dlm.recovery import Recovery as LockRecovery
from corral.gfs import recovery
from corral.gfs.filesystem import GfsFilesystem
from corral.gfs.glock import EX, GlockTable
from corral.gfs.inode import Inode
from corral.gfs.recovery import Recovery
from corral.gfs.volume import Volume
from corral.node.warden import Local, Warden
from corral.providers.backends import NativeBackend
from corral.sim.harness import Body
from tests.sim import files, nodes


def tokens_begin_again(patch: pytest.MonkeyPatch) -> None:
    """The counter of a resource starts over with its new master."""
    right = LockRecovery.start

    def start(self: LockRecovery, *arguments: Any) -> None:
        right(self, *arguments)
        self._space.base_token = 0

    patch.setattr(LockRecovery, "start", start)


def fence_lies(patch: pytest.MonkeyPatch) -> None:
    """The power switch answers and switches nothing, and leases last far longer than others wait for them."""

    async def idle(self: nodes.Cluster, _world: Any, _argv: Any, stdin: bytes) -> Any:
        if b"action=metadata" in stdin:
            return Completed(0, nodes.METADATA, b"")
        return Completed(2 if b"action=status" in stdin else 0, b"", b"")  # 2: it is off

    patch.setattr(nodes.Cluster, "power_switch", idle)
    right = HeartbeatEngine._lease

    def lease(self: HeartbeatEngine, now: int, until: int) -> None:
        right(self, now, until + 30 * SECOND)

    patch.setattr(HeartbeatEngine, "_lease", lease)


def evicted_but_alive(patch: pytest.MonkeyPatch) -> None:
    """Participants are evicted, and count as gone, although nobody killed them."""

    def evict(self: Warden, local: Local, reason: str) -> None:
        if not local.dying:
            local.dying = True
            self._lift(LocalGone(local.member))

    right = Warden._look

    def look(self: Warden) -> None:
        right(self)
        if self._me.node == 1 and self._world.now() > 12 * SECOND:
            for local in self._living():
                self.evict(local, "planted")

    patch.setattr(Warden, "evict", evict)
    patch.setattr(Warden, "_look", look)


def callbacks_unheard(patch: pytest.MonkeyPatch) -> None:
    """Nobody learns that another node waits for what is cached here."""
    patch.setattr(NativeBackend, "_blocked", lambda self, client, handle, mode: None)


def keep_what_was_cached(patch: pytest.MonkeyPatch) -> None:
    """Another node had the lock in EX, and what was cached here before is believed still."""
    patch.setattr(Volume, "_forget_cached", lambda self, glock: None)


def no_replay(patch: pytest.MonkeyPatch) -> None:
    """A dead node's journal is thrown away."""

    async def nothing(_device: Any, _state: Any) -> None:
        return

    patch.setattr(recovery, "put_in_place", nothing)


def no_gate(patch: pytest.MonkeyPatch) -> None:
    """Survivors go on with the dead node's locks as soon as the lock manager gives them, whatever its journal holds."""
    patch.setattr(GlockTable, "close_gate", lambda self: None)


def no_statfs_of_the_dead(patch: pytest.MonkeyPatch) -> None:
    """What a dead node had allocated and freed is not counted, and forgotten."""

    async def forget(self: Recovery, slot: int) -> None:
        change = await self.filesystem.hold_system(b"statfs_change%d" % slot, EX)
        change.payload[:] = bytes(len(change.payload))
        self.filesystem.touch(change)
        await self.filesystem.journal.commit()
        self.filesystem.drop(change, EX)
        self.filesystem.locks.give_up(change.glock)

    patch.setattr(Recovery, "_merge_statfs", forget)


def open_unknown_to_others(patch: pytest.MonkeyPatch) -> None:
    """An inode's glock is given up and no lock is left that says it is open: others free it with its last name."""

    async def publish_opens(self: GfsFilesystem, inode: Inode) -> None:
        return

    patch.setattr(GfsFilesystem, "publish_opens", publish_opens)


class Plant(NamedTuple):
    plant: Callable[[pytest.MonkeyPatch], None]
    caught_by: tuple[str, ...]
    body: Body


PLANTS = (
    Plant(tokens_begin_again, ("SIM-1",), nodes.locks),
    Plant(fence_lies, ("SIM-2",), nodes.locks),
    Plant(evicted_but_alive, ("SIM-3",), files.calm),
    Plant(callbacks_unheard, ("SIM-4",), files.calm),
    Plant(keep_what_was_cached, ("SIM-5", "SIM-7", "SIM-10"), files.calm),
    Plant(no_replay, ("SIM-5", "SIM-6", "SIM-7"), files.shared),
    Plant(no_gate, ("SIM-5", "SIM-6", "SIM-7", "SIM-8", "SIM-11"), files.shared),
    Plant(no_statfs_of_the_dead, ("SIM-8",), files.calm),
    Plant(open_unknown_to_others, ("SIM-11",), files.calm),
)
