"""A shared block device: one image for all machines, a volatile write cache, and what crashes leave of a write.

A write is *submitted*, *lands* (every reader sees it) and *completes* (its process learns of it). What landed is
durable after a flush that was submitted later has completed. Killing a process does not stop its writes; a power cut of
the machine leaves each one under way whole, torn at 512 bytes, late (within `knobs.outlive`) or lost; a power cut of
the device keeps for every 512-byte sector any of its versions since the last flush. Watchers see every landing, so that
a checker can say who wrote when.
"""

import asyncio
import errno
import mmap
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Final, NamedTuple

from corral.base.time import SECOND, Instant
from corral.base.world import Buffer, ProcessId
from corral.sim.knobs import skewed

if TYPE_CHECKING:
    from corral.sim.process import Process
    from corral.sim.simulation import Simulation

BLOCK: Final = 4096
SECTOR: Final = 512


class Landed(NamedTuple):
    """A write that took effect, at virtual times. `data` is what arrived: after a power cut perhaps only sectors."""

    submitted: Instant
    landed: Instant
    machine: str
    process: str
    identity: ProcessId
    offset: int
    data: bytes


class Flushed(NamedTuple):
    """A flush that completed: what landed before it was submitted is durable."""

    submitted: Instant
    completed: Instant
    machine: str
    process: str


class Unflushed:
    __slots__ = ("new", "offset", "old", "sequence")

    def __init__(self, sequence: int, offset: int, old: bytes, new: bytes) -> None:
        self.sequence = sequence
        self.offset = offset
        self.old = old
        self.new = new


class Device:
    """Made by `Simulation.disk`. `image` is what a reader sees now."""

    def __init__(self, simulation: "Simulation", name: str, size: int) -> None:
        assert size % BLOCK == 0
        assert size > 0
        self.simulation = simulation
        self.name = name
        self.size = size
        self.image = mmap.mmap(-1, size)  # anonymous: costs memory only where written
        self.rng = Random(simulation.rng.getrandbits(64))
        self.slowness = 1
        self.error: int | None = None  # every operation fails with this errno
        self.writes = 0  # landed
        self.lives = 0  # power cuts survived: what was under way in an earlier life is answered with an error
        self._refused: dict[str, None] = {}
        self._unflushed: list[Unflushed] = []
        self._unflushed_bytes = 0
        self._watchers: list[Callable[[Landed | Flushed], None]] = []

    def watch(self, watcher: Callable[[Landed | Flushed], None]) -> None:
        self._watchers.append(watcher)

    def refuse(self, machine: str) -> None:
        """A storage fence: from now on no write of this machine lands, not even one under way."""
        self._refused[machine] = None

    def admit(self, machine: str) -> None:
        self._refused.pop(machine, None)

    def refuses(self, machine: str) -> bool:
        return machine in self._refused

    # --- what operations do ---

    def land(self, operation: "DiskWrite", data: bytes, offset: int) -> None:
        end = offset + len(data)
        self.writes += 1
        old = self.image[offset:end]
        self.image[offset:end] = data
        self._unflushed.append(Unflushed(self.writes, offset, old, data))
        self._unflushed_bytes += len(data)
        while self._unflushed_bytes > self.simulation.knobs.disk_cache:
            self._unflushed_bytes -= len(self._unflushed.pop(0).new)
        now = self.simulation.scheduler.now
        process = operation.process
        self.simulation.trace.wire(now, process.name, f"wrote {self.name}+{offset}", (data,), len(data))
        if self._watchers:
            landed = Landed(
                operation.submitted, now, process.machine.name, process.name, process.identity, offset, data
            )
            for watcher in self._watchers:
                watcher(landed)

    def flushed(self, operation: "DiskFlush") -> None:
        """Everything that had landed when the flush was submitted is durable now."""
        kept = [write for write in self._unflushed if write.sequence > operation.mark]
        self._unflushed = kept
        self._unflushed_bytes = sum(len(write.new) for write in kept)
        if self._watchers:
            process = operation.process
            event = Flushed(operation.submitted, self.simulation.scheduler.now, process.machine.name, process.name)
            for watcher in self._watchers:
                watcher(event)

    def power_cut(self) -> None:
        """The volatile cache is lost: each sector keeps any version it had since the last flush."""
        self.lives += 1
        unflushed, self._unflushed = self._unflushed, []
        self._unflushed_bytes = 0
        self.simulation.trace.note(
            self.simulation.scheduler.now, self.name, f"power cut with {len(unflushed)} unflushed writes"
        )
        for write in reversed(unflushed):
            self.image[write.offset : write.offset + len(write.old)] = write.old
        keep = self.rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        for write in unflushed:
            for start in range(0, len(write.new), SECTOR):
                if self.rng.random() < keep:
                    at = write.offset + start
                    piece = write.new[start : start + SECTOR]
                    self.image[at : at + len(piece)] = piece


