"""What hurts: small faults with a beginning and an end, and plans of them drawn from a seed.

A fault knows whom it hits and nothing else; faults overlap freely, so `end` repairs only what is still broken and never
assumes that the machine is on or the process alive. After `inject` returned every fault of the plan has ended: what
does not recover then is a bug.

    plan = draw_plan(sim.faults_rng, Scope(["n1", "n2", "n3"], ["corrald"]), duration_ns=60 * SECOND, count=5)
    await inject(sim, plan)
"""

from collections.abc import Iterable, Sequence
from random import Random
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from corral.base.time import MILLISECOND, SECOND, Instant, Nanoseconds
from corral.sim.links import Delay, LaidRule, Loss, Repeat

if TYPE_CHECKING:
    from corral.sim.simulation import Simulation


class Scope(NamedTuple):
    """What a plan may hit: machines by name, and the installed programs on each."""

    machines: Sequence[str]
    programs: Sequence[str]


class Fault(Protocol):
    def begin(self, sim: "Simulation") -> None: ...

    def end(self, sim: "Simulation") -> None: ...


def launch_again(sim: "Simulation", machine: str, program: str) -> None:
    host = sim.machines[machine]
    if host.powered and not host.halted and host.running(program) is None:
        host.launch(program)


class Kill:
    """SIGKILL of one program; started again at the end."""

    def __init__(self, machine: str, program: str) -> None:
        self.machine = machine
        self.program = program

    @classmethod
    def drawn(cls, rng: Random, scope: Scope) -> "Kill":
        return cls(rng.choice(scope.machines), rng.choice(scope.programs))

    def __str__(self) -> str:
        return f"kill {self.program} on {self.machine}"

    def begin(self, sim: "Simulation") -> None:
        process = sim.machines[self.machine].running(self.program)
        if process is not None:
            process.kill()

    def end(self, sim: "Simulation") -> None:
        launch_again(sim, self.machine, self.program)


class LoseState:
    """The program dies and its state directory is deleted; started again at the end."""

    def __init__(self, machine: str, program: str) -> None:
        self.machine = machine
        self.program = program

    @classmethod
    def drawn(cls, rng: Random, scope: Scope) -> "LoseState":
        return cls(rng.choice(scope.machines), rng.choice(scope.programs))

    def __str__(self) -> str:
        return f"delete the state of {self.program} on {self.machine}"

    def begin(self, sim: "Simulation") -> None:
        process = sim.machines[self.machine].running(self.program)
        if process is not None:
            process.kill()
            sim.machines[self.machine].lose_state(process.state)
        else:
            sim.machines[self.machine].lose_state(self.program)

    def end(self, sim: "Simulation") -> None:
        launch_again(sim, self.machine, self.program)


class FullState:
    """Writes to the program's state directory fail; at the end there is room again, and the program is started if it
    stopped over it."""

    def __init__(self, machine: str, program: str, after: int) -> None:
        self.machine = machine
        self.program = program
        self.after = after

    @classmethod
    def drawn(cls, rng: Random, scope: Scope) -> "FullState":
        return cls(rng.choice(scope.machines), rng.choice(scope.programs), rng.randrange(4))

    def __str__(self) -> str:
        return f"state directory of {self.program} on {self.machine} is full after {self.after} writes"

    def begin(self, sim: "Simulation") -> None:
        sim.machines[self.machine].state(self.program).fail_after = self.after

    def end(self, sim: "Simulation") -> None:
        sim.machines[self.machine].state(self.program).fail_after = None
        launch_again(sim, self.machine, self.program)


class PowerCut:
    """A machine loses power; boots at the end."""

    def __init__(self, machine: str) -> None:
        self.machine = machine

    @classmethod
    def drawn(cls, rng: Random, scope: Scope) -> "PowerCut":
        return cls(rng.choice(scope.machines))

    def __str__(self) -> str:
        return f"power cut of {self.machine}"

    def begin(self, sim: "Simulation") -> None:
        sim.machines[self.machine].power_cut()

    def end(self, sim: "Simulation") -> None:
        sim.machines[self.machine].boot()


