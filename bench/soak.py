"""A local cluster on a machine that has no time for it: nothing may be taken for dead that is only slow.

    python -m bench.soak [--minutes 30] [--nodes 3] [--output bench/results/soak.json]

Both cores are saturated (stress-ng when it is installed, else Python loops). Clients take locks and allocate in bursts,
every mount writes, syncs and reads files. Fails on any view change and on any eviction; tells lapses of the lease and
the longest time that a corrald or a mount stood still. Exit status 0 only when nothing was lost.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import corral
from corral.base.errors import ClusterError
from corral.cli.layout import Layout, make
from corral.cli.localcluster import LocalCluster, ask

DISK_SIZE: Final = 512 << 20
SAMPLE_SECONDS: Final = 5.0
STUCK_SECONDS: Final = 60.0  # a worker that tells of no progress for so long hangs
STOOD_STILL = re.compile(r"stood still for (\d+) ms")

# --- load ------------------------------------------------------------------------------------------------------------


def burners(count: int) -> list["subprocess.Popen[bytes]"]:
    """Processes that want every core for themselves."""
    if shutil.which("stress-ng"):
        return [subprocess.Popen(["stress-ng", "--cpu", str(count), "--quiet"], start_new_session=True)]
    loop = "while True: sum(range(100000))"
    return [subprocess.Popen([sys.executable, "-c", loop], start_new_session=True) for _ in range(count)]


async def take_locks(socket: str, node: int) -> None:
    """A client: locks that several clients want, and bursts of allocation in between. Tells how many it had."""
    taken = 0
    async with corral.connect(socket) as cluster:
        space = await cluster.lockspace("soak")
        while True:
            for name in range(20):
                async with space.lock(f"resource-{name}", corral.EX, timeout=60) as held:
                    assert held.token
                taken += 1
            burst = [{"number": number, "text": str(number)} for number in range(200_000)]
            for entry in burst:
                entry["self"] = entry  # cycles: only the collector frees them
            print(f"locks {node} {taken}", flush=True)
            await asyncio.sleep(0.5)


def write_files(mount: Path, node: int) -> None:
    """An application on a mount: writes, syncs, reads back what the others wrote. Tells how many files it wrote."""
    written = 0
    while True:
        for number in range(10):
            content = f"{node} {written}".encode() * 100
            path = mount / f"node{node}-{number}"
            with path.open("wb") as file:
                file.write(content)
                if number % 5 == 0:
                    os.fsync(file.fileno())
            if path.read_bytes() != content:
                raise SystemExit(f"{path} has other bytes than were written to it")
            written += 1
        for path in sorted(mount.iterdir()):
            path.read_bytes()
        print(f"files {node} {written}", flush=True)
        time.sleep(0.5)


# --- the soak --------------------------------------------------------------------------------------------------------


class Watch:
    """What the cluster was at the start, and everything that changed since."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.first = self._sample()
        self.unanswered = 0
        self.longest_answer = 0.0

    def _ask(self, node: int, what: str) -> Any:
        return asyncio.run(ask(str(self.cluster.files(node).socket), what))

    def _sample(self) -> dict[int, dict[str, Any]]:
        return {
            node: {"status": self._ask(node, "cman.status"), "statistics": self._ask(node, "statistics")}
            for node in self.cluster.config.node_ids
        }

    def look(self) -> None:
        for node in self.cluster.config.node_ids:
            began = time.monotonic()
            try:
                self._ask(node, "cman.status")
            except ClusterError:
                self.unanswered += 1
            self.longest_answer = max(self.longest_answer, time.monotonic() - began)

    def result(self) -> dict[str, Any]:
        last = self._sample()
        nodes: dict[str, Any] = {}
        for node, now in last.items():
            before = self.first[node]
            nodes[str(node)] = {
                "view_changes": now["status"]["epoch"] - before["status"]["epoch"],
                "restarted": now["status"]["incarnation"] != before["status"]["incarnation"],
                "evictions": now["statistics"]["evictions"] - before["statistics"]["evictions"],
                "lapses": now["statistics"]["lapses"] - before["statistics"]["lapses"],
                "corrald_longest_stall_ms": now["statistics"]["loop"]["longest_stall_ns"] / 1e6,
                "corrald_stalls_over_250_ms": now["statistics"]["loop"]["stalls"],
                "mount_longest_told_stall_ms": longest_told(self.cluster.files(node).mount_log),
            }
        return nodes


