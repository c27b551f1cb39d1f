"""A whole cluster on this machine: what `corral up`, `down` and `node` do.

Everything started runs in the background, is found again through pid files, and is ended for good by `down`, also after
crashes. Waiting always has a bound and says what it waited for.
"""

import asyncio
import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, final

from corral.base.errors import ClusterError
from corral.base.ids import NodeId
from corral.base.world import ProcessId
from corral.cli import images, processes
from corral.cli.layout import Layout, NodeFiles
from corral.cli.mounts import Mounts, last_line
from corral.node.config import ClusterConfig
from corral.providers.client import CorraldClient
from corral.real.world import RealWorld

READY_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.05

Progress = Callable[[str], None]


async def ask(socket: str, what: str, **arguments: Any) -> Any:
    """One question to the corrald at that socket."""
    world = RealWorld("/nonexistent")  # no state is kept by a caller
    client = CorraldClient(world, socket)
    try:
        await client.open()
        return await client.ask(what, **arguments)
    finally:
        client.close()
        await world.close()


@final
class LocalCluster:
    def __init__(
        self,
        layout: Layout,
        config: ClusterConfig,
        progress: Progress,
        *,
        enter: processes.Enter = processes.here,
    ) -> None:
        self.layout: Final = layout
        self.config: Final = config
        self.mounts: Final = Mounts(layout, enter)
        self._progress = progress
        self._enter = enter

    # -- one node

    def files(self, node: NodeId) -> NodeFiles:
        self.config.node(node)  # raises with the nodes there are
        return self.layout.node(node)

    def corrald(self, node: NodeId) -> ProcessId | None:
        return processes.read_pid_file(self.files(node).pid)

    def participants(self, node: NodeId) -> list[ProcessId]:
        return processes.read_participants(self.files(node).participants)

    def start(self, node: NodeId) -> bool:
        """Starts its corrald, having cleared what a dead life left. False when it runs already."""
        files = self.files(node)
        if self.corrald(node) is not None:
            return False
        self.mounts.clear_dead(node)
        files.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        argv = [
            *self._enter(node), sys.executable, "-m", "corral.corrald",
            "--config", str(self.layout.config), "--node", str(node),
            "--state", str(files.state), "--socket", str(files.socket),
        ]  # fmt: skip
        processes.spawn(argv, log=files.log, pid_file=files.pid)
        return True

    def stop(self, node: NodeId) -> None:
        """A clean leave: unmounts, then SIGTERM to corrald."""
        self.mounts.unmount(node)
        corrald = self.corrald(node)
        if corrald is not None:
            processes.end([corrald], grace=4 * self.config.recover_ns / 1e9)
        self._sweep(node)

    def kill(self, node: NodeId, only: str | None = None) -> None:
        """SIGKILL to corrald and its participants at one moment, or only to one kind."""
        for process in self._chosen(node, only):
            processes.send(process, signal.SIGKILL)
        processes.wait_gone(self._chosen(node, only), processes.END_SECONDS)

    def pause(self, node: NodeId, only: str | None = None) -> None:
        for process in self._chosen(node, only or "corrald"):
            processes.send(process, signal.SIGSTOP)

    def resume(self, node: NodeId, only: str | None = None) -> None:
        for process in self._chosen(node, only or "corrald"):
            processes.send(process, signal.SIGCONT)

    def _chosen(self, node: NodeId, only: str | None) -> list[ProcessId]:
        corrald = self.corrald(node)
        chosen = [corrald] if corrald is not None and only in (None, "corrald") else []
        if only is None:
            chosen += self.participants(node)
        elif only == "mount":
            mount = processes.read_pid_file(self.files(node).mount_pid)
            chosen += [mount] if mount is not None else []
        return chosen

    def _sweep(self, node: NodeId) -> None:
        """What may have outlived its corrald: participants, a dead mount, the socket files."""
        processes.end(self.participants(node), grace=2.0)
        self.mounts.clear_dead(node)
        files = self.files(node)
        for path in (files.socket, files.socket.with_name("lock.sock"), files.pid, files.mount_pid):
            with contextlib.suppress(OSError):
                path.unlink()

    # -- all of them

    def up(self) -> None:
        started = [node for node in self.config.node_ids if self.start(node)]
        if started:
            self._progress(f"started corrald on node {', '.join(map(str, started))}")
        self.wait_ready(self.config.node_ids)

    def wait_ready(self, nodes: Iterable[NodeId], seconds: float = READY_SECONDS) -> None:
        """Until each of these nodes is in an active view with all of them and its lock service answers."""
        wanted = sorted(nodes)
        deadline = time.monotonic() + seconds
        told = ""
        while True:
            waits_for = self._not_ready(wanted)
            if not waits_for:
                return
            if waits_for != told:
                told = waits_for
                self._progress(f"waiting for {waits_for}")
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"after {seconds:g} s still waiting for {waits_for}; see {self.layout.root}/node*/log"
                )
            time.sleep(POLL_SECONDS)

    def _not_ready(self, wanted: list[NodeId]) -> str:
        for node in wanted:
            files = self.files(node)
            if self.corrald(node) is None:
                raise ClusterError(f"corrald of node {node} has ended: {last_line(files.log)}")
            if not files.socket.exists():
                return f"node {node} to open its socket"
            try:
                status = asyncio.run(ask(str(files.socket), "cman.status"))
            except ClusterError:
                return f"node {node} to answer"
            if not status["active"] or not set(wanted) <= set(status["members"]):
                missing = sorted(set(wanted) - set(status["members"]))
                return f"node {node} to see node {missing[0]}" if missing else f"node {node}: {status['waits_for']}"
            if not files.socket.with_name("lock.sock").exists():
                return f"the lock service of node {node}"
        return ""

    def mount_all(self, size: int) -> None:
        """Makes the filesystem when there is none, and mounts it on every node."""
        if not self.layout.disk.exists():
            self._progress(f"making a filesystem for {len(self.config.nodes)} nodes on {self.layout.disk}")
            images.mkfs(self.layout.disk, size, cluster=self.config.name, name="home", journals=len(self.config.nodes))
        for node in self.config.node_ids:
            self.mounts.mount(node)

    def fsck(self) -> str:
        """A check of the unmounted image: one line. Raises ClusterError when anything is wrong."""
        report = images.check(self.layout.disk)
        if not report.clean:
            first = report.findings[0]
            raise ClusterError(f"fsck of {self.layout.disk}: {images.summary(report)}; first: {first.message}")
        return images.summary(report)

    def down(self) -> None:
        """Unmounts, leaves cleanly where it can, and leaves nothing behind."""
        for node in self.config.node_ids:
            self.resume(node)
            for process in self.participants(node):
                processes.send(process, signal.SIGCONT)
        for node in self.config.node_ids:
            self.mounts.unmount(node)
        # One after the other, so that as many as keep a quorum behind them leave in good order.
        for node in reversed(self.config.node_ids):
            corrald = self.corrald(node)
            if corrald is not None:
                processes.end([corrald], grace=4 * self.config.recover_ns / 1e9)
        for node in self.config.node_ids:
            self._sweep(node)

    def abandon(self) -> None:
        """The hard end: everything killed, everything detached."""
        for node in self.config.node_ids:
            mount = processes.read_pid_file(self.files(node).mount_pid)
            self.kill(node)
            if mount is not None:
                processes.kill([mount])
            self._sweep(node)

    def keep_logs(self, directory: Path) -> None:
        """Every log as it is now, with what each mount waits for, which it tells its log on SIGUSR1."""
        directory.mkdir(parents=True, exist_ok=True)
        for node in self.config.node_ids:
            mount = processes.read_pid_file(self.files(node).mount_pid)
            if mount is not None:
                processes.send(mount, signal.SIGUSR1)
        time.sleep(0.5)
        for node in self.config.node_ids:
            for log in (self.files(node).log, self.files(node).mount_log):
                if log.exists():
                    shutil.copy(log, directory / f"node{node}-{log.name}")

    def status(self) -> dict[str, Any]:
        nodes: dict[str, Any] = {}
        for node in self.config.node_ids:
            files = self.files(node)
            entry: dict[str, Any] = {"running": self.corrald(node) is not None, "mounted": self.mounts.is_mounted(node)}
            if entry["running"]:
                try:
                    entry.update(asyncio.run(ask(str(files.socket), "cman.status")))
                except ClusterError as error:
                    entry["error"] = str(error)
            nodes[str(node)] = entry
        return {"cluster": self.config.name, "directory": str(self.layout.root), "nodes": nodes}
