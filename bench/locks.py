"""What a lock costs: kept, mastered in this process, through the socket, and on another node.

A turn is lock and unlock of one name in EX by `async with`, which is how applications write it: it waits for the grant,
the unlock goes without waiting. "both awaited" waits for the unlock's answer too. Nobody else wants the lock: what is
measured is the way, not the queue. CPU µs are of all processes on that way, per turn.

    kept                  taken again with keep=True: no message, but the lease is compared
    local, no daemon      `corral.local()`: the lock manager in the process, nothing else exists
    in-process master     a participant of a three-node cluster; it masters the lock itself
    socket                a light client; the lock service of its node masters the lock
    remote                a participant; another participant, on another node, masters it: one TLS round trip
    remote, light client  a light client; the lock service of another node masters it: socket and TLS both

Who masters a lock is decided by who takes it first: the master's side takes each name in NL before and keeps it.
The TLS echo beside (bench/echo.py, "bare") is a uvloop Protocol in two processes, 64 bytes, nothing of ours; it is
measured again before each run, on the same machine at the same load. "world" is our framed connection.

    python -m bench.locks [--runs 5] [--seconds 1.0] [--json FILE]
"""

import argparse
import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvloop
from bench.common import HEADING, Results, Row, Spent, cluster, corralds, participants
from bench.echo import measure

import corral
from corral.cli.layout import Layout
from corral.cli.localcluster import ask
from corral.providers.backends import NativeBackend
from corral.providers.endpoint import native_endpoint
from corral.providers.locks import LockSpace
from corral.providers.native_dlm import NativeLockspace
from corral.providers.participant import Participant
from corral.real import pki
from corral.real.world import RealWorld

IN_FLIGHT = (1, 16, 256)
NAMES = max(IN_FLIGHT)
WARM_UP = 200

ECHO = "bare uvloop TLS echo (asyncio Protocol, one outstanding, 64 bytes)"


def name_of(number: int) -> str:
    return f"lock-{number}"


# --- ways to a lockspace ---------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def participating(socket: str, lockspace: str) -> AsyncIterator[LockSpace]:
    """A lockspace engine in this process, as a mount has it."""
    paths: dict[str, Any] = await ask(socket, "paths")
    world = RealWorld("/nonexistent", pki.load(paths["certificates"], paths["node"]))
    participant = Participant(world, socket, paths["participants"], native_endpoint, purpose="bench")
    await participant.open()
    native = NativeLockspace(world, participant, lockspace)
    await native.open()
    space = LockSpace(world, NativeBackend(world, native))
    try:
        yield space
    finally:
        await space.close()
        participant.close()
        await world.close()


async def hold_all(space: LockSpace) -> None:
    """Becomes the master of every name, and stays it."""
    for number in range(NAMES):
        await space.lock(name_of(number), corral.NL)


