"""What the lock engine costs: the shipped one, interpreted and compiled, beside one with nothing but locks.

Everything is measured twice in each run, by processes that take turns: once with the engine in pure Python, once with
what the wheel carries, compiled by mypyc (here into a temporary directory). What calls the engine is interpreted both
times, as applications are. The engine is the shipped one: tokens, value blocks, statistics, and the lease looked at.
Nothing here waits, so all times are CPU time: what other processes take meanwhile is not the engine's.

    lock+unlock           EX of one name and its unlock: a Request in, a Completion out, each
    convert               EX to PR and back, counted singly
    through the inbox     the same pairs as events through `step` and `ready`, as peers' and waiting requests go
    bare                  bench/dlm_bare.py, built the same way: a request in, a completion out, and no rules but modes
    kept, by `with`       `with held:` of a kept lock in hand; the lease is read from a shared page
    kept, by `async with` `async with space.lock(name, keep=True)`: its table looked at too
    asyncio pair          `async with space.lock(name)`: asked for, granted and given back, mastered in this process
    a million locks       one engine makes, holds and drops a million locks of a million names in EX under uvloop, 64 in
                          a turn, with the collector as the daemons have it: bytes of resident memory a lock, and the
                          longest turn of the loop

    python -m bench.dlm [--runs 5] [--locks 1000000] [--json FILE]
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop
from bench.common import HEADING, Results, Row

import corral
from corral.api.dlm import EX, PR, VALBLK, Request
from corral.base.time import SECOND
from corral.dlm.engine import LockspaceEngine
from corral.dlm.events import Submit
from corral.dlm.solo import solo
from corral.providers.page import PAGE_SIZE, PageReader, PageWriter
from corral.real.pulse import SETTLED_SECONDS, Pulse

ROOT = Path(__file__).parents[1]
CLIENT = 1
BATCH = 100  # operations timed together
TURN = 64  # locks made or dropped in one turn of the loop

Figures = dict[str, float]

cpu_ns = time.thread_time_ns


# --- in the measured process -----------------------------------------------------------------------------------------


def median_ns(bodies: dict[str, Callable[[int], None]], batches: int) -> dict[str, float]:
    """ns of one operation of each body, the batches taken in turns."""
    spans: dict[str, list[int]] = {name: [] for name in bodies}
    for _ in range(batches):
        for name, body in bodies.items():
            begun = cpu_ns()
            body(BATCH)
            spans[name].append(cpu_ns() - begun)
    return {name: statistics.median(of) / BATCH for name, of in spans.items()}


def engines(batches: int = 2000) -> Figures:
    import dlm_bare  # found beside this file, or compiled beside the engine

    now = time.monotonic_ns()
    engine = solo(now, "bench")
    name = b"lock-1"
    completed = engine.complete_now

    def pairs(count: int) -> None:
        for _ in range(count):
            completed(now, CLIENT, 1, Request("lock", name, EX, VALBLK))
            completed(now, CLIENT, 1, Request("unlock", lock=1))

    def converts(count: int) -> None:
        for _ in range(count // 2):
            completed(now, CLIENT, 2, Request("convert", mode=PR, flags=VALBLK, lock=2))
            completed(now, CLIENT, 2, Request("convert", mode=EX, flags=VALBLK, lock=2))

    def inbox(count: int) -> None:
        for cookie in range(count):
            engine.step(now, Submit(CLIENT, [(1, cookie, Request("lock", name, EX, VALBLK))]))
            engine.ready()
            engine.step(now, Submit(CLIENT, [(1, cookie, Request("unlock", lock=1))]))
            engine.ready()

    bare = dlm_bare.Engine()
    asked = dlm_bare.Request

    def bare_pairs(count: int) -> None:
        for _ in range(count):
            bare.step(asked(dlm_bare.LOCK, 1, name, EX))
            bare.ready()
            bare.step(asked(dlm_bare.UNLOCK, 1, b"", 0))
            bare.ready()

    def bare_converts(count: int) -> None:
        for _ in range(count // 2):
            bare.step(asked(dlm_bare.CONVERT, 2, b"", PR))
            bare.ready()
            bare.step(asked(dlm_bare.CONVERT, 2, b"", EX))
            bare.ready()

    assert completed(now, CLIENT, 2, Request("lock", b"lock-2", EX, VALBLK)) is not None
    bare.step(asked(dlm_bare.LOCK, 2, b"lock-2", EX))
    bodies = {
        "pairs": pairs,
        "bare pairs": bare_pairs,
        "converts": converts,
        "bare converts": bare_converts,
        "inbox": inbox,
    }
    granted = engine.counters.granted
    spans = median_ns(bodies, batches)
    assert engine.counters.granted - granted == 3 * batches * BATCH, "every one was granted"
    return {what: 1e9 / span for what, span in spans.items()}


async def keeping(batches: int = 2000) -> Figures:
    memory = memoryview(bytearray(PAGE_SIZE))
    page = PageWriter(memory)
    page.publish(time.clock_gettime_ns(time.CLOCK_BOOTTIME) + 3600 * SECOND, 1)
    slot = page.add(1)
    assert slot is not None, "the page is new"
    async with corral.local() as cluster:
        space = await cluster.lockspace("bench")
        space.backend.lease_until = PageReader(memory, slot).lease_until  # type: ignore[method-assign]
        async with space.lock("kept", EX, keep=True) as held:
            pass
        spans: dict[str, list[int]] = {"with": [], "async with": [], "pair": []}
        for _ in range(batches):
            begun = cpu_ns()
            for _ in range(BATCH):
                with held:
                    pass
            middle = cpu_ns()
            for _ in range(BATCH):
                async with space.lock("kept", EX, keep=True):
                    pass
            later = cpu_ns()
            for _ in range(BATCH):
                async with space.lock("pair", EX):
                    pass
            end = cpu_ns()
            spans["with"].append(middle - begun)
            spans["async with"].append(later - middle)
            spans["pair"].append(end - later)
        assert held.kept, "the lease ran all the time"
    return {what: statistics.median(of) / BATCH / 1000 for what, of in spans.items()}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class Turns:
    """The longest turn of the loop in CPU time, while its phases run."""

    def __init__(self) -> None:
        self.longest_ms: dict[str, float] = {}

    async def run(self, phase: str, count: int, body: Callable[[int], None]) -> None:
        longest = 0
        begun = cpu_ns()
        for first in range(0, count, TURN):
            for number in range(first, min(first + TURN, count)):
                body(number)
            await asyncio.sleep(0)  # the pulse beats, and collects if it is time
            now = cpu_ns()
            longest = max(longest, now - begun)
            begun = now
        self.longest_ms[phase] = longest / 1e6


async def million(count: int) -> Figures:
    pulse = Pulse(asyncio.get_running_loop())
    await asyncio.sleep(SETTLED_SECONDS * 1.5)  # the start-up heap is frozen by then, as in a daemon
    engine: LockspaceEngine = solo(0, "bench")
    before = resident()
    turns = Turns()

    def make(number: int) -> None:
        completed = engine.complete_now(0, CLIENT, number + 1, Request("lock", b"lock-%d" % number, EX, VALBLK))
        assert completed is not None, "mastered here, wanted by nobody else"

    def drop(number: int) -> None:
        assert engine.complete_now(0, CLIENT, number + 1, Request("unlock", lock=number + 1)) is not None

    def convert(number: int) -> None:
        request = Request("convert", mode=PR, flags=VALBLK, lock=number + 1)
        assert engine.complete_now(0, CLIENT, number + 1, request) is not None

    await turns.run("made", count, make)
    per_lock = (resident() - before) / count
    await turns.run("held", count, convert)
    await turns.run("dropped", count, drop)
    assert engine.space.lock_count == 0
    pulse.stop()
    return {"bytes": per_lock, **turns.longest_ms}


def measure(what: str, count: int) -> Figures:
    if what == "engines":
        return engines()
    return uvloop.run(keeping() if what == "keeping" else million(count))


# --- in the process that has them measured ---------------------------------------------------------------------------

BUILD = """
import sys
from setuptools import setup
from corral_build import compiled
setup(name="bench", packages=[], script_args=["-q", "build_ext", "--inplace"], ext_modules=compiled(".", "dlm_bare.py"))
"""


def build(directory: Path) -> None:
    """The sources and the bare engine in `directory`, what is to be compiled beside them."""
    shutil.copytree(ROOT / "src" / "corral", directory / "corral")
    shutil.copy(ROOT / "bench" / "dlm_bare.py", directory)
    done = subprocess.run(
        [sys.executable, "-c", BUILD],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"the engines cannot be compiled here:\n{done.stdout}{done.stderr}")


def figures(what: str, path: str, count: int) -> Figures:
    command = [sys.executable, "-m", "bench.dlm", "--figures", what, "--locks", str(count)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class Build:
    """The rows of one of the two builds."""

    def __init__(self, title: str, path: str, rate: float, kept: float) -> None:
        self.path = path
        self.pairs = Row(f"{title}: lock+unlock", "/s", mark=rate)
        self.pairs_beside = Row(f"{title}: lock+unlock beside bare", "/s", mark=0.6, of="bare", marked_ratio=True)
        self.converts = Row(f"{title}: convert beside bare", "/s", mark=0.6, of="bare", marked_ratio=True)
        self.inbox = Row(f"{title}: lock+unlock through the inbox", "/s")
        self.by_with = Row(f"{title}: kept, by `with`", "µs", mark=kept)
        self.by_async = Row(f"{title}: kept, by `async with`", "µs")
        self.pair = Row(f"{title}: asyncio pair", "µs", mark=10)
        self.bytes = Row(f"{title}: a million locks, each", "bytes", mark=600)
        self.pauses = {
            phase: Row(f"{title}: longest pause while {phase}", "ms", mark=20) for phase in ("made", "held", "dropped")
        }

    def engines(self, found: Figures) -> None:
        self.pairs.add(found["pairs"])
        self.pairs_beside.add(found["pairs"], beside=found["bare pairs"])
        self.converts.add(found["converts"], beside=found["bare converts"])
        self.inbox.add(found["inbox"])

    def keeping(self, found: Figures) -> None:
        self.by_with.add(found["with"])
        self.by_async.add(found["async with"])
        self.pair.add(found["pair"])

    def million(self, found: Figures) -> None:
        self.bytes.add(found["bytes"])
        for phase, row in self.pauses.items():
            row.add(found[phase])

    @property
    def rows(self) -> list[Row]:
        kept = [self.by_with, self.by_async, self.pair]
        return [self.pairs, self.pairs_beside, self.converts, self.inbox, *kept, self.bytes, *self.pauses.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--locks", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figures", choices=("engines", "keeping", "million"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.figures:
        print(json.dumps(measure(options.figures, options.locks)))
        return
    results = Results("dlm", locks=options.locks)
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as directory:
        build(Path(directory))
        builds = (
            Build("interpreted", f"{ROOT / 'src'}:{ROOT / 'bench'}", 220_000, 0.5),
            Build("compiled", directory, 700_000, 0.25),
        )
        print(HEADING)
        for _ in range(options.runs):
            for one in builds:
                one.engines(figures("engines", one.path, options.locks))
            for one in builds:
                one.keeping(figures("keeping", one.path, options.locks))
        for _ in range(min(options.runs, 3)):
            for one in builds:
                one.million(figures("million", one.path, options.locks))
    for one in builds:
        results.add(*one.rows)
    results.write(options.json)


if __name__ == "__main__":
    main()
