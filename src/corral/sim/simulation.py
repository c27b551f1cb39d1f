"""A whole simulated world from one seed: time, chance, machines, network, disks, and the run of a test's body in it.

    sim = Simulation(seed)
    first, second = sim.machine(1), sim.machine(2)
    first.start("corrald", main)            # async def main(world: World) -> int | None
    sim.run(body(sim))                      # the body runs outside every machine, in virtual time

The body's event loop is `sim.loop`: its clock is true virtual time, nothing pauses it. It may await
`process.call(...)`, `asyncio.sleep(...)` and World operations of attached processes. The run ends when the body
returns, and fails when an exception leaves any callback or task of any process, when nothing is left to do, or when
time stands still.
"""

import asyncio
from collections.abc import Coroutine
from random import Random
from typing import Any, TypeVar

from corral.base.ids import NodeId
from corral.base.time import Instant
from corral.sim.disk import Device, SimDisk
from corral.sim.knobs import Knobs
from corral.sim.loop import Escaped, Scheduler, SimLoop
from corral.sim.machine import Machine
from corral.sim.network import Fabric
from corral.sim.process import Process, Program
from corral.sim.trace import Trace

T = TypeVar("T")


class Simulation:
    def __init__(self, seed: int, knobs: Knobs | None = None, *, whole_trace: bool = False) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.knobs = Knobs() if knobs is None else knobs
        self.trace = Trace(whole=whole_trace)
        self.scheduler = Scheduler()
        self.network = Fabric(self.scheduler, self.trace, self._stream(), self.knobs)
        self.faults_rng = self._stream()
        self.workload_rng = self._stream()
        self.loop = SimLoop(self.scheduler, "body")
        self.machines: dict[str, Machine] = {}
        self.disks: dict[str, Device] = {}
        self.programs: dict[str, Program] = {}
        self._processes: list[Process] = []
        self._closed = False

    def _stream(self) -> Random:
        return Random(self.rng.getrandbits(64))

    # --- building ---

    def machine(self, node: NodeId, *, name: str | None = None, hosts: tuple[str, ...] | None = None) -> Machine:
        """Adds a machine, powered on. Hosts by default `10.0.0.<node>`; one per physical network."""
        name = f"n{node}" if name is None else name
        hosts = (f"10.0.{node >> 8}.{node & 255}",) if hosts is None else hosts
        if name in self.machines or any(host in self.network.hosts for host in hosts):
            raise ValueError(f"machine {name} or one of its hosts {hosts} exists already")
        machine = Machine(self, name, node, hosts)
        self.machines[name] = machine
        for host in hosts:
            self.network.hosts[host] = machine
        return machine

    def disk(self, name: str, size: int) -> Device:
        """Adds a device that every machine finds under this name."""
        device = self.disks[name] = Device(self, name, size)
        return device

    def program(self, path: str, program: Program) -> None:
        """What `World.process.run([path, ...])` runs: a process of its own on the caller's machine."""
        self.programs[path] = program

    # --- used by the parts ---

    def adopt(self, process: Process) -> None:
        self._processes.append(process)

    def open_disk(self, process: Process, name: str) -> SimDisk:
        device = self.disks.get(name)
        if device is None:
            raise FileNotFoundError(f"there is no device {name}")
        return SimDisk(device, process)

    # --- running ---

    @property
    def now(self) -> Instant:
        """True virtual time, nanoseconds; no machine's clock."""
        return self.scheduler.now

    def note(self, what: str) -> None:
        """A line of the body's own in the trace (and in the digest)."""
        self.trace.note(self.scheduler.now, "body", what)

    async def wait_until(self, when: Instant) -> None:
        """For the body: sleeps until this virtual time, to the nanosecond."""
        woken = asyncio.Event()
        self.loop.call_at_ns(when, woken.set)
        await woken.wait()

    def power_cut(self) -> None:
        """All machines and devices at once."""
        for machine in self.machines.values():
            machine.power_cut()
        for device in self.disks.values():
            device.power_cut()

    def run(self, body: Coroutine[Any, Any, T]) -> T:
        """Runs the body to its end. May be called again until `close`."""
        result = self.loop.run_until_complete(body)
        for loop in (self.loop, *(process.loop for process in self._processes if process.alive)):
            error = loop.unretrieved()
            if error is not None:
                raise Escaped(f"{type(error).__name__} in a task of {loop.name} that nobody awaited") from error
        return result

    def close(self) -> None:
        """Ends what is left of every process. Always call it: suspended coroutines must not outlive their world."""
        if not self._closed:
            self._closed = True
            for process in self._processes:
                process.alive = False
                process.loop.bury()
            self.loop.bury()
            self.scheduler.kernel.bury()

    def __enter__(self) -> "Simulation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