async def master(socket: str, lockspace: str, light: bool) -> None:
    """The other process: masters the names until its input ends."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(0, lambda: ended.done() or ended.set_result(None))
    if light:
        async with corral.connect(socket) as connected:
            await hold_all(await connected.lockspace(lockspace))
            print("ready", flush=True)
            await ended
    else:
        async with participating(socket, lockspace) as space:
            await hold_all(space)
            print("ready", flush=True)
            await ended


@contextlib.contextmanager
def mastered_by(socket: str, lockspace: str, *, light: bool) -> Any:
    """Another process that masters every name; gives its pid."""
    command = [sys.executable, "-m", "bench.locks", "--master", socket, lockspace, "light" if light else "participant"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        if other.stdout.readline().strip() != b"ready":
            raise SystemExit("the process that was to master the locks ended early")
        try:
            yield other.pid
        finally:
            other.stdin.close()
            other.wait()


# --- measuring -------------------------------------------------------------------------------------------------------


async def latency(space: LockSpace, seconds: float, *, awaited: bool = False) -> float:
    """Median µs of a turn, one outstanding."""
    spans: list[int] = []
    clock = time.perf_counter_ns
    end = clock() + int(seconds * 1e9)
    begun = clock()
    while begun < end:
        if awaited:
            held = await space.lock(name_of(0), corral.EX)
            await held.unlock()
        else:
            async with space.lock(name_of(0), corral.EX):
                pass
        now = clock()
        spans.append(now - begun)
        begun = now
    spans = sorted(spans[min(WARM_UP, len(spans) // 2) :])
    return spans[len(spans) // 2] / 1000


async def throughput(space: LockSpace, seconds: float, in_flight: int, pids: list[int]) -> tuple[float, float]:
    """Turns per second with so many under way, each task on a name of its own; CPU µs per turn."""
    turns = 0
    stop = False

    async def work(number: int) -> None:
        nonlocal turns
        name = name_of(number)
        while not stop:
            async with space.lock(name, corral.EX):
                pass
            turns += 1
            if turns % 64 == 0:
                await asyncio.sleep(0)  # a way that never waits must not keep the others, and the clock, waiting

    tasks = [asyncio.ensure_future(work(number)) for number in range(in_flight)]
    await asyncio.sleep(min(0.2, seconds / 4))
    before = turns
    with Spent(pids) as spent:
        await asyncio.sleep(seconds)
    done = turns - before
    stop = True
    await asyncio.gather(*tasks)
    return done / spent.wall, spent.cpu / max(done, 1) * 1e6


async def kept(space: LockSpace, batches: int = 1000, size: int = 50) -> tuple[float, float]:
    """µs of taking a kept lock again and leaving it, median of batches; CPU µs, mean. A batch is shorter than a time
    slice: on a loaded machine the mean tells how long others ran."""
    async with space.lock("lock-0", corral.EX, keep=True):
        pass
    spans: list[int] = []
    with Spent() as spent:
        for _ in range(batches):
            begun = time.perf_counter_ns()
            for _ in range(size):
                async with space.lock("lock-0", corral.EX, keep=True):
                    pass
            spans.append(time.perf_counter_ns() - begun)
    return sorted(spans)[batches // 2] / size / 1000, spent.cpu / batches / size * 1e6


class Way:
    """The rows of one way."""

    def __init__(self, title: str, *, mark: float | None = None, echo: bool = False) -> None:
        more: dict[str, Any] = {"of": "TLS echo", "marked_ratio": True} if echo else {}
        if echo and mark is None:
            more["marked_ratio"] = False
        self.turn = Row(f"{title}: lock+unlock p50", "µs", mark=mark, **more)
        self.awaited = Row(f"{title}: both awaited p50", "µs")
        self.rates = {count: Row(f"{title}: {count} in flight", "/s") for count in IN_FLIGHT}

    async def run(self, space: LockSpace, seconds: float, pids: list[int], echo_us: float | None = None) -> None:
        with Spent(pids):
            p50 = await latency(space, seconds)
        self.awaited.add(await latency(space, seconds / 2, awaited=True))
        for count, row in self.rates.items():
            rate, cpu = await throughput(space, seconds, count, pids)
            row.add(rate, cpu_us=cpu)
            if count == 1:
                self.turn.add(p50, cpu_us=cpu, beside=echo_us)

    @property
    def rows(self) -> list[Row]:
        return [self.turn, self.awaited, *self.rates.values()]


class Bench:
    def __init__(self, layout: Layout, runs: int, seconds: float, results: Results) -> None:
        self._layout = layout
        self._runs = runs
        self._seconds = seconds
        self._results = results
        self._sockets = {node: str(layout.node(node).socket) for node in (1, 2, 3)}

    def run(self) -> None:
        self._locally()
        self._in_process()
        self._socket()
        self._remote(light=False)
        self._remote(light=True)

    def _locally(self) -> None:
        way = Way("local, no daemon")

        async def body() -> None:
            async with corral.local() as locks:
                await way.run(await locks.lockspace("bench"), self._seconds, [])

        for _ in range(self._runs):
            uvloop.run(body())
        self._results.add(*way.rows)

    def _in_process(self) -> None:
        way = Way("in-process master")

        async def body(lockspace: str) -> None:
            async with participating(self._sockets[1], lockspace) as space:
                await hold_all(space)
                await way.run(space, self._seconds, corralds(self._layout, 1))

        for run in range(self._runs):
            uvloop.run(body(f"in-process-{run}"))
        self._results.add(*way.rows)

    def _socket(self) -> None:
        kept_row = Row("kept, taken again", "µs", mark=1.0)
        way = Way("socket", mark=120)

        async def body(lockspace: str) -> None:
            async with corral.connect(self._sockets[1]) as connected:
                space = await connected.lockspace(lockspace)
                await hold_all(space)
                pids = corralds(self._layout, 1) + participants(self._layout, 1)
                await way.run(space, self._seconds, pids)
                again, cpu = await kept(space)
                kept_row.add(again, cpu_us=cpu)

        for run in range(self._runs):
            uvloop.run(body(f"socket-{run}"))
        self._results.add(kept_row, *way.rows)

    def _remote(self, *, light: bool) -> None:
        title = "remote, light client" if light else "remote"
        way = Way(title, mark=None if light else 1.6, echo=True)
        echoes = {kind: Row(f"echo beside {title}: {kind} TLS", "µs") for kind in ("bare", "world")}

        async def body(lockspace: str, pids: list[int], echo_us: float) -> None:
            if light:
                async with corral.connect(self._sockets[1]) as connected:
                    await way.run(await connected.lockspace(lockspace), self._seconds, pids, echo_us)
            else:
                async with participating(self._sockets[1], lockspace) as space:
                    await way.run(space, self._seconds, pids, echo_us)

        for run in range(self._runs):
            for kind, row in echoes.items():
                echo = measure(kind, 5_000)
                row.add(echo["p50_us"], cpu_us=echo["cpu_us"])
            lockspace = f"{'light' if light else 'remote'}-{run}"
            with mastered_by(self._sockets[2], lockspace, light=light) as other:
                pids = [*corralds(self._layout, 1, 2), *(participants(self._layout, 1, 2) if light else [other])]
                uvloop.run(body(lockspace, pids, echoes["bare"].runs[-1]))
        self._results.add(*echoes.values(), *way.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--master", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.master:
        socket, lockspace, kind = options.master
        uvloop.run(master(socket, lockspace, kind == "light"))
        return
    results = Results("locks", echo=ECHO)
    print(HEADING)
    with cluster() as layout:
        Bench(layout, options.runs, options.seconds, results).run()
    results.write(options.json)


if __name__ == "__main__":
    main()
