"""A local cluster with mounts for stories: faults by name, applications that count what they were told is durable."""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from corral.base.errors import ClusterError
from corral.cli import processes
from corral.cli.demo import worker
from corral.cli.demo.applications import Writers
from corral.cli.demo.checks import Failed
from corral.cli.layout import Layout, make
from corral.cli.localcluster import LocalCluster, ask
from corral.node.config import ClusterConfig, write

DETECT = 0.5
RECOVER = 5 * DETECT
HANG_SECONDS = 10.0
PATIENCE = 30.0  # seconds; a story that is well takes a fraction of it, also on a busy machine


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)


class Mounted:
    """Three nodes, each with the filesystem mounted."""

    def __init__(
        self,
        root: Path,
        *,
        size: int = 256 << 20,
        change: Callable[[ClusterConfig], ClusterConfig] = lambda config: config,
        enter: processes.Enter = processes.here,
    ) -> None:
        self.layout = Layout(root)
        self.config = change(make(self.layout, 3, detect=DETECT))
        write(self.config, self.layout.config)
        self.cluster = LocalCluster(self.layout, self.config, lambda _: None, enter=enter)
        self.size = size
        self._stories = 0

    # -- looking

    def ask(self, node: int, what: str, **arguments: Any) -> Any:
        return asyncio.run(ask(str(self.layout.node(node).socket), what, **arguments))

    def status(self, node: int) -> dict[str, Any]:
        try:
            return dict(self.ask(node, "cman.status"))
        except ClusterError:
            return {"members": [], "active": False, "quorate": False, "epoch": 0}

    def wait(self, node: int, members: list[int]) -> dict[str, Any]:
        """Until this node is in an active view of exactly these."""

        def there() -> dict[str, Any] | None:
            status = self.status(node)
            return status if status["members"] == members and status["active"] else None

        return dict(until(there, f"node {node} to be in an active view of {members}"))

    def wait_view(self, node: int, members: list[int]) -> None:
        """Until this node is in a view of exactly these, active or not: the others may still have to be fenced."""
        until(lambda: self.status(node)["members"] == members, f"node {node} to be in a view of {members}")

    def told(self, node: int, since: int = 0) -> list[str]:
        """What a node said happened."""
        return [text for _at, _kind, text in self.ask(node, "history", since=since)]

    def mount(self, node: int) -> Path:
        return self.layout.node(node).mount

    def mount_process(self, node: int) -> processes.ProcessId | None:
        return processes.read_pid_file(self.layout.node(node).mount_pid)

    # -- whole again

    def restore(self) -> None:
        """Every node a member, every mount there."""
        for node in self.config.node_ids:
            self.start(node)
        self.cluster.wait_ready(self.config.node_ids)
        if not self.layout.disk.exists():
            self.cluster.mount_all(self.size)
        for node in self.config.node_ids:
            self.mount_again(node)

    def start(self, node: int) -> None:
        self.cluster.start(node)

    def mount_again(self, node: int) -> None:
        self.cluster.mounts.mount(node)

    def end(self) -> None:
        for node in self.config.node_ids:
            for process in self.cluster.participants(node):
                processes.send(process, processes.signal.SIGCONT)
            self.cluster.resume(node)
        self.cluster.abandon()

    # -- applications

    @contextlib.contextmanager
    def work(self, seconds: float = 60.0) -> Iterator["Work"]:
        """On every node one application that appends to a shared log and one that adds to shared counters."""
        self._stories += 1
        work = Work(self, f"story{self._stories}")
        try:
            work.begin(seconds)
            yield work
        except BaseException:
            self._keep(work, "failed")
            work.writers.kill()
            if work.writers.still_running(HANG_SECONDS):
                self._keep(work, "hanging")
                self.end()  # who waits for a mount ends only when that does
            raise
        finally:
            work.writers.end()

    def _keep(self, work: "Work", how: str) -> None:
        """What a story that failed leaves to look at: the logs, and where in the kernel its applications are."""
        directory = self.layout.root / f"{how}-{work.name}"
        self.cluster.keep_logs(directory)
        with (directory / "applications").open("w") as file:
            for name, process in work.writers.processes.items():
                for stack in sorted(Path(f"/proc/{process.pid}").glob("task/*/stack")):
                    with contextlib.suppress(OSError):
                        file.write(f"{name} {process.poll()}\n{stack.read_text()}\n")
            for node in self.config.node_ids:
                for mount in self.cluster.participants(node):
                    for stack in sorted(Path(f"/proc/{mount.pid}").glob("task/*/stack")):
                        with contextlib.suppress(OSError):
                            file.write(f"node {node} {mount.pid} {stack}\n{stack.read_text()}\n")


