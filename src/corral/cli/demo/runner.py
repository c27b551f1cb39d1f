"""The steps of the demo, in order. Every wait has a bound; whatever happens, nothing is left running or mounted."""

import asyncio
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final, final

from corral.base.errors import ClusterError
from corral.base.ids import NodeId
from corral.cli import processes
from corral.cli.demo import checks, worker
from corral.cli.demo.checks import Acknowledged, Failed
from corral.cli.layout import Layout, make
from corral.cli.localcluster import LocalCluster, ask

NODES: Final = 3
VICTIM: Final = 3
DISK_SIZE: Final = 512 << 20
WORK_SECONDS: Final = 12.0
KILL_AFTER: Final = 4.0
FOLLOW_SECONDS: Final = 120.0
EXIT_SECONDS: Final = 10.0


class Interrupted(Exception):
    """SIGINT or SIGTERM: clean up and say so."""


@final
class Writers:
    """The demo's applications: processes whose acknowledgements come over pipes."""

    def __init__(self) -> None:
        self.acknowledged = Acknowledged()
        self.processes: Final[dict[str, subprocess.Popen[bytes]]] = {}
        self._selector = selectors.DefaultSelector()
        self._tails: dict[str, bytes] = {}

    def start(self, name: str, *arguments: str) -> None:
        process = subprocess.Popen(
            [sys.executable, worker.__file__, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self.processes[name] = process
        self._tails[name] = b""
        self._selector.register(process.stdout, selectors.EVENT_READ, name)

    def read_for(self, seconds: float) -> None:
        """Takes acknowledgements until the time is over or every writer has ended."""
        end = time.monotonic() + seconds
        while self._selector.get_map() and (left := end - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                self._take(key.data, key.fileobj)

    def _take(self, name: str, stream: Any) -> None:
        data = stream.read()
        if data == b"":
            self._selector.unregister(stream)
            stream.close()
            return
        lines = (self._tails[name] + (data or b"")).split(b"\n")
        self._tails[name] = lines.pop()
        for line in lines:
            self.acknowledged.take(name, line.decode("utf-8", "replace"))

    def still_running(self, seconds: float) -> list[str]:
        """Those that have not ended in that time: a process that closed its pipe still needs a moment to exit."""
        end = time.monotonic() + seconds
        while True:
            running = sorted(name for name, process in self.processes.items() if process.poll() is None)
            if not running or time.monotonic() > end:
                return running
            time.sleep(0.05)

    def kill(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()

    def end(self) -> None:
        for process in self.processes.values():
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._selector.close()


@final
class Demo:
    def __init__(self, directory: Path, tell: Any) -> None:
        self.root: Final = directory
        self.layout: Final = Layout(directory / "cluster")
        self.source: Final = directory / "source"
        self.rows: list[tuple[str, str]] = []
        self._tell = tell
        self._writers = Writers()
        self._followers: list[subprocess.Popen[bytes]] = []
        self._cluster: LocalCluster | None = None
        self._killed_at = 0

    # -- the steps

    def run(self) -> None:
        """Raises Failed or ClusterError with what went wrong."""
        began = time.monotonic()
        self._step(1, "three daemons become a cluster")
        cluster = self._cluster = LocalCluster(self.layout, make(self.layout, NODES), self._tell)
        cluster.up()
        self._show_view()
        self._step(2, "one disk image, made and mounted three times")
        cluster.mount_all(DISK_SIZE)
        self._row("mounts of one image", f"{NODES}, opened O_DIRECT")
        self._step(3, "a tree goes in through node 1 while node 2 reads behind it")
        self._copy_tree()
        self._step(4, "all nodes write under locks; in the middle node 3 is killed with -9")
        self._work_and_kill()
        self._step(5, "node 3 comes back, everything acknowledged is there")
        self._return_and_check()
        self._step(6, "unmount and check the filesystem")
        self._finish()
        self._row("all of it", f"{time.monotonic() - began:.1f} s")

    def _step(self, number: int, what: str) -> None:
        self._tell(f"[{number}/6] {what}")

    def _row(self, what: str, result: str) -> None:
        self.rows.append((what, result))
        self._tell(f"      {what}: {result}")

    def _mount(self, node: NodeId) -> Path:
        return self.layout.node(node).mount

    def _ask(self, node: NodeId, what: str, **arguments: Any) -> Any:
        return asyncio.run(ask(str(self.layout.node(node).socket), what, **arguments))

    def _show_view(self) -> None:
        status = self._ask(1, "cman.status")
        members = ", ".join(map(str, status["members"]))
        self._row("view", f"{status['epoch']}.{status['coordinator']} of nodes {members}, quorate, active")
        if status["members"] != list(range(1, NODES + 1)) or not status["quorate"] or not status["active"]:
            raise Failed(f"the cluster is not what it should be: {status}")

    def _copy_tree(self) -> None:
        tree = checks.make_source(self.source)
        self._row("tree", f"{tree.files} files, {tree.directories} directories, {tree.size / 1e6:.1f} MB")
        (self._mount(1) / "tree").mkdir()
        follower = subprocess.Popen(
            [sys.executable, worker.__file__, "follow", str(self._mount(2) / "tree"), str(tree.files)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._followers.append(follower)
        began = time.monotonic()
        checks.copy(self.source, self._mount(1) / "tree", lambda _count: None)
        took = time.monotonic() - began
        self._row("copied in", f"{took:.1f} s, {tree.files / took:.0f} files/s, {tree.size / took / 1e6:.0f} MB/s")
        try:
            output, _ = follower.communicate(timeout=FOLLOW_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failed(f"node 2 has not seen every file after {FOLLOW_SECONDS:g} s") from None
        if follower.returncode or not output.startswith(b"followed"):
            raise Failed(f"node 2, reading behind, stopped: {output.decode(errors='replace').strip()[-300:]}")
        for node in (2, 3):
            began = time.monotonic()
            count = checks.compare(self.source, self._mount(node) / "tree", f"node {node}")
            self._row(f"compared through node {node}", f"{count} files the same ({time.monotonic() - began:.1f} s)")

    def _work_and_kill(self) -> None:
        assert self._cluster is not None
        work = self._mount(1) / "work"
        work.mkdir()
        for number in range(worker.COUNTERS):
            (work / f"counter{number}").write_bytes(bytes(8))
        (work / "log").write_bytes(b"")
        for node in range(1, NODES + 1):
            directory = str(self._mount(node) / "work")
            self._writers.start(f"n{node}c", "counters", directory, f"n{node}c", str(WORK_SECONDS))
            self._writers.start(f"n{node}l", "append", directory, f"n{node}l", str(WORK_SECONDS))
        self._writers.read_for(KILL_AFTER)
        before = self._writers.acknowledged.total
        if before == 0:
            raise Failed(f"nothing was acknowledged in {KILL_AFTER:g} s: {self._writers.acknowledged.stopped}")
        self._kill_victim()
        self._writers.read_for(WORK_SECONDS - KILL_AFTER + 20)
        hanging = self._writers.still_running(EXIT_SECONDS)
        if hanging:
            raise Failed(f"writers {', '.join(hanging)} hang")
        self._show_recovery()

    def _kill_victim(self) -> None:
        """corrald and mount of one node die at one moment; its lock service is left to the fence agent."""
        assert self._cluster is not None
        files = self.layout.node(VICTIM)
        corrald, mount = processes.read_pid_file(files.pid), processes.read_pid_file(files.mount_pid)
        others = [p for p in processes.read_participants(files.participants) if p not in (corrald, mount)]
        self._killed_at = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        for process in (corrald, mount):
            if process is not None:
                processes.send(process, signal.SIGKILL)
        self._tell(
            f"      killed corrald ({corrald and corrald.pid}) and mount ({mount and mount.pid}) of node {VICTIM}"
        )
        left = processes.wait_gone(others, 10.0)
        if left:
            raise Failed(f"processes {[process.pid for process in left]} of node {VICTIM} were not fenced")
        self._tell(f"      the fence agent killed what else it ran: pid {', '.join(str(p.pid) for p in others)}")

    def _show_recovery(self) -> None:
        happenings = self._ask(1, "history", since=self._killed_at)

        def first(kind: str, *words: str) -> int | None:
            for at, what, text in happenings:
                if what == kind and all(word in text for word in words):
                    return int(at)
            return None

        phases = [
            ("failure detected", first("link", f"node {VICTIM}", "down")),
            ("new view", first("view", "quorate")),
            ("fenced", first("fence", f"node {VICTIM} fenced")),
            ("locks recovered", first("round", "dlm:", "has recovered")),
            ("journal replayed", first("round", "gfs:", "has recovered")),
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
        assert cluster is not None
        began = time.monotonic()
        cluster.start(VICTIM)
        cluster.wait_ready(range(1, NODES + 1))
        cluster.mounts.mount(VICTIM)
        self._row("node 3 is back, mounted", f"{time.monotonic() - began:.1f} s")
        acknowledged = self._writers.acknowledged
        work = self._mount(VICTIM) / "work"
        self._row("acknowledged and there", acknowledged.check_counters(work, in_flight=NODES))
        self._row("acknowledged and there", acknowledged.check_log(work / "log"))
        count = checks.compare(self.source, self._mount(VICTIM) / "tree", f"node {VICTIM}")
        self._row("compared through the new mount", f"{count} files the same")

    def _finish(self) -> None:
        cluster = self._cluster
        assert cluster is not None
        for node in range(1, NODES + 1):
            cluster.mounts.unmount(node)
        report = cluster.fsck()
        self._row("fsck", report)
        cluster.down()

    # -- the end

    def clean_up(self) -> None:
        """Nothing of the demo is left: no process, mount, socket or file."""
        for follower in self._followers:
            if follower.poll() is None:
                follower.kill()
        self._writers.kill()
        # Who waits for a mount ends only when that does.
        if self._cluster is not None:
            self._cluster.abandon()
        self._writers.end()
        for follower in self._followers:
            follower.wait()
            if follower.stdout is not None:
                follower.stdout.close()
        shutil.rmtree(self.root, ignore_errors=True)


def run(tell: Any, keep: Path | None = None) -> tuple[list[tuple[str, str]], str]:
    """The rows of the summary, and what failed ("" for nothing)."""
    directory = Path(tempfile.mkdtemp(prefix="corral-demo-", dir="/var/tmp"))
    demo = Demo(directory, tell)

    def interrupt(_number: int, _frame: Any) -> None:
        raise Interrupted

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    failed = ""
    try:
        demo.run()
    except Interrupted:
        failed = "interrupted"
    except (Failed, ClusterError, OSError, subprocess.SubprocessError) as error:
        failed = str(error) or type(error).__name__
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # the cleaning up itself is not to be interrupted
        if failed and keep is not None:
            LocalCluster(demo.layout, make(demo.layout, NODES), tell).keep_logs(keep)
        demo.clean_up()
        for number, handler in before.items():
            signal.signal(number, handler)
    return demo.rows, failed
