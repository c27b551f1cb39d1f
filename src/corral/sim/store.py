"""State directories and the durable logs in them (`World.store`), with what crashes do to an append under way.

An append that completed is durable. One that a crash interrupts leaves some prefix of its records, an interrupted
`replace` either the old records or the new ones. Operations on one store take effect in the order they were asked for.
"""

import asyncio
import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from corral.base.world import StoreDamaged
from corral.sim.knobs import skewed

if TYPE_CHECKING:
    from corral.sim.machine import Machine
    from corral.sim.process import Process


class StoreFile:
    __slots__ = ("damage", "free_at", "records")

    def __init__(self) -> None:
        self.records: list[bytes] = []
        self.free_at = 0  # virtual time at which the operations queued so far are done
        self.damage = ""


class StateDirectory:
    """Survives processes and power cuts, until somebody deletes it. `fail_after` n: the (n+1)th write from now fails
    with `failure`, and every one after it; None: none fails."""

    def __init__(self, machine: "Machine", name: str) -> None:
        self.machine = machine
        self.name = name
        self.fail_after: int | None = None
        self.failure = errno.ENOSPC
        self._files: dict[str, StoreFile] = {}

    def store(self, process: "Process", name: str) -> "SimStore":
        if name not in self._files:
            self._files[name] = StoreFile()
        return SimStore(process, self, self._files[name], name)

    def delete(self) -> None:
        self._files = {}

    def power_cut(self) -> None:
        """What was queued and never begun is gone: nobody waits for it after the next boot."""
        for file in self._files.values():
            file.free_at = 0

    def damage(self, name: str, where: str) -> None:
        """From now on this store does not check out."""
        self._files[name].damage = where

    def records(self, name: str) -> list[bytes]:
        """For checkers: what is on disk now."""
        return list(self._files[name].records) if name in self._files else []

    def put(self, name: str, records: Sequence[bytes]) -> None:
        """For tests: what an administrator's tool wrote there before."""
        self._files.setdefault(name, StoreFile()).records = list(records)

    def check_writable(self) -> None:
        if self.fail_after is not None:
            if self.fail_after <= 0:
                raise OSError(self.failure, os.strerror(self.failure))
            self.fail_after -= 1


class SimStore:
    def __init__(self, process: "Process", directory: StateDirectory, file: StoreFile, name: str) -> None:
        self.process = process
        self.directory = directory
        self.file = file
        self.name = name
        self.interrupted = False  # a dead process's later writes do not follow one that was cut short

    async def read(self) -> list[bytes]:
        await self._perform(StoreRead(self))
        if self.file.damage:
            raise StoreDamaged(f"{self.directory.name}/{self.name}: {self.file.damage}")
        return list(self.file.records)

    async def append(self, records: Sequence[bytes]) -> None:
        await self._perform(StoreAppend(self, [bytes(record) for record in records]))

    async def replace(self, records: Sequence[bytes]) -> None:
        await self._perform(StoreReplace(self, [bytes(record) for record in records]))

    async def _perform(self, operation: "StoreOperation") -> None:
        process = self.process
        process.check_alive()
        scheduler = process.simulation.scheduler
        knobs = process.simulation.knobs
        took = skewed(process.machine.rng, knobs.store_low, knobs.store_high) * process.machine.disk_slowness
        self.file.free_at = max(self.file.free_at, scheduler.now) + took
        operation.future = asyncio.get_running_loop().create_future()
        process.operations[operation] = None
        scheduler.after(self.file.free_at - scheduler.now, operation.complete)
        await operation.future


class StoreOperation:
    """Under way: completes in the kernel, whatever becomes of the process meanwhile."""

    future: "asyncio.Future[None]"

    def __init__(self, store: SimStore) -> None:
        self.store = store

    def take_effect(self) -> None:
        """Whole."""

    def take_part(self) -> None:
        """As much of it as a crash leaves."""

    def complete(self) -> None:
        process = self.store.process
        if self not in process.operations:
            return  # a power cut decided it
        if process.alive:
            try:
                self.take_effect()
            except OSError as error:
                if not self.future.done():
                    self.future.set_exception(error)
            else:
                if not self.future.done():
                    self.future.set_result(None)
        else:
            self.interrupt()
        process.operation_done(self)

    def power_cut(self) -> None:
        self.interrupt()

    def interrupt(self) -> None:
        if not self.store.interrupted:
            self.take_part()


class StoreRead(StoreOperation):
    pass


class StoreAppend(StoreOperation):
    def __init__(self, store: SimStore, records: list[bytes]) -> None:
        super().__init__(store)
        self.records = records

    def take_effect(self) -> None:
        self.store.directory.check_writable()
        self.store.file.records.extend(self.records)

    def take_part(self) -> None:
        survived = self.store.process.machine.rng.randint(0, len(self.records))
        self.store.file.records.extend(self.records[:survived])
        self.store.interrupted = survived < len(self.records)


class StoreReplace(StoreOperation):
    def __init__(self, store: SimStore, records: list[bytes]) -> None:
        super().__init__(store)
        self.records = records

    def take_effect(self) -> None:
        self.store.directory.check_writable()
        self.store.file.records = self.records

    def take_part(self) -> None:
        if self.store.process.machine.rng.random() < 0.5:
            self.store.file.records = self.records
        else:
            self.store.interrupted = True
