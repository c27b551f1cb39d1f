"""Recipes on whole simulated nodes: members on every machine, one fault after the other, every history linearizable.

    python -m corral.sim tests.sim.recipes:shared SEED [--nasty] [--trace FILE]

On each machine a worker adds to and reads counters, holds permits of a semaphore, and puts into and takes from a queue,
side by side. Between two faults the cluster and all members become whole again, so that no value loses its last member:
then each must be as if one process had done it all.

  SIM-12  the histories of counters, semaphores and queues are linearizable, also those of the dead
"""

import asyncio
from typing import Any, Final

from corral import recipes
from corral.base.ids import NodeId
from corral.base.time import MILLISECOND, SECOND
from corral.base.world import ProcessId, World
from corral.providers.backends import NativeBackend
from corral.providers.locks import LockSpace
from corral.providers.native_dlm import NativeLockspace
from corral.providers.participant import Participant
from corral.sim.faults import Fault, Kill, Partition, Pause, PowerCut
from corral.sim.simulation import Simulation
from tests.linear.checker import NotLinearizable, Operation, check
from tests.linear.history import telling
from tests.linear.models import Counter, Queue, Semaphore
from tests.sim.nodes import DETECT, Cluster, Violation

FAULTS: Final = 5
PERMITS: Final = 2
VALUE_SIZE: Final = 128
TIMEOUT: Final = 20.0  # seconds, of an operation: longer than any recovery
PATIENCE: Final = 60 * SECOND
SETTLING: Final = 6 * SECOND
MODELS: Final = {"counter": Counter(), "semaphore": Semaphore(PERMITS), "queue": Queue()}


