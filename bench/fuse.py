"""What the FUSE door costs by itself: the filesystem behind it is in memory and never waits.

Server CPU µs per operation, wall-clock µs per operation of one client, messages per operation, MB/s. Two placements:
"spread" lets the scheduler use every core (waking the other side up on another core then costs more than the request),
"one core" pins client and server together (what a request costs by itself).

    python -m bench.fuse [--scale 1.0] [--json bench/results/fuse.json]
"""

import argparse
import asyncio
import gc
import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from tests.integration.memfs import MemoryFilesystem

from corral import fuse

MINUTE = 60 * 1_000_000_000
MIB = 1 << 20


class Case(NamedTuple):
    name: str
    rounds: int
    valid_ns: int  # how long the kernel may believe names and attributes
    size: int  # bytes moved by an operation
    setup: str
    operation: str


CASES = [
    Case("stat, one message", 40_000, 0, 0, "fd = os.open(path, os.O_CREAT | os.O_RDWR)", "os.fstat(fd)"),
    Case("stat by path, nothing cached", 10_000, 0, 0, "open(path, 'w').close()", "os.stat(path)"),
    Case("stat by path, cached", 40_000, MINUTE, 0, "open(path, 'w').close()", "os.stat(path)"),
    Case(
        "create+unlink", 6_000, MINUTE, 0, "", "os.close(os.open(path, os.O_CREAT | os.O_WRONLY)); os.unlink(path)"
    ),
    Case(
        "4 KiB direct write", 30_000, MINUTE, 4096,
        "page = mmap.mmap(-1, 4096); fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT)",
        "os.pwrite(fd, page, 0)",
    ),
    Case(
        "1 MiB direct write", 2_000, MINUTE, MIB,
        "page = mmap.mmap(-1, 1 << 20); fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT)",
        "os.pwrite(fd, page, 0)",
    ),
    Case(
        "1 MiB direct read", 2_000, MINUTE, MIB,
        "page = mmap.mmap(-1, 1 << 20); fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT)\n"
        "os.pwrite(fd, page, 0)",
        "os.preadv(fd, [page], 0)",
    ),
    Case(
        "sequential buffered write, 128 KiB calls", 512, MINUTE, MIB // 8,
        "page = bytes(1 << 17); fd = os.open(path, os.O_CREAT | os.O_RDWR)", "os.write(fd, page)",
    ),
]  # fmt: skip

CLIENT = """
import mmap, os, sys, time
path = sys.argv[1]
{setup}
print("ready", flush=True)
sys.stdin.readline()
begun = time.perf_counter()
for _ in range({rounds}):
    {operation}
print(time.perf_counter() - begun, flush=True)
"""


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def measure(case: Case, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        mounted = await fuse.mount(
            lambda notifier: MemoryFilesystem(notifier, entry_valid_ns=case.valid_ns, attr_valid_ns=case.valid_ns),
            directory,
        )
        async with mounted:
            return await _run(case, rounds, mounted, f"{directory}/file")


async def _run(case: Case, rounds: int, mounted: fuse.Mount, path: str) -> dict[str, float]:
    code = CLIENT.format(setup=case.setup, rounds=rounds, operation=case.operation)
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, path, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert client.stdout is not None
    assert client.stdin is not None
    await client.stdout.readline()
    gc.collect()
    messages, cpu = sum(mounted.session.statistics().requests.values()), cpu_seconds()
    client.stdin.write(b"\n")
    wall = float(await client.stdout.readline())
    cpu = cpu_seconds() - cpu
    messages = sum(mounted.session.statistics().requests.values()) - messages
    await client.wait()
    result = {
        "server_cpu_us": round(cpu / rounds * 1e6, 2),
        "wall_us": round(wall / rounds * 1e6, 2),
        "messages": round(messages / rounds, 2),
        "per_second": round(rounds / wall),
    }
    if case.size:
        result["megabytes_per_second"] = round(case.size * rounds / wall / 1e6, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of operations")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "command": " ".join(["python -m bench.fuse", *sys.argv[1:]]),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    gc.disable()
    every_core = os.sched_getaffinity(0)
    for placement, cores in (("spread", every_core), ("one core", {min(every_core)})):
        os.sched_setaffinity(0, cores)
        print(f"{placement}:")
        for case in CASES:
            result = uvloop.run(measure(case, max(1, int(case.rounds * arguments.scale))))
            results.setdefault(placement, {})[case.name] = result
            print(f"  {case.name:42}" + "  ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    os.sched_setaffinity(0, every_core)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
