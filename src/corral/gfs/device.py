"""Blocks of the shared disk: runs read and written, flushes counted, one place that every device write passes.

`guard` is asked before each write: a mount whose lease has lapsed returns a future there to wait on, or raises
(DESIGN 4, the shared page). `unflushed` is true while something written has not been followed by a flush.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, final

from corral.base.world import Buffer, Disk, World
from corral.gfs.format import BLOCK, BlockDamaged

GATHER_MAX: Final = 2 << 20  # bytes in one gathered write
PARALLEL: Final = 4  # writes in flight for one caller

Guard = Callable[[], Awaitable[None] | None]


@final
class Device:
    __slots__ = ("_written", "disk", "flushes", "guard", "reads", "world", "write_bytes", "writes")

    def __init__(self, world: World, disk: Disk, guard: Guard | None = None) -> None:
        self.world = world
        self.disk = disk
        self.guard = guard
        self.reads = 0
        self.writes = 0
        self.write_bytes = 0
        self.flushes = 0
        self._written = 0  # writes completed since the last flush began

    @property
    def blocks(self) -> int:
        return self.disk.size // BLOCK

    @property
    def unflushed(self) -> bool:
        return self._written > 0

    async def read(self, number: int, count: int = 1) -> bytearray:
        if number < 0 or number + count > self.blocks:
            raise BlockDamaged(number, "lies beyond the end of the device")  # some pointer is wrong
        self.reads += 1
        return await self.disk.read(number * BLOCK, count * BLOCK)

    async def write(self, number: int, buffers: Sequence[Buffer]) -> None:
        """One gathered write of whole blocks."""
        if self.guard is not None:
            wait = self.guard()
            if wait is not None:
                await wait
        self.writes += 1
        try:
            await self.disk.write(number * BLOCK, buffers)
        finally:
            self._written += 1  # also a failed write may have reached the device in part
        self.write_bytes += sum(len(buffer) for buffer in buffers)

    async def flush(self) -> None:
        """Everything whose write had returned before the call is durable."""
        self.flushes += 1
        covered = self._written
        await self.disk.flush()
        self._written -= covered

    async def write_runs(self, runs: Iterable[tuple[int, Buffer]]) -> None:
        """(block number, whole blocks) in ascending order: neighbours leave in one write, several writes at a time."""
        gathered: list[tuple[int, list[Buffer]]] = []
        end = -1
        size = 0
        for number, buffer in runs:
            if number == end and size < GATHER_MAX:
                gathered[-1][1].append(buffer)
            else:
                gathered.append((number, [buffer]))
                size = 0
            size += len(buffer)
            end = number + len(buffer) // BLOCK
        if len(gathered) == 1:
            await self.write(*gathered[0])
        elif gathered:
            await self._parallel(gathered)

    async def _parallel(self, gathered: list[tuple[int, list[Buffer]]]) -> None:
        waiting = iter(gathered)
        done = self.world.future()
        failed: list[OSError] = []
        working = min(PARALLEL, len(gathered))

        async def worker() -> None:
            nonlocal working
            try:
                for number, buffers in waiting:
                    await self.write(number, buffers)
            except OSError as error:
                failed.append(error)
            working -= 1
            if working == 0 and not done.done():
                done.set_result(None)

        for _ in range(working):
            self.world.spawn(worker(), "gfs: write blocks")
        await done
        if failed:
            raise failed[0]