class Records:
    """What all workers do, in true time; it outlives them."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.calls: dict[str, dict[str, Operation]] = {kind: {} for kind in MODELS}
        self.holds: dict[str, tuple[str, str, int]] = {}  # acquisition -> (kind, how it ends, last sure of it)
        self.members: dict[NodeId, ProcessId] = {}  # the last worker of each node that had everything open
        self.number = 0

    def call(self, model: str, client: str, kind: str, argument: Any = None) -> str:
        self.number += 1
        number = f"{client}.{self.number}"
        what = number if argument is None else argument
        self.calls[model][number] = Operation(client, model, kind, what, self.sim.now, None)
        return number

    def returned(self, model: str, number: str, result: Any = None) -> None:
        known = self.calls[model]
        known[number] = known[number]._replace(returned=self.sim.now, result=result)

    def hold(self, model: str, number: str, end: str) -> None:
        self.holds[number] = (model, end, self.calls[model][number].called)

    def sure(self, number: str, held: Any) -> bool:
        model, end, _ = self.holds[number]
        if held.valid:
            self.holds[number] = (model, end, self.sim.now)
            return True
        return False

    def judge(self) -> int:
        everything = [operation for known in self.calls.values() for operation in known.values()]
        ended = {
            o.argument for o in everything if o.kind in ("release", "give_back", "done") and o.returned is not None
        }
        for number, (model, end, since) in self.holds.items():
            known = self.calls[model]
            if number not in ended:
                known[f"{number} ends"] = Operation("", model, end, number, since, None)
        total = 0
        for model, known in self.calls.items():
            try:
                total += check(MODELS[model], telling(known.values())).operations
            except NotLinearizable as error:
                raise Violation(f"SIM-12 {error}") from None
        return total


class Worker:
    def __init__(self, records: Records, world: World, participant: Participant, space: LockSpace) -> None:
        self.records = records
        self.world = world
        self.rng = world.rng
        self.node = participant.me.node
        self.client = f"{participant.me}"
        self.space = space
        self.counter = recipes.Counter(space, "c")
        self.queue = recipes.Queue(space, "q")
        self.semaphore = recipes.Semaphore(space, "s", PERMITS)

    async def work(self) -> None:
        await self.counter.open()
        await self.queue.open()
        self.records.members[self.node] = self.world.process.me
        await asyncio.gather(
            self.again(self.count), self.again(self.hold_permit), self.again(self.put), self.again(self.take)
        )

    async def again(self, step: Any) -> None:
        while True:
            await step()
            await self.pause(120)

    async def pause(self, most_ms: int) -> None:
        await self.world.sleep_until(self.world.now() + self.rng.randrange(1, most_ms) * MILLISECOND)

    async def count(self) -> None:
        records = self.records
        if self.rng.random() < 0.5:
            number = records.call("counter", self.client, "add", 1)
            records.returned("counter", number, await self.counter.add(timeout=TIMEOUT))
        else:
            number = records.call("counter", self.client, "read", 0)
            records.returned("counter", number, await self.counter.read(timeout=TIMEOUT))

    async def hold_permit(self) -> None:
        records = self.records
        number = records.call("semaphore", self.client, "acquire")
        records.hold("semaphore", number, "release")
        permit = await self.semaphore.acquire(timeout=TIMEOUT)
        records.returned("semaphore", number)
        for _ in range(self.rng.randrange(3)):
            await self.pause(30)
            if not records.sure(number, permit):
                await permit.release()
                return
        release = records.call("semaphore", self.client, "release", number)
        await permit.release()
        records.returned("semaphore", release)

    async def put(self) -> None:
        records = self.records
        if await self.queue.length(timeout=TIMEOUT) < 3:
            number = records.call("queue", self.client, "put")
            await self.queue.put(number.encode(), timeout=TIMEOUT)
            records.returned("queue", number)

    async def take(self) -> None:
        records = self.records
        number = records.call("queue", self.client, "take")
        records.hold("queue", number, "give_back")
        element = await self.queue.take(timeout=10 * TIMEOUT)
        records.returned("queue", number, element.data.decode())
        for _ in range(self.rng.randrange(3)):
            await self.pause(30)
            if not records.sure(number, element):
                await element.give_back()
                return
        if self.rng.random() < 0.2:
            back = records.call("queue", self.client, "give_back", number)
            await element.give_back()
            records.returned("queue", back)
            return
        done = records.call("queue", self.client, "done", number)
        await element.done(timeout=TIMEOUT)
        records.returned("queue", done)


def working(records: Records) -> Any:
    async def work(_cluster: Cluster, world: World, participant: Participant) -> None:
        native = NativeLockspace(world, participant, "work", value_size=VALUE_SIZE)
        await native.open()
        space = LockSpace(world, NativeBackend(world, native))
        await Worker(records, world, participant, space).work()

    return work


def one_fault(sim: Simulation, machines: tuple[str, ...]) -> Fault:
    victim = sim.rng.choice(machines)
    others = tuple(machine for machine in machines if machine != victim)
    kind = sim.rng.randrange(5)
    if kind == 0:
        return PowerCut(victim)
    if kind == 1:
        return Kill(victim, "worker")
    if kind == 2:
        return Kill(victim, "corrald")
    if kind == 3:
        return Pause(victim, sim.rng.choice(("worker", "corrald")))
    return Partition((victim,), others, sim.rng.random() < 0.5)


async def shared(sim: Simulation) -> dict[str, int]:
    records = Records(sim)
    cluster = Cluster(sim, 3, working(records))
    machines = tuple(f"n{n}" for n in cluster.numbers)
    for _ in range(FAULTS):
        await whole(sim, cluster, records)
        await cluster.keep_running(sim.now + sim.rng.randrange(3) * SECOND)
        await sim.wait_until(sim.now + sim.rng.randrange(SECOND))
        fault = one_fault(sim, machines)
        sim.machines[machines[0]].note(f"fault: {fault}")
        fault.begin(sim)
        await sim.wait_until(sim.now + sim.rng.randrange(DETECT // 10, 4 * DETECT))
        fault.end(sim)
    await whole(sim, cluster, records)
    await cluster.keep_running(sim.now + 3 * SECOND)
    return {"operations": records.judge(), "faults": FAULTS}


async def whole(sim: Simulation, cluster: Cluster, records: Records) -> None:
    """Until every node is a member, and every worker of every recipe."""
    until = sim.now + PATIENCE
    await cluster.keep_running(sim.now + SETTLING)  # so that everybody has noticed what he lost
    while not (cluster.settled() and all(member(sim, records, number) for number in cluster.numbers)):
        if sim.now > until:
            raise Violation(f"SIM-4 after {PATIENCE // SECOND} s only {records.members} are members again")
        await cluster.keep_running(sim.now + SECOND)


def member(sim: Simulation, records: Records, number: NodeId) -> bool:
    process = sim.machines[f"n{number}"].running("worker")
    return process is not None and process.identity == records.members.get(number)
