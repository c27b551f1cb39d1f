"""A small world with everything in it, for the tests of determinism; and the same with an accident planted."""

import asyncio
import os
from collections.abc import Callable, Iterable

from corral.base.time import MILLISECOND, SECOND
from corral.base.world import Connection, World
from corral.sim.disk import BLOCK
from corral.sim.faults import KINDS, Scope, draw_plan, inject
from corral.sim.simulation import Simulation

NODES = (1, 2, 3)
ORDINARY: Callable[[list[str]], Iterable[str]] = sorted


class Peer:
    """A handler that echoes what asks for it."""

    def __init__(self, connection: Connection | None = None) -> None:
        self.connection = connection
        self.broke = asyncio.Event()

    def received(self, messages: list[bytes]) -> None:
        if self.connection is not None:
            self.connection.send(messages)

    def broken(self, reason: str) -> None:
        self.broke.set()


class Chatter:
    """A program that heartbeats to all, keeps a connection to its neighbour, logs and writes blocks."""

    def __init__(self, node: int, order: Callable[[list[str]], Iterable[str]]) -> None:
        self.node = node
        self.order = order

    async def __call__(self, world: World) -> None:
        me = f"10.0.0.{self.node}"
        others = [f"10.0.0.{node}:9" for node in NODES if node != self.node]
        socket = await world.network.datagrams(f"{me}:9", lambda source, payload: None)
        await world.network.listen(f"{me}:7", Peer)
        world.spawn(self.talk(world), "talk")
        world.spawn(self.write(world), "write")
        while True:
            for address in self.order(others):
                socket.send(address, world.random_bytes(8))
            await world.sleep_until(world.now() + 50 * MILLISECOND)

    async def talk(self, world: World) -> None:
        neighbour = self.node % len(NODES) + 1
        while True:
            peer = Peer()
            try:
                connection = await world.network.connect(f"10.0.0.{neighbour}:7", neighbour, peer)
            except OSError:
                await asyncio.sleep(0.3)
                continue
            while not peer.broke.is_set():
                connection.send([world.random_bytes(32)] * world.rng.randint(1, 5))
                await asyncio.sleep(world.rng.random() / 10)

    async def write(self, world: World) -> None:
        disk = await world.disk("shared")
        store = world.store("log")
        while True:
            try:
                await store.append([world.random_bytes(5)])
            except OSError:
                raise SystemExit(1) from None
            await disk.write(world.rng.randrange(16) * BLOCK, [world.random_bytes(BLOCK)])
            if world.rng.random() < 0.2:
                await disk.flush()
            await asyncio.sleep(world.rng.random() / 20)


async def tell(sim: Simulation, order: Callable[[list[str]], Iterable[str]]) -> None:
    sim.disk("shared", 16 * BLOCK)
    for node in NODES:
        machine = sim.machine(node)
        machine.install("chatter", Chatter(node, order))
        machine.launch("chatter")
    plan = draw_plan(
        sim.faults_rng,
        Scope(tuple(sim.machines), ("chatter",)),
        duration_ns=8 * SECOND,
        count=8,
        kinds=KINDS,
    )
    await inject(sim, plan)
    await asyncio.sleep(2)


async def body(sim: Simulation) -> None:
    await tell(sim, ORDINARY)


async def hash_canary(sim: Simulation) -> None:
    """Iterates a set of strings: differs between hash seeds."""
    await tell(sim, set)


async def chance_canary(sim: Simulation) -> None:
    """Asks the outside: differs between any two runs."""
    await tell(sim, lambda names: sorted(names, key=lambda name: os.urandom(4)))