class Work:
    def __init__(self, mounted: Mounted, name: str) -> None:
        self._mounted = mounted
        self.name = name
        self.writers = Writers()

    def begin(self, seconds: float) -> None:
        """Returns when every application has done something."""
        directory = self._mounted.mount(1) / self.name
        directory.mkdir()
        for number in range(worker.COUNTERS):
            (directory / f"counter{number}").write_bytes(bytes(8))
        (directory / "log").write_bytes(b"")
        nodes = self._mounted.config.node_ids
        for node in nodes:
            reach = ["mounted", str(self._mounted.mount(node))]
            self.writers.start(f"n{node}c", reach, "counters", self.name, f"n{node}c", str(seconds))
            self.writers.start(f"n{node}l", reach, "append", self.name, f"n{node}l", str(seconds))
        self.goes_on(*nodes)

    def goes_on(self, *nodes: int) -> None:
        """Both applications of each of these nodes are told of new work done."""
        names = [f"n{node}{kind}" for node in nodes for kind in "cl"]
        before = {name: len(self.writers.acknowledged.at.get(name, [])) for name in names}
        end = time.monotonic() + PATIENCE
        while missing := [name for name in names if len(self.writers.acknowledged.at.get(name, [])) <= before[name]]:
            assert time.monotonic() < end, f"{missing} do nothing: {self.writers.acknowledged.stopped}"
            self.writers.read_for(0.1)

    def stopped(self, node: int) -> None:
        """Both applications of this node have been told of an error."""
        names = {f"n{node}c", f"n{node}l"}
        end = time.monotonic() + PATIENCE
        while not names <= set(self.writers.acknowledged.stopped):
            assert time.monotonic() < end, f"of {names} only {self.writers.acknowledged.stopped} stopped"
            self.writers.read_for(0.1)

    def check(self, node: int) -> None:
        """Through this node's mount: nothing acknowledged is lost, no increment was made by two at once."""
        self.writers.read_for(0.1)
        for process in self.writers.processes.values():
            if process.poll() is None:
                process.kill()
        end = time.monotonic() + PATIENCE
        while self.writers.still_running(10):
            assert time.monotonic() < end, f"{self.writers.still_running(10)} cannot be ended: they hang in a mount"
            self.writers.read_for(0.1)
        self.writers.read_for(0.1)
        directory = self._mounted.mount(node) / self.name
        assert self.writers.acknowledged.total
        self.writers.acknowledged.check_counters(directory, in_flight=len(self.writers.processes))
        try:
            self.writers.acknowledged.check_log(directory / "log")
        except Failed as error:
            (self._mounted.layout.root / "bad-log").write_bytes((directory / "log").read_bytes())
            raise Failed(f"{error}; the log is kept in {self._mounted.layout.root}/bad-log") from None

    def records_of(self, node: int, through: int) -> int:
        """How many records that node's application has in the log, as another node sees it."""
        name = f"n{node}l ".encode()
        content = (self._mounted.mount(through) / self.name / "log").read_bytes()
        return sum(line.startswith(name) for line in content.split(b"\n"))


def can_mount() -> bool:
    return os.geteuid() == 0 and os.path.exists("/dev/fuse")
