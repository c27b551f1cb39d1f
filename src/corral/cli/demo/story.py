"""The steps of the demo, in order. Every wait has a bound.

    python -m corral.cli.demo.story DIR RESULTS [--no-fuse] [--quick]

Runs under `supervisor.py`, which ends whatever is left of it. RESULTS is a descriptor that gets one JSON document
a line: ["row", WHAT, RESULT] as soon as it is known, and at the end ["end", WHAT FAILED, or ""].
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, final

from corral.base.errors import ClusterError
from corral.base.ids import NodeId
from corral.cli import processes
from corral.cli.demo import applications, checks
from corral.cli.demo.applications import Writers
from corral.cli.demo.checks import Failed
from corral.cli.demo.reach import Library, Mounted, Reach
from corral.cli.layout import Layout, make
from corral.cli.localcluster import LocalCluster, ask
from corral.cli.output import tell
from corral.fuse.mounting import why_not_here

NODES: Final = 3
VICTIM: Final = 3
DISK_SIZE: Final = 512 << 20
WORK_SECONDS: Final = 12.0
QUICK_WORK_SECONDS: Final = 5.0
KILL_AFTER: Final = 1 / 3  # of it
BEGIN_SECONDS: Final = 30.0  # until every writer writes
JOB_SECONDS: Final = 120.0
EXIT_SECONDS: Final = 10.0

NO_FUSE_OPTION: Final = "--no-fuse"
QUICK_OPTION: Final = "--quick"

ShowRow = Callable[[str, str], None]


@final
class Demo:
    def __init__(self, directory: Path, show: ShowRow, *, fuse: bool, quick: bool) -> None:
        self.layout: Final = Layout(directory / "cluster")
        self._directory: Final = directory
        self._source: Final = directory / "source"
        self._show = show
        self._fuse = fuse
        self._quick = quick
        self._work_seconds: Final = QUICK_WORK_SECONDS if quick else WORK_SECONDS
        self._writers = Writers()
        self._cluster: LocalCluster
        self._reach: Reach
        self._killed_at = 0

    # -- the steps

    def run(self) -> None:
        """Raises Failed or ClusterError with what went wrong."""
        began = time.monotonic()
        self._step(1, "three daemons become a cluster")
        cluster = self._cluster = LocalCluster(self.layout, make(self.layout, NODES), tell)
        self._reach = self._choose_reach()
        cluster.up()
        self._show_view()
        self._step(2, "one disk image, made and opened by every node")
        self._reach.prepare(DISK_SIZE)
        self._row("mounts of one image", self._reach.summary)
        self._step(3, "a tree goes in through node 1 while node 2 reads behind it")
        self._copy_tree()
        self._step(4, "all nodes write under locks; in the middle node 3 is killed with -9")
        self._work_and_kill()
        self._step(5, "node 3 comes back, everything acknowledged is there")
        self._return_and_check()
        self._step(6, "unmount and check the filesystem")
        self._finish()
        self._row("all of it", f"{time.monotonic() - began:.1f} s")

    def _choose_reach(self) -> Reach:
        """Through the kernel where it can be done; what is missing is said."""
        trial = self._directory / "trial"
        trial.mkdir()
        why = why_not_here(str(trial)) if self._fuse else f"{NO_FUSE_OPTION} was given"
        if not why:
            return Mounted(self._cluster)
        tell(f"      without FUSE ({why}): applications reach the files through corral's library")
        self._row("without FUSE, through the library", why)
        return Library(self._cluster)

    def _step(self, number: int, what: str) -> None:
        tell(f"[{number}/6] {what}")

    def _row(self, what: str, result: str) -> None:
        self._show(what, result)
        tell(f"      {what}: {result}")

    def _run(self, node: NodeId, job: str, *rest: str) -> int:
        """An application on that node, to its end."""
        process = applications.start(self._reach.arguments(node), job, *rest)
        return applications.result(process, f"`{job}` on node {node}", JOB_SECONDS)

    def _ask(self, node: NodeId, what: str, **arguments: Any) -> Any:
        return asyncio.run(ask(str(self.layout.node(node).socket), what, **arguments))

    def _show_view(self) -> None:
        status = self._ask(1, "cman.status")
        members = ", ".join(map(str, status["members"]))
        self._row("view", f"{status['epoch']}.{status['coordinator']} of nodes {members}, quorate, active")
        if status["members"] != list(range(1, NODES + 1)) or not status["quorate"] or not status["active"]:
            raise Failed(f"the cluster is not what it should be: {status}")

    def _copy_tree(self) -> None:
        tree = checks.make_source(self._source, quick=self._quick)
        self._row("tree", f"{tree.files} files, {tree.directories} directories, {tree.size / 1e6:.1f} MB")
        follower = applications.start(self._reach.arguments(2), "follow", "tree", str(tree.files))
        began = time.monotonic()
        self._run(1, "copy", str(self._source), "tree")
        took = time.monotonic() - began
        self._row("copied in", f"{took:.1f} s, {tree.files / took:.0f} files/s, {tree.size / took / 1e6:.0f} MB/s")
        applications.result(follower, "node 2, reading behind,", JOB_SECONDS)
        for node in (2, 3):
            self._compare(node, f"compared through node {node}")

    def _compare(self, node: NodeId, what: str) -> None:
        began = time.monotonic()
        count = self._run(node, "compare", str(self._source), "tree")
        self._row(what, f"{count} files the same ({time.monotonic() - began:.1f} s)")

    def _work_and_kill(self) -> None:
        self._run(1, "begin", "work")
        for node in range(1, NODES + 1):
            reach = self._reach.arguments(node)
            self._writers.start(f"n{node}c", reach, "counters", "work", f"n{node}c", str(self._work_seconds))
            self._writers.start(f"n{node}l", reach, "append", "work", f"n{node}l", str(self._work_seconds))
        self._wait_for_writers()
        self._writers.read_for(KILL_AFTER * self._work_seconds)
        self._kill_victim()
        self._writers.read_for(self._work_seconds + 20)
        hanging = self._writers.still_running(EXIT_SECONDS)
        if hanging:
            raise Failed(f"writers {', '.join(hanging)} hang")
        self._show_recovery()

    def _wait_for_writers(self) -> None:
        acknowledged = self._writers.acknowledged
        deadline = time.monotonic() + BEGIN_SECONDS
        while idle := sorted(set(self._writers.processes) - set(acknowledged.at)):
            if time.monotonic() > deadline or acknowledged.stopped:
                raise Failed(
                    f"{', '.join(idle)} had nothing acknowledged in {BEGIN_SECONDS:g} s {acknowledged.stopped}"
                )
            self._writers.read_for(0.1)

    def _kill_victim(self) -> None:
        """corrald and filesystem of one node die at one moment; its lock service is left to the fence agent."""
        files = self.layout.node(VICTIM)
        corrald = processes.read_pid_file(files.pid)
        if corrald is None:
            raise Failed(f"corrald of node {VICTIM} is gone before it was killed; see {files.log}")
        mine = self._writers.identities(f"n{VICTIM}c", f"n{VICTIM}l")
        filesystem = self._reach.processes(VICTIM, mine)
        chosen = [corrald, *filesystem]
        others = [process for process in processes.read_participants(files.participants) if process not in chosen]
        self._killed_at = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        for process in chosen:
            processes.send(process, signal.SIGKILL)
        pids = ", ".join(str(process.pid) for process in filesystem)
        tell(f"      killed corrald ({corrald.pid}) and filesystem ({pids}) of node {VICTIM}")
        left = processes.wait_gone(others, 10.0)
        if left:
            raise Failed(f"processes {[process.pid for process in left]} of node {VICTIM} were not fenced")
        tell(f"      the fence agent killed what else it ran: pid {', '.join(str(p.pid) for p in others)}")

    def _show_recovery(self) -> None:
        histories = [
            self._ask(node, "history", since=self._killed_at) for node in range(1, NODES + 1) if node != VICTIM
        ]

        def told(kind: str, *words: str) -> list[int]:
            """When each survivor that tells it told it first."""
            found = []
            for history in histories:
                times = [int(at) for at, what, text in history if what == kind and all(word in text for word in words)]
                found += times[:1]
            return found

        phases = [
            ("failure detected", min(told("link", f"node {VICTIM}", "down"), default=None)),
            ("new view", max(told("view", "quorate"), default=None)),
            ("fenced", max(told("fence", f"node {VICTIM} fenced"), default=None)),
            ("locks recovered", max(told("round", "dlm:", "has recovered"), default=None)),
            ("journal replayed", max(told("round", "gfs:", "has recovered"), default=None)),
        ]
        for name, at in phases:
            if at is None:
                raise Failed(f"the survivors never said: {name}")
            self._row(name, f"{(at - self._killed_at) / 1e6:.0f} ms after the kill")
        acknowledged = self._writers.acknowledged
        survivors = [name for name in sorted(acknowledged.at) if not name.startswith(f"n{VICTIM}")]
        ended, pause = acknowledged.longest_pause(survivors, self._killed_at)
        if not pause:
            raise Failed("no survivor acknowledged anything after the kill")
        self._row("longest pause of a surviving writer", f"{pause / 1e6:.0f} ms")
        self._row("it wrote again", f"{(ended - self._killed_at) / 1e6:.0f} ms after the kill")

    def _return_and_check(self) -> None:
        cluster = self._cluster
        began = time.monotonic()
        cluster.start(VICTIM)
        cluster.wait_ready(range(1, NODES + 1))
        self._reach.join(VICTIM)
        self._row("node 3 is back", f"{time.monotonic() - began:.1f} s")
        found = self._directory / "found"
        self._run(VICTIM, "fetch", "work", str(found))
        acknowledged = self._writers.acknowledged
        self._row("acknowledged and there", acknowledged.check_counters(found, in_flight=NODES))
        self._row("acknowledged and there", acknowledged.check_log(found / "log"))
        self._compare(VICTIM, "compared again through node 3")

    def _finish(self) -> None:
        for node in range(1, NODES + 1):
            self._reach.leave(node)
        self._row("fsck", self._cluster.fsck())
        self._cluster.down()


def main(directory: Path, results: int, options: list[str]) -> None:
    with os.fdopen(results, "w") as out:

        def put(*words: str) -> None:
            out.write(json.dumps(words) + "\n")
            out.flush()

        demo = Demo(
            directory,
            lambda what, result: put("row", what, result),
            fuse=NO_FUSE_OPTION not in options,
            quick=QUICK_OPTION in options,
        )
        try:
            demo.run()
        except (Failed, ClusterError, OSError, subprocess.SubprocessError) as error:
            put("end", str(error) or type(error).__name__)
        else:
            put("end", "")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
