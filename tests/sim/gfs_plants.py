"""Bugs the crash test exists for, planted one at a time: each must be caught within 50 seeds."""

from collections.abc import Callable
from typing import Any

import pytest

from corral.gfs import replay
from corral.gfs.data import DataCache, FileData
from corral.gfs.device import Device
from corral.gfs.journal import Journal
from corral.gfs.recovery import Recovery
from corral.gfs.rgrp import Rgrp
from corral.gfs.space import Space
from corral.gfs.volume import Volume

Plant = Callable[[pytest.MonkeyPatch], None]


def commit_without_flush(patch: pytest.MonkeyPatch) -> None:
    """Nothing ever flushes the device."""

    async def hasty(self: Device) -> None:
        self._written = 0

    patch.setattr(Device, "flush", hasty)


async def _nothing() -> None:
    return


def trust_torn_commits(patch: pytest.MonkeyPatch) -> None:
    """The replay does not verify the images of the newest commit."""
    patch.setattr(replay, "_is_image", lambda image, number, checksum: True)


def data_after_commit(patch: pytest.MonkeyPatch) -> None:
    """File data is left to later: the commit that makes it reachable does not wait for it."""
    real = Journal._commit

    async def hasty(self: Journal) -> None:
        write, self._write_data = self._write_data, _nothing
        try:
            await real(self)
        finally:
            self._write_data = write

    patch.setattr(Journal, "_commit", hasty)


def no_revokes(patch: pytest.MonkeyPatch) -> None:
    """A freed metadata block is not revoked: replay writes it over what the block is used for now."""

    def forgetful(self: Journal, number: int, meta: Any = None) -> None:
        if meta is not None:
            meta.freed = True

    patch.setattr(Journal, "free", forgetful)


def reuse_at_once(patch: pytest.MonkeyPatch) -> None:
    """A freed block is given out before the commit that freed it is durable."""
    real = Space.free_run

    def hasty(self: Space, number: int, count: int) -> None:
        real(self, number, count)
        rgrp = next(rgrp for rgrp in self.rgrps if rgrp.contains(number))
        rgrp.reopen(number, count)

    patch.setattr(Space, "free_run", hasty)
    reopen = Rgrp.reopen

    def once(self: Rgrp, number: int, count: int) -> None:
        if self.pending >= count:
            reopen(self, number, count)

    patch.setattr(Rgrp, "reopen", once)


def tail_too_early(patch: pytest.MonkeyPatch) -> None:
    """Images count as in place before they were written: the tail passes commits that are still needed."""

    async def lazy(self: Journal, numbers: Any) -> None:
        for number in list(numbers):
            entry = self.pending.pop(number)
            entry.commit.pins -= 1

    patch.setattr(Journal, "_put_in_place", lazy)


def half_an_operation(patch: pytest.MonkeyPatch) -> None:
    """The first object of each transaction is left out of its commit."""
    real = Journal._commit

    async def careless(self: Journal) -> None:
        if len(self.running.metas) > 2:
            meta = self.running.metas.pop(0)
            meta.dirty = False
            meta.glock.dirty -= 1
        await real(self)

    patch.setattr(Journal, "_commit", careless)


def lost_write_back(patch: pytest.MonkeyPatch) -> None:
    """A write-back pass forgets its last block."""
    real = DataCache._collect

    def careless(self: DataCache, data: Any, runs: list[Any], chunks: Any) -> None:
        real(self, data, runs, chunks)
        if len(runs) > 1:
            runs.pop()

    patch.setattr(DataCache, "_collect", careless)


def keep_stale_caches(patch: pytest.MonkeyPatch) -> None:
    """A glock goes to UN and what it protected stays cached."""

    def keep(self: Volume, glock: Any) -> None:
        return

    patch.setattr(Volume, "_forget_cached", keep)


def hand_over_nothing(patch: pytest.MonkeyPatch) -> None:
    """A glock leaves EX with its metadata still in memory and in the journal only."""

    async def lazy(self: Journal, glock: Any) -> None:
        glock.dirty = 0
        glock.logged.clear()

    patch.setattr(Journal, "handover", lazy)


def hand_over_without_data(patch: pytest.MonkeyPatch) -> None:
    """A glock leaves EX before the file data written under it is on the device."""

    async def lose(self: DataCache, data: FileData) -> None:
        data.cut(0)
        while self._pass is not None:  # what is under way cannot be lost any more
            await self._pass

    patch.setattr(DataCache, "write_clean", lose)


def hand_over_without_revokes(patch: pytest.MonkeyPatch) -> None:
    """Images of blocks that another node owns now stay replayable in our journal."""

    async def lazy(self: Journal, glocks: Any) -> None:
        numbers = sorted(set().union(*(glock.logged for glock in glocks)))
        await self._put_in_place([number for number in numbers if number in self.pending])
        for glock in glocks:
            glock.logged.clear()

    patch.setattr(Journal, "_hand_over", lazy)


def no_replay(patch: pytest.MonkeyPatch) -> None:
    """The gate opens without the dead node's journal."""

    async def skip(self: Recovery, slot: int) -> None:
        return

    patch.setattr(Recovery, "_recover", skip)


NODE_PLANTS: dict[str, Plant] = {
    "keep_stale_caches": keep_stale_caches,
    "hand_over_nothing": hand_over_nothing,
    "hand_over_without_data": hand_over_without_data,
    "hand_over_without_revokes": hand_over_without_revokes,
    "no_replay": no_replay,
}
PLANTS: dict[str, Plant] = {
    "commit_without_flush": commit_without_flush,
    "data_after_commit": data_after_commit,
    "no_revokes": no_revokes,
    "reuse_at_once": reuse_at_once,
    "tail_too_early": tail_too_early,
    "half_an_operation": half_an_operation,
    "lost_write_back": lost_write_back,
    "trust_torn_commits": trust_torn_commits,
}
