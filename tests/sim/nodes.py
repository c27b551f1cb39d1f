"""Whole nodes in the simulator: corrald and a worker participant on every machine, faults from the seed, one oracle.

    python -m corral.sim tests.sim.nodes:locks SEED [--nasty] [--trace FILE]

The worker runs a lockspace inside itself and takes EX locks on a few resources; while it holds one it *acts*, checking
the shared page just before, as every door of corral does. The oracle sees all acts in true time and judges:

  SIM-1  acts on a resource come in the order of their tokens, and a token belongs to one member: exclusion
  SIM-2  nodes that serve at one instant (active view, unexpired lease) serve in the same view
  SIM-3  no incarnation acts after it was fenced
  SIM-4  when the faults are over, every node is a member again and acts
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from corral.api.dlm import EX, NOQUEUE, VALBLK, VALNOTVALID, Completion, Request
from corral.api.fence import Device, FenceConfig, Method, NodeFencing
from corral.base.errors import ClusterError
from corral.base.ids import NO_VIEW, MemberId, NodeId, NodeIncarnation
from corral.base.time import MILLISECOND, SECOND
from corral.base.view import QuorumRecord
from corral.base.world import Completed, World
from corral.cman.state import first_state
from corral.cman.timing import Timing
from corral.cman.wire import RECORDS
from corral.node.config import ClusterConfig, NodeConfig
from corral.node.node import Node, Paths
from corral.providers.backends import NativeBackend
from corral.providers.endpoint import native_endpoint
from corral.providers.native_dlm import NativeLockspace
from corral.providers.participant import Participant
from corral.sim.faults import LoseState, Scope, Timed, draw_plan, inject
from corral.sim.machine import USER
from corral.sim.simulation import Simulation

DETECT = SECOND
RECOVER = 5 * SECOND
FENCE_PROGRAM = "/usr/sbin/fence_sim"
PATHS = Paths("/run/corrald.sock", "/run/lock.sock", "/run/page", "/state/participants")
UUID = "00000000-1111-2222-3333-444444444444"
METADATA = b"""<?xml version="1.0"?><resource-agent name="fence_sim" shortdesc="simulated power switch">
<parameters><parameter name="plug" required="1"><content type="string"/><shortdesc lang="en">outlet</shortdesc>
</parameter><parameter name="action"><content type="string" default="off"/><shortdesc lang="en">what</shortdesc>
</parameter></parameters><actions><action name="on"/><action name="off"/><action name="status"/>
<action name="metadata"/></actions></resource-agent>"""


class Violation(AssertionError):
    """A promise was broken; the message begins with its name."""


class Oracle:
    """Sees every act and every node in true time."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.nodes: dict[NodeId, Node] = {}  # the corrald object living on each machine
        self.newest: dict[bytes, tuple[int, MemberId]] = {}
        self.fenced: set[NodeIncarnation] = set()
        self.acts: dict[NodeId, int] = {}
        self.last_act: dict[NodeId, int] = {}
        self.operations = 0

    def act(self, member: MemberId, resource: bytes, token: int) -> None:
        self.operations += 1
        token_before, member_before = self.newest.get(resource, (0, member))
        if token < token_before or (token == token_before and member != member_before):
            raise Violation(
                f"SIM-1 {member} acts on {resource!r} under token {token:#x} after {member_before} did under "
                f"{token_before:#x}"
            )
        self.newest[resource] = (token, member)
        if NodeIncarnation(member.node, member.incarnation) in self.fenced:
            raise Violation(f"SIM-3 {member} of a fenced incarnation acts on {resource!r}")
        self.acts[member.node] = self.acts.get(member.node, 0) + 1
        self.last_act[member.node] = self.sim.now
        self.look()

    def living(self) -> dict[NodeId, Node]:
        """Nodes whose process runs. A machine whose clock was stopped may believe in a lease that is over: fencing
        covers that (DESIGN 5)."""
        living = {}
        for number, node in sorted(self.nodes.items()):
            machine = self.sim.machines[f"n{number}"]
            process = machine.running("corrald")
            # The object of a process that was killed is still here while its successor starts.
            mine = process is not None and process.identity == node.world.process.me
            if mine and machine.powered and not machine.halted:
                living[number] = node
        return living

    def look(self) -> None:
        serving = {}
        for number, node in self.living().items():
            if node.active and not node.ended.done() and node.world.now() < node.lease_until():
                assert node.view is not None
                serving[number] = node.view.id
        if len(set(serving.values())) > 1:
            raise Violation(f"SIM-2 nodes serve in different views: {serving}")