def longest_told(log: Path) -> int:
    """From a mount's own log; it tells stalls of more than 250 ms."""
    found = [int(match[1]) for match in STOOD_STILL.finditer(log.read_text(errors="replace"))]
    return max(found, default=0)


def workers(cluster: LocalCluster, output: Path) -> list["subprocess.Popen[bytes]"]:
    started = []
    for node in cluster.config.node_ids:
        files = cluster.files(node)
        for role, where in (("locks", files.socket), ("files", files.mount)):
            with (output / f"{role}{node}").open("wb") as log:
                argv = [sys.executable, "-m", "bench.soak", "--worker", role, str(where), str(node)]
                started.append(subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True))
    return started


def stuck(working: list["subprocess.Popen[bytes]"], output: Path) -> list[str]:
    """Workers that have ended, or have done nothing for so long that it is no slowness."""
    found = []
    for worker, log in zip(working, sorted_logs(output), strict=True):
        if worker.poll() is not None:
            found.append(f"worker {log.name} ended: {log.read_text(errors='replace')[-300:]}")
        elif time.time() - log.stat().st_mtime > STUCK_SECONDS:
            found.append(f"worker {log.name} has done nothing for {STUCK_SECONDS:g} s")
    return found


def sorted_logs(output: Path) -> list[Path]:
    """In the order in which `workers` starts them."""
    return sorted(
        (path for path in output.iterdir() if path.is_file()), key=lambda path: (path.name[-1], path.name[0] != "l")
    )


def done(output: Path, role: str) -> int:
    """How much all workers of that role have done, by their own last word."""
    total = 0
    for path in output.glob(f"{role}*"):
        words = [line.split() for line in path.read_text(errors="replace").splitlines() if line.startswith(role)]
        total += int(words[-1][2]) if words else 0
    return total


def soak(minutes: float, nodes: int, directory: Path) -> dict[str, Any]:
    layout = Layout(directory / "cluster")
    cluster = LocalCluster(layout, make(layout, nodes), lambda sentence: print(sentence, file=sys.stderr))
    load: list[subprocess.Popen[bytes]] = []
    began = time.monotonic()
    problems: list[str] = []
    try:
        cluster.up()
        cluster.mount_all(DISK_SIZE)
        watch = Watch(cluster)
        load += burners(os.cpu_count() or 2)
        working = workers(cluster, directory)
        load += working
        end = time.monotonic() + minutes * 60
        while not problems and time.monotonic() < end:
            time.sleep(min(SAMPLE_SECONDS, max(0.0, end - time.monotonic())))
            watch.look()
            problems += stuck(working, directory)
        found = watch.result()
        load_average = os.getloadavg()
    finally:
        for process in load:
            if process.poll() is None:
                os.killpg(process.pid, 9)
        if problems:
            cluster.abandon()  # what waits in a mount that hangs ends with it
        for process in load:
            process.wait()
        cluster.down()
    for node, seen in found.items():
        if seen["view_changes"] or seen["restarted"]:
            problems.append(f"node {node} saw {seen['view_changes']} view changes though nobody failed")
        if seen["evictions"]:
            problems.append(f"node {node} evicted {seen['evictions']} participants that were only slow")
    if problems:
        kept = Path(tempfile.mkdtemp(prefix="corral-soak-failed-"))
        shutil.copytree(directory, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("disk.img", "*.sock", "mnt"))
        print(f"logs are kept in {kept}", file=sys.stderr)
    return {
        "minutes": round((time.monotonic() - began) / 60, 2),
        "nodes": found,
        "locks": done(directory, "locks"),
        "files": done(directory, "files"),
        "unanswered_questions": watch.unanswered,
        "longest_answer_ms": round(watch.longest_answer * 1000, 1),
        "load_average": [round(value, 1) for value in load_average],
        "cores": os.cpu_count(),
        "load": "stress-ng" if shutil.which("stress-ng") else "python",
        "python": platform.python_version(),
        "kernel": platform.release(),
        "problems": problems,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("bench/results/soak.json"))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        role, where, node = arguments.worker
        if role == "locks":
            asyncio.run(take_locks(where, int(node)))
        else:
            write_files(Path(where), int(node))
        return 1
    directory = Path(tempfile.mkdtemp(prefix="corral-soak-"))
    try:
        result = soak(arguments.minutes, arguments.nodes, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    for problem in result["problems"]:
        print(f"soak: {problem}", file=sys.stderr)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