class SimDisk:
    """`Disk` as one process has it open."""

    def __init__(self, device: Device, process: "Process") -> None:
        self._device = device
        self._process = process
        self._open = True

    @property
    def block_size(self) -> int:
        return BLOCK

    @property
    def size(self) -> int:
        return self._device.size

    async def read(self, offset: int, length: int) -> bytearray:
        self._check(offset, length)
        operation = DiskRead(self._device, self._process, offset, length)
        await operation.submit(length)
        return operation.data

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(buffers)
        self._check(offset, len(data))
        lent = [buffer for buffer in buffers if type(buffer) is not bytes]
        await DiskWrite(self._device, self._process, offset, data, lent).submit(len(data))

    async def flush(self) -> None:
        self._check(0, 0)
        await DiskFlush(self._device, self._process).submit(0)

    async def discard(self, offset: int, length: int) -> None:
        """What is read afterwards is zeros or the old data, as the device likes."""
        self._check(offset, length)
        if self._device.rng.random() < 0.5:
            await DiskWrite(self._device, self._process, offset, bytes(length)).submit(0)

    def close(self) -> None:
        """Writes under way complete."""
        self._open = False

    def _check(self, offset: int, length: int) -> None:
        self._process.check_alive()
        if not self._open:
            raise OSError(errno.EBADF, f"{self._device.name} is closed")
        if offset % BLOCK or length % BLOCK or offset < 0 or length < 0:
            raise OSError(errno.EINVAL, f"offset {offset} or length {length} is not a multiple of {BLOCK}")
        if offset + length > self._device.size:
            raise OSError(errno.ENOSPC, f"{offset}+{length} is beyond the end of {self._device.name}")


class DiskOperation:
    """Submitted; the kernel carries it out whatever becomes of its process."""

    def __init__(self, device: Device, process: "Process") -> None:
        self.device = device
        self.process = process
        self.submitted = device.simulation.scheduler.now
        self.life = device.lives
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def submit(self, length: int) -> None:
        simulation = self.device.simulation
        took = self.latency() + length * SECOND // simulation.knobs.disk_bytes_per_second
        took *= self.device.slowness * self.process.machine.disk_slowness
        self.process.operations[self] = None
        simulation.scheduler.after(took, self.carry_out)
        await self.future

    def latency(self) -> int:
        knobs = self.device.simulation.knobs
        return skewed(self.device.rng, knobs.disk_low, knobs.disk_high)

    def carry_out(self) -> None:
        if self not in self.process.operations:
            return  # a power cut decided it
        error = self.device.error
        if error is None and not self.is_admitted():
            error = errno.EIO
        if error is not None:
            self.complete(OSError(error, f"{self.device.name}: the device answers with an error"))
            return
        self.take_effect()
        self.complete(None)

    def is_admitted(self) -> bool:
        return self.life == self.device.lives and not self.device.refuses(self.process.machine.name)

    def take_effect(self) -> None:
        raise NotImplementedError

    def complete(self, error: OSError | None) -> None:
        if not self.future.done():
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result(None)
        self.process.operation_done(self)

    def power_cut(self) -> None:
        """The machine is gone; a read or flush just is not answered."""


class DiskRead(DiskOperation):
    def __init__(self, device: Device, process: "Process", offset: int, length: int) -> None:
        super().__init__(device, process)
        self.offset = offset
        self.length = length
        self.data = bytearray()

    def take_effect(self) -> None:
        self.data = bytearray(self.device.image[self.offset : self.offset + self.length])


class DiskWrite(DiskOperation):
    def __init__(
        self, device: Device, process: "Process", offset: int, data: bytes, lent: Sequence[Buffer] = ()
    ) -> None:
        super().__init__(device, process)
        self.offset = offset
        self.data = data
        self._lent = lent
        self._lent_check = zlib.crc32(b"".join(lent)) if lent else 0

    def take_effect(self) -> None:
        # A real device reads the caller's memory whenever it likes until the write has ended.
        if self._lent and self.process.alive:
            assert zlib.crc32(b"".join(self._lent)) == self._lent_check, "a buffer changed while it was being written"
        self.device.land(self, self.data, self.offset)

    def complete(self, error: OSError | None) -> None:
        if error is None and self.device.rng.random() < 0.5:
            # Others may read what was written before the writer knows it is.
            self.device.simulation.scheduler.after(self.latency(), super().complete, None)
        else:
            super().complete(error)

    def power_cut(self) -> None:
        rng = self.device.rng
        simulation = self.device.simulation
        fate = rng.randrange(4)
        if fate == 0:
            self._land_late()
        elif fate == 1:
            self._land_torn()
        elif fate == 2:
            simulation.scheduler.after(rng.randrange(simulation.knobs.outlive), self._land_late)
        # else: lost

    def _land_late(self) -> None:
        if self.is_admitted():
            self.device.land(self, self.data, self.offset)

    def _land_torn(self) -> None:
        """Some sectors of it. Each run of them is a write of its own for the watchers."""
        if not self.is_admitted():
            return
        for start in range(0, len(self.data), SECTOR):
            if self.device.rng.random() < 0.5:
                self.device.land(self, self.data[start : start + SECTOR], self.offset + start)


class DiskFlush(DiskOperation):
    def __init__(self, device: Device, process: "Process") -> None:
        super().__init__(device, process)
        self.mark = device.writes

    def latency(self) -> int:
        knobs = self.device.simulation.knobs
        return skewed(self.device.rng, knobs.flush_low, knobs.flush_high)

    def take_effect(self) -> None:
        self.device.flushed(self)