class Blackout:
    """All machines and all disks lose power at once; all boot at the end."""

    @classmethod
    def drawn(cls, rng: Random, scope: Scope) -> "Blackout":
        return cls()

    def __str__(self) -> str:
        return "power cut of everything"

    def begin(self, sim: "Simulation") -> None:
        sim.power_cut()

    def end(self, sim: "Simulation") -> None:
        for machine in sim.machines.values():
            machine.boot()


class Pause:
    """SIGSTOP, then SIGCONT."""

    def __init__(self, machine: str, program: str) -> None:
        self.machine = machine
        self.program = program

    @classmethod
    def drawn(cls, rng: Random, scope: Scope) -> "Pause":
        return cls(rng.choice(scope.machines), rng.choice(scope.programs))

    def __str__(self) -> str:
        return f"pause {self.program} on {self.machine}"

    def begin(self, sim: "Simulation") -> None:
        process = sim.machines[self.machine].running(self.program)
        if process is not None:
            process.pause()

    def end(self, sim: "Simulation") -> None:
        for process in list(sim.machines[self.machine].processes.values()):
            if process.program == self.program:
                process.resume()


class Halt:
    """The hypervisor stops running a machine; its clock stands still, or has jumped when it goes on."""

    def __init__(self, machine: str, clock_stops: bool) -> None:
        self.machine = machine
        self.clock_stops = clock_stops

    @classmethod
    def drawn(cls, rng: Random, scope: Scope) -> "Halt":
        return cls(rng.choice(scope.machines), rng.random() < 0.5)

    def __str__(self) -> str:
        return f"halt {self.machine}, its clock {'stops' if self.clock_stops else 'runs on'}"

    def begin(self, sim: "Simulation") -> None:
        sim.machines[self.machine].halt(clock_stops=self.clock_stops)

    def end(self, sim: "Simulation") -> None:
        sim.machines[self.machine].unhalt()


class Partition:
    """Some machines do not reach some others, and the other way about unless `one_way`."""

    def __init__(self, one: Sequence[str], other: Sequence[str], one_way: bool) -> None:
        self.one = one
        self.other = other
        self.one_way = one_way
        self._laid: list[LaidRule] = []

    @classmethod
    def drawn(cls, rng: Random, scope: Scope) -> "Partition":
        """Full (everybody is on one side) or partial (some see both sides)."""
        shuffled = rng.sample(scope.machines, len(scope.machines))
        left = rng.randint(1, len(shuffled) - 1)
        right = len(shuffled) if rng.random() < 0.6 else rng.randint(left + 1, len(shuffled))
        return cls(sorted(shuffled[:left]), sorted(shuffled[left:right]), rng.random() < 0.35)

    def __str__(self) -> str:
        return f"cut {','.join(self.one)} {'->' if self.one_way else '<->'} {','.join(self.other)}"

    def begin(self, sim: "Simulation") -> None:
        self._laid = sim.network.partition(self.one, self.other, one_way=self.one_way)

    def end(self, sim: "Simulation") -> None:
        sim.network.heal(self._laid)


class BadWeather:
    """All links lose, delay and repeat packets."""

    def __init__(self, machines: Sequence[str], loss: float, repeat: float, delay: Nanoseconds) -> None:
        self.machines = machines
        self.loss = loss
        self.repeat = repeat
        self.delay = delay
        self._laid: list[LaidRule] = []

    @classmethod
    def drawn(cls, rng: Random, scope: Scope) -> "BadWeather":
        return cls(
            scope.machines,
            rng.choice((0.01, 0.1, 0.4)),
            rng.choice((0.0, 0.1)),
            rng.choice((0, 5, 50)) * MILLISECOND,
        )

    def __str__(self) -> str:
        return f"links lose {self.loss:.0%}, repeat {self.repeat:.0%}, delay up to {self.delay // MILLISECOND} ms"

    def begin(self, sim: "Simulation") -> None:
        for rule in (Loss(self.loss), Repeat(self.repeat), Delay(0, self.delay)):
            self._laid.extend(sim.network.lay(rule, self.machines, self.machines))

    def end(self, sim: "Simulation") -> None:
        sim.network.heal(self._laid)


