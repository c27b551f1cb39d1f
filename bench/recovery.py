"""How long a crash keeps the others waiting: SIGKILL to one node's daemon and mount until a survivor writes again.

Three nodes under `corral up` with its defaults, mounted. A writer on each survivor adds to a file of its own with
fsync; a third program, on the node that dies, holds a lock (flock) that a survivor waits for. All clocks are
CLOCK_BOOTTIME of one machine, zero is the kill.

    detected           the survivors' coordinator has installed a view without the node
    fenced             it is proven gone
    locks recovered    the round of dlm:home has finished
    journal replayed   the round of gfs:home has finished: its journal is clean, the gate is open
    lock handed over   the survivor that waited for the dead node's flock has it
    longest gap        the longest time between two acknowledged writes of a survivor's writer
    resumed            the latest of all these: from then on nobody waits for the dead node

    python -m bench.recovery [--runs 5] [--json FILE]
"""

import argparse
import asyncio
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.common import HEADING, Results, Row, cluster, corral, corralds, participants

from corral.cli.layout import Layout
from corral.cli.localcluster import ask

VICTIM = 3
BEFORE = 1.0  # seconds of peace
AFTER = 3.0  # seconds of watching after the lock was handed over
STEPS = ("detected", "fenced", "locks recovered", "journal replayed")


def now() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


# --- what runs on the nodes ------------------------------------------------------------------------------------------


def write(path: str) -> None:
    """Adds a record and syncs, for ever; tells when each was acknowledged."""
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    while True:
        os.write(file, b"one more record\n")
        os.fsync(file)
        print(now(), flush=True)


def lock(path: str) -> None:
    """Tells that it asks, takes the lock, tells when, and keeps it."""
    file = os.open(path, os.O_CREAT | os.O_RDWR)
    print("asks", flush=True)
    fcntl.flock(file, fcntl.LOCK_EX)
    print(now(), flush=True)
    time.sleep(600)


def start(what: str, path: Path, output: Any = subprocess.PIPE) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "bench.recovery", "--do", what, str(path)], stdout=output)


# --- one crash -------------------------------------------------------------------------------------------------------


def crash(layout: Layout, scratch: Path) -> dict[str, float]:
    """Milliseconds after the kill."""
    mounts = {node: layout.node(node).mount for node in (1, 2, 3)}
    outputs = {node: scratch / f"writer{node}" for node in (1, 2)}
    programs: list[subprocess.Popen[bytes]] = []
    try:
        holder = start("lock", mounts[VICTIM] / "lock")
        programs.append(holder)
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.stdout.readline()  # it has it
        for node, output in outputs.items():
            with output.open("wb") as file:
                programs.append(start("write", mounts[node] / f"records{node}", file))
        waiter = start("lock", mounts[1] / "lock")
        programs.append(waiter)
        assert waiter.stdout is not None
        waiter.stdout.readline()
        while not all(output.stat().st_size for output in outputs.values()):
            time.sleep(0.05)
        time.sleep(BEFORE)
        victims = [*corralds(layout, VICTIM), *participants(layout, VICTIM)]
        killed = now()
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        handed = int(waiter.stdout.readline())
        time.sleep(AFTER)
        happenings = asyncio.run(ask(str(layout.node(1).socket), "history", since=killed))
    finally:
        for program in programs:
            program.kill()
        for program in programs:
            program.wait()
            if program.stdout is not None:
                program.stdout.close()
    found = {step: (at - killed) / 1e6 for step, at in steps(happenings).items()}
    missing = [step for step in STEPS if step not in found]
    if missing:
        raise SystemExit(f"after {AFTER:g} s the history does not tell when it was: {', '.join(missing)}")
    found["lock handed over"] = (handed - killed) / 1e6
    recovered = max(found.values())
    gaps = [gap_end(output, killed, killed + int(recovered * 1e6)) for output in outputs.values()]
    found["longest gap"] = max(gap for gap, _ in gaps)
    found["resumed"] = max(recovered, *(end for _, end in gaps))
    return found


def steps(happenings: list[Any]) -> dict[str, int]:
    """The first of each kind after the kill."""
    first: dict[str, int] = {}
    for at, kind, text in happenings:
        step = ""
        if kind == "view":
            step = "detected"
        elif kind == "fence" and "fenced" in text:
            step = "fenced"
        elif kind == "round" and "has recovered" in text:
            step = "locks recovered" if text.startswith("dlm:home") else "journal replayed"
            if not text.startswith(("dlm:home", "gfs:home")):
                step = ""
        if step:
            first.setdefault(step, at)
    return first


def gap_end(output: Path, killed: int, recovered: int) -> tuple[float, float]:
    """The longest gap between acknowledgements, of those that recovery may have made, and its end; both ms."""
    times = [int(line) for line in output.read_text().split("\n")[:-1]]
    gaps = [
        (later - earlier, later)
        for earlier, later in itertools.pairwise(times)
        if later > killed and earlier < recovered
    ]
    if not gaps:
        raise SystemExit(f"the writer of {output} never wrote again; before the kill it wrote {len(times)} times")
    length, end = max(gaps)
    return length / 1e6, (end - killed) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--do", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        what, path = options.do
        write(path) if what == "write" else lock(path)
        return
    results = Results("recovery")
    rows = {
        name: Row(f"kill -9 to {name}" if name != "longest gap" else "longest gap of a survivor's writer", "ms")
        for name in (*STEPS, "lock handed over", "longest gap", "resumed")
    }
    rows["resumed"].mark = 2000
    with cluster(mount=True, size="512M") as layout:
        for run in range(options.runs):
            if run:
                corral("node", "start", str(VICTIM), "--dir", str(layout.root))
                corral("up", "--nodes", "3", "--dir", str(layout.root), "--mount")
            for name, figure in crash(layout, layout.root).items():
                rows[name].add(figure)
    print(HEADING)
    results.add(*rows.values())
    results.write(options.json)


if __name__ == "__main__":
    main()