class Cluster:
    """Machines n1..nN with corrald and a worker each."""

    def __init__(self, sim: Simulation, count: int, worker: Any) -> None:
        self.sim = sim
        self.oracle = Oracle(sim)
        self.worker = worker
        self.numbers = tuple(range(1, count + 1))
        self.config = ClusterConfig(
            "corral",
            UUID,
            DETECT,
            RECOVER,
            tuple(NodeConfig(n, f"n{n}:7400", f"n{n}") for n in self.numbers),
            FenceConfig(
                devices=[Device("switch", FENCE_PROGRAM, timeout=20.0, limit=0)],
                nodes={n: NodeFencing([Method("power", ["switch"])]) for n in self.numbers},
                post_join_delay=2.0,
                retry_delay=1.0,
            ),
        )
        self.formatted: set[NodeId] = set()
        sim.program(FENCE_PROGRAM, self.power_switch)
        for number in self.numbers:
            machine = sim.machine(number, hosts=(f"n{number}",))
            machine.install("corrald", self.corrald(number))
            machine.install("worker", self.attached(number))
        for number in self.numbers:
            sim.machines[f"n{number}"].launch("corrald")
            sim.machines[f"n{number}"].launch("worker")

    def first_record(self) -> QuorumRecord:
        timing = Timing(DETECT, RECOVER)
        return QuorumRecord(NO_VIEW, tuple((n, 1) for n in self.numbers), len(self.numbers), timing.lease_ns)

    # -- programs

    def corrald(self, number: NodeId) -> Any:
        async def main(world: World) -> int:
            if number not in self.formatted:
                self.formatted.add(number)
                await world.store("cman").append([RECORDS.encode(r) for r in first_state(self.first_record())])
            machine = self.sim.machines[f"n{number}"]
            while True:
                node = Node(world, self.config, number, PATHS, uid=USER, log=machine.note)
                try:
                    await node.start()
                except ClusterError as error:
                    machine.note(f"corrald cannot run: {error}")
                    await node.close()
                    return 1
                self.oracle.nodes[number] = node
                ended = await node.ended
                await node.close()
                if not ended.again:
                    return 1
                await world.sleep_until(world.now() + DETECT)

        return main

    def attached(self, number: NodeId) -> Any:
        async def main(world: World) -> int:
            while True:
                participant = Participant(world, PATHS.socket, PATHS.participants, native_endpoint, purpose="worker")
                try:
                    await participant.open()
                except ClusterError:
                    participant.close()
                    await world.sleep_until(world.now() + DETECT // 2)
                    continue
                working = world.spawn(self.worker(self, world, participant), "work")
                reason = await participant.lost
                working.cancel()
                participant.close()
                self.sim.machines[f"n{number}"].note(f"worker ends: {reason}")
                return 1

        return main

    async def power_switch(self, world: World, _argv: Sequence[str], stdin: bytes) -> Completed:
        lines = dict(line.split("=", 1) for line in stdin.decode().splitlines() if "=" in line)
        action = lines.get("action")
        if action == "metadata":
            return Completed(0, METADATA, b"")
        machine = self.sim.machines[lines["plug"].replace("node", "n")]
        await world.sleep_until(world.now() + 200 * MILLISECOND)
        if action == "off":
            if machine.powered:
                machine.power_cut()
                when = self.sim.scheduler.now + 5 * SECOND
                self.sim.loop.call_at_ns(when, lambda: None if machine.powered else machine.boot())
            return Completed(0, b"", b"")
        return Completed(0 if machine.powered else 2, b"", b"")

    # -- life

    def relaunch(self) -> None:
        """What init would do: start again what has ended."""
        for number in self.numbers:
            machine = self.sim.machines[f"n{number}"]
            if machine.powered and not machine.halted:
                for program in ("corrald", "worker"):
                    if machine.running(program) is None:
                        machine.launch(program)

    async def keep_running(self, until: int) -> None:
        while self.sim.now < until:
            await self.sim.wait_until(min(self.sim.now + SECOND, until))
            self.relaunch()
            self.oracle.look()

    def settled(self) -> bool:
        living = self.oracle.living()
        for number in self.numbers:
            node = living.get(number)
            if node is None or not node.active or node.view is None or node.view.nodes != self.numbers:
                return False
        return True


# --- the worker ------------------------------------------------------------------------------------------


RESOURCES = (b"alpha", b"beta", b"gamma")


async def enter(world: World, participant: Participant) -> NativeLockspace:
    """Into the lockspace, after some attempts that are given up half way."""
    while True:
        space = NativeLockspace(world, participant, "work")
        opening = asyncio.ensure_future(space.open())
        if world.rng.random() < 0.7:
            await opening
            return space
        await world.sleep_until(world.now() + world.rng.randrange(20 * MILLISECOND))
        opening.cancel()
        await asyncio.wait((opening,))
        await participant.leave(space.group)


async def lock_worker(cluster: Cluster, world: World, participant: Participant) -> None:
    space = await enter(world, participant)
    backend = NativeBackend(world, space)
    while True:
        if world.rng.random() < 0.003:
            await space.close()
            space = await enter(world, participant)
            backend = NativeBackend(world, space)
        name = world.rng.choice(RESOURCES)
        flags = VALBLK | (NOQUEUE if world.rng.random() < 0.2 else 0)
        granted, handle = await submit(world, backend, Request("lock", name, EX, flags, value=b""))
        if granted.status == 0:
            count = int.from_bytes(granted.value[:8], "little") if not granted.flags & VALNOTVALID else 0
            for _ in range(world.rng.randrange(3)):
                await world.sleep_until(world.now() + world.rng.randrange(20 * MILLISECOND))
                if world.now() >= backend.lease_until():
                    continue
                cluster.oracle.act(participant.me, name, granted.token)
            value = (count + 1).to_bytes(8, "little")
            await submit(world, backend, Request("unlock", lock=handle, flags=VALBLK, value=value))
        await world.sleep_until(world.now() + world.rng.randrange(30 * MILLISECOND))


async def submit(world: World, backend: NativeBackend, request: Request) -> tuple[Completion, int]:
    done = world.future()

    def completed(_handle: int, completion: Completion) -> None:
        if not done.done():
            done.set_result(completion)

    if (
        world.rng.random() < 0.5 and (now := backend.submit_now(request, None)) is not None
    ):  # the fast path, and the other
        return now[1], now[0]
    (handle,) = backend.submit([request], completed)
    return await done, handle


# --- bodies ------------------------------------------------------------------------------------------


FAULT_SECONDS = 60
QUIET_SECONDS = 40


def survivable(plan: list[Timed]) -> list[Timed]:
    """When a majority has lost its memory only an operator can go on; so at most one node does."""
    losses = [timed for timed in plan if isinstance(timed.fault, LoseState) and timed.fault.program == "corrald"]
    return [timed for timed in plan if timed not in losses[1:]]


async def locks(sim: Simulation) -> dict[str, int]:
    """Lock workers on 3 to 5 nodes, some faults, then quiet: every promise, and everybody works again."""
    count = sim.rng.choice((3, 3, 3, 4, 5))
    cluster = Cluster(sim, count, lock_worker)
    await cluster.keep_running(15 * SECOND)
    if not cluster.settled():
        raise Violation("SIM-4 the cluster did not form in 15 s")
    machines = tuple(f"n{n}" for n in cluster.numbers)
    scope = Scope(machines, ("corrald", "worker"))
    plan = draw_plan(sim.rng, scope, duration_ns=FAULT_SECONDS * SECOND, count=sim.rng.randrange(5, 9))
    plan = survivable(plan)
    faults: Coroutine[Any, Any, None] = inject(sim, plan)
    hurting = sim.loop.create_task(faults)
    await cluster.keep_running(sim.now + FAULT_SECONDS * SECOND)
    await hurting
    await cluster.keep_running(sim.now + QUIET_SECONDS * SECOND)
    if not cluster.settled():
        views = {n: str(node.view) for n, node in sorted(cluster.oracle.nodes.items())}
        raise Violation(f"SIM-4 {QUIET_SECONDS} s after the last fault the views are {views}")
    late = [n for n in cluster.numbers if sim.now - cluster.oracle.last_act.get(n, 0) > 10 * SECOND]
    if late:
        raise Violation(f"SIM-4 nodes {late} have not acted for 10 s although all faults are over")
    return {"operations": cluster.oracle.operations, "faults": len(plan)}


async def calm(sim: Simulation) -> dict[str, int]:
    """No fault at all: the cluster forms and works."""
    cluster = Cluster(sim, 3, lock_worker)
    await cluster.keep_running(20 * SECOND)
    if not cluster.settled():
        raise Violation("SIM-4 the cluster did not form in 20 s")
    return {"operations": cluster.oracle.operations}