class SlowDisk:
    """All storage of one machine takes `factor` times as long."""

    def __init__(self, machine: str, factor: int) -> None:
        self.machine = machine
        self.factor = factor

    @classmethod
    def drawn(cls, rng: Random, scope: Scope) -> "SlowDisk":
        return cls(rng.choice(scope.machines), rng.choice((5, 50, 500)))

    def __str__(self) -> str:
        return f"storage of {self.machine} is {self.factor} times slower"

    def begin(self, sim: "Simulation") -> None:
        sim.machines[self.machine].slownesses.append(self.factor)

    def end(self, sim: "Simulation") -> None:
        sim.machines[self.machine].slownesses.remove(self.factor)


class Drift:
    """A machine's clock changes its rate, within the bound that rho promises, and keeps it."""

    def __init__(self, machine: str, share: float) -> None:
        self.machine = machine
        self.share = share  # of the bound, -1 .. 1

    @classmethod
    def drawn(cls, rng: Random, scope: Scope) -> "Drift":
        return cls(rng.choice(scope.machines), rng.choice((-1.0, 1.0, rng.uniform(-1, 1))))

    def __str__(self) -> str:
        return f"clock of {self.machine} drifts by {self.share:.2f} of the bound"

    def begin(self, sim: "Simulation") -> None:
        sim.machines[self.machine].set_drift(round(self.share * sim.knobs.drift_ppm))

    def end(self, sim: "Simulation") -> None:
        """It stays so: a clock is allowed to."""


class WallClockJump:
    """Somebody sets the date; boot time goes on."""

    def __init__(self, machine: str, by: Nanoseconds) -> None:
        self.machine = machine
        self.by = by

    @classmethod
    def drawn(cls, rng: Random, scope: Scope) -> "WallClockJump":
        return cls(rng.choice(scope.machines), rng.choice((-86400, -60, 60, 86400)) * SECOND)

    def __str__(self) -> str:
        return f"wall clock of {self.machine} jumps by {self.by // SECOND} s"

    def begin(self, sim: "Simulation") -> None:
        sim.machines[self.machine].jump_wall_clock(self.by)

    def end(self, sim: "Simulation") -> None:
        """It stays so."""


KINDS: Final = (
    Kill,
    Pause,
    PowerCut,
    Partition,
    Halt,
    BadWeather,
    SlowDisk,
    Drift,
    WallClockJump,
    LoseState,
    FullState,
    Blackout,
)
GENTLE: Final = (Pause, Partition, BadWeather, SlowDisk, Drift, WallClockJump)  # nobody dies of these by himself


class Timed(NamedTuple):
    """From `begin` to `end` after the plan's start, virtual nanoseconds."""

    begin: Instant
    end: Instant
    fault: Fault


def draw_plan(
    rng: Random,
    scope: Scope,
    *,
    duration_ns: Nanoseconds,
    count: int,
    kinds: Sequence[type[Fault]] = KINDS,
) -> list[Timed]:
    """`count` faults of these kinds within `duration_ns`, most of them short, sorted by their beginning."""
    plan = []
    for _ in range(count):
        kind = rng.choice(kinds)
        fault: Fault = kind.drawn(rng, scope)  # type: ignore[attr-defined]
        begin = rng.randrange(duration_ns)
        length = min(round(rng.choice((0.2, 1.5, 5.0, 15.0)) * rng.uniform(0.5, 1.5) * SECOND), duration_ns - begin)
        plan.append(Timed(begin, begin + length, fault))
    return sorted(plan, key=lambda timed: timed.begin)


async def inject(sim: "Simulation", plan: Iterable[Timed]) -> None:
    """Lets the plan happen; returns when the last fault has ended."""
    start = sim.now
    moments = []
    for number, timed in enumerate(plan):
        moments.append((timed.begin, number, True, timed.fault))
        moments.append((timed.end, number, False, timed.fault))
    moments.sort(key=lambda moment: (moment[0], not moment[2], moment[1]))
    for when, _, begins, fault in moments:
        await sim.wait_until(start + when)
        sim.note(f"fault {'begins' if begins else 'ends'}: {fault}")
        if begins:
            fault.begin(sim)
        else:
            fault.end(sim)
