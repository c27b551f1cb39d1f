"""A simulated machine: power, clock, boot id, and what its processes share (state directories, sockets, pages, files).

Power: on -> off (`power_cut`: processes vanish, memory with them, state directories stay) -> on (`boot`: new boot id,
new clock, installed programs start). `halt` is a hypervisor that stops scheduling the machine: nothing runs, packets
wait, and the clock stands still too unless told otherwise.
"""

from random import Random
from typing import TYPE_CHECKING, Final, NamedTuple

from corral.base.ids import NodeId
from corral.base.time import SECOND
from corral.sim.clock import Clock
from corral.sim.local import SimLocalListener
from corral.sim.loop import SimHandle, SimLoop
from corral.sim.process import Main, Process, Roster
from corral.sim.store import StateDirectory

if TYPE_CHECKING:
    from corral.sim.simulation import Simulation

USER: Final = 1000
EPOCH_SECONDS: Final = 1_750_000_000  # virtual time 0 in seconds since 1970


class Installed(NamedTuple):
    """A program that `boot` and `launch` start."""

    main: Main
    at_boot: bool
    uid: int


class Machine:
    """Made by `Simulation.machine`."""

    def __init__(self, simulation: "Simulation", name: str, node: NodeId, hosts: tuple[str, ...]) -> None:
        self.simulation = simulation
        self.name = name
        self.node = node
        self.hosts = hosts
        self.rng = Random(simulation.rng.getrandbits(64))
        self.powered = True
        self.halted = False
        self.wall_offset_ns = 0
        self.processes: dict[int, Process] = {}
        self.sockets: dict[str, SimLocalListener] = {}
        self.pages: dict[str, bytearray] = {}
        self.states: dict[str, StateDirectory] = {}
        self.slownesses: list[int] = []  # how many times slower its storage is; the largest counts
        self._installed: dict[str, Installed] = {}
        self._rosters: dict[str, Roster] = {}
        self._next_pid = 300
        self._next_port = 32_768
        self._halt_stopped_clock = False
        bound = simulation.knobs.drift_ppm
        self._ppm = self.rng.randint(-bound, bound)
        self._power_on()

    def _power_on(self) -> None:
        self.boot_id = f"{self.rng.getrandbits(128):032x}"
        self.clock = Clock(
            local=self.rng.randrange(5 * SECOND, 40 * SECOND), virtual=self.simulation.scheduler.now, ppm=self._ppm
        )

    def note(self, what: str) -> None:
        self.simulation.trace.note(self.simulation.scheduler.now, self.name, what)

    # --- processes ---

    def start(
        self,
        name: str,
        main: Main,
        *,
        node: NodeId | None = None,
        cluster: str = "corral",
        state: str | None = None,
        uid: int = USER,
    ) -> Process:
        """A new process that runs `main(world)`. `node` and `cluster` are what its certificate says; processes with the
        same `state` (default: its name) find each other's stores, one after the other."""
        assert self.powered, f"{self.name} is off"
        process = Process(self, name, loop=None, node=node, cluster=cluster, state=state or name, uid=uid)
        if self.halted:
            process.loop.hold()
        self.simulation.adopt(process)
        process.run_main(main)
        return process

    def attach(
        self,
        name: str,
        *,
        node: NodeId | None = None,
        cluster: str = "corral",
        state: str | None = None,
        uid: int = USER,
    ) -> Process:
        """A process without a program, for a test that drives its World from the simulation's body: it shares the
        body's event loop and clock rate, and cannot be paused."""
        loop: SimLoop = self.simulation.loop
        return Process(self, name, loop=loop, node=node, cluster=cluster, state=state or name, uid=uid)

    def install(self, name: str, main: Main, *, at_boot: bool = True, uid: int = USER) -> None:
        """A program `launch` and `boot` know."""
        self._installed[name] = Installed(main, at_boot, uid)

    def launch(self, name: str) -> Process:
        installed = self._installed[name]
        return self.start(name, installed.main, uid=installed.uid)

    def running(self, name: str) -> Process | None:
        """The living process of this name started last."""
        found = None
        for process in self.processes.values():
            if process.program == name and process.alive:
                found = process
        return found

    def new_pid(self) -> int:
        while True:
            self._next_pid += 1
            if self._next_pid >= self.simulation.knobs.pid_max:
                self._next_pid = 2
            if self._next_pid not in self.processes:
                return self._next_pid

    def ephemeral_port(self) -> int:
        self._next_port = 32_768 + (self._next_port + 1) % 28_000
        return self._next_port

    @property
    def disk_slowness(self) -> int:
        return max(self.slownesses, default=1)

    def roster(self, path: str) -> Roster:
        if path not in self._rosters:
            self._rosters[path] = Roster(self, path)
        return self._rosters[path]

    def state(self, name: str) -> StateDirectory:
        if name not in self.states:
            self.states[name] = StateDirectory(self, name)
        return self.states[name]

    # --- power and time ---

    def power_cut(self) -> None:
        if not self.powered:
            return
        self.note("power cut")
        self.powered = False
        self.halted = False
        for process in list(self.processes.values()):
            process.vanish()
        for state in self.states.values():
            state.power_cut()
        self.sockets.clear()
        self.pages.clear()

    def boot(self) -> None:
        """Power is back; programs installed with `at_boot` start."""
        if self.powered:
            return
        self.powered = True
        self._power_on()
        self.note("booted")
        self.simulation.network.booted(self)
        for name, installed in self._installed.items():
            if installed.at_boot:
                self.launch(name)

    def halt(self, *, clock_stops: bool = True) -> None:
        """The hypervisor stops running this machine."""
        if not self.powered or self.halted:
            return
        self.note("halted by its hypervisor")
        self.halted = True
        self._halt_stopped_clock = clock_stops
        scheduler = self.simulation.scheduler
        if clock_stops:
            self.clock.waiting = list(scheduler.take_timers(self.clock))
            self.clock.freeze(scheduler.now)
        for process in self.processes.values():
            if process.owns_loop:
                process.loop.hold()

    def unhalt(self) -> None:
        if not self.halted:
            return
        self.note("runs again")
        self.halted = False
        scheduler = self.simulation.scheduler
        if self._halt_stopped_clock:
            self.clock.thaw(scheduler.now)
            self._set_again(self.clock.waiting)
            self.clock.waiting = []
        for process in self.processes.values():
            if process.owns_loop:
                process.loop.release()

    def set_drift(self, ppm: int) -> None:
        """From now on this machine's clock gains `ppm` microseconds a second."""
        self._ppm = ppm
        if self.clock.frozen or not self.powered:
            return
        self.note(f"clock drifts by {ppm} ppm")
        timers = self.simulation.scheduler.take_timers(self.clock)
        self.clock.set_rate(self.simulation.scheduler.now, ppm)
        self._set_again(timers)

    def _set_again(self, timers: list[SimHandle]) -> None:
        scheduler = self.simulation.scheduler
        for handle in timers:
            if not handle.cancelled():
                scheduler.push(max(self.clock.virtual(handle.local), scheduler.now), handle)

    def wall_ns(self) -> int:
        return EPOCH_SECONDS * SECOND + self.simulation.scheduler.now + self.wall_offset_ns

    def jump_wall_clock(self, by_ns: int) -> None:
        """Somebody set the date."""
        self.note(f"wall clock set by {by_ns} ns")
        self.wall_offset_ns += by_ns

    # --- state ---

    def lose_state(self, name: str) -> None:
        """Somebody deleted this state directory."""
        self.note(f"state directory {name} deleted")
        self.state(name).delete()
