"""The mounts of a local cluster: one process a node, found by its pid file and by the kernel's table of mounts."""

import sys
import time
from pathlib import Path
from typing import Final, final

from corral.base.errors import ClusterError
from corral.base.ids import NodeId
from corral.cli import processes
from corral.cli.layout import Layout
from corral.fuse.mounting import mounted_at, unmount

MOUNT_SECONDS: Final = 20.0


@final
class Mounts:
    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def is_mounted(self, node: NodeId) -> bool:
        return mounted_at(str(self._layout.node(node).mount)) is not None

    def mount(self, node: NodeId, *options: str) -> None:
        """Returns when it is mounted. Raises ClusterError with the mount's own last sentence."""
        files = self._layout.node(node)
        if self.is_mounted(node) and processes.read_pid_file(files.mount_pid) is not None:
            return
        self.clear_dead(node)
        files.mount.mkdir(exist_ok=True)
        argv = [
            sys.executable, "-m", "corral.cli.main", "--socket", str(files.socket), "gfs", "mount",
            str(self._layout.disk), str(files.mount), "--foreground", *options,
        ]  # fmt: skip
        files.mount_log.write_bytes(b"")
        process = processes.spawn(argv, log=files.mount_log, pid_file=files.mount_pid)
        deadline = time.monotonic() + MOUNT_SECONDS
        while not self.is_mounted(node):
            if not processes.is_alive(process):
                raise ClusterError(f"the mount of node {node} ended: {last_line(files.mount_log)}")
            if time.monotonic() > deadline:
                raise ClusterError(f"node {node} did not mount in {MOUNT_SECONDS:g} s; see {files.mount_log}")
            time.sleep(0.02)

    def unmount(self, node: NodeId) -> None:
        """Cleanly if its process answers, by force otherwise."""
        process = processes.read_pid_file(self._layout.node(node).mount_pid)
        if process is not None:
            processes.end([process])
        self.clear_dead(node)

    def clear_dead(self, node: NodeId) -> None:
        """Takes away a mount whose process is gone."""
        files = self._layout.node(node)
        if self.is_mounted(node) and processes.read_pid_file(files.mount_pid) is None:
            unmount(str(files.mount), lazy=True)


def last_line(path: Path) -> str:
    """The last sentence a process logged."""
    try:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return f"see {path}"
    return lines[-1] if lines else f"see {path}"
