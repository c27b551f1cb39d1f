"""The mounts of a local cluster: one process a node, found by its pid file and by the kernel's table of mounts."""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

from corral.base.errors import ClusterError
from corral.base.ids import NodeId
from corral.cli import processes
from corral.cli.layout import Layout
from corral.fuse.mounting import abort_connection, mounted_at

MOUNT_SECONDS: Final = 20.0


@final
class Mounts:
    def __init__(self, layout: Layout, enter: processes.Enter = processes.here) -> None:
        self._layout = layout
        self._enter = enter

    def is_mounted(self, node: NodeId) -> bool:
        return mounted_at(str(self._layout.node(node).mount)) is not None

    def were_there(self, node: NodeId) -> bool:
        """This node has been mounted in the life of this cluster."""
        return self._layout.node(node).mount.is_dir() and self._layout.disk.exists()

    def mount(self, node: NodeId) -> None:
        """Returns when it is mounted. Raises ClusterError with the mount's own last sentence."""
        files = self._layout.node(node)
        if self.is_mounted(node) and processes.read_pid_file(files.mount_pid) is not None:
            return
        self.clear_dead(node)
        files.mount.mkdir(exist_ok=True)
        start_mount(
            str(files.socket), self._layout.disk, files.mount,
            log=files.mount_log, pid_file=files.mount_pid, enter=self._enter(node),
        )  # fmt: skip

    def unmount(self, node: NodeId) -> None:
        """Cleanly if its process answers, by force otherwise."""
        process = processes.read_pid_file(self._layout.node(node).mount_pid)
        if process is not None:
            processes.end([process])
        self.clear_dead(node)

    def clear_dead(self, node: NodeId) -> None:
        """Takes away a mount whose process is gone. By force: what still waits in it is answered with an error."""
        files = self._layout.node(node)
        mounted = mounted_at(str(files.mount))
        if mounted is not None and processes.read_pid_file(files.mount_pid) is None:
            abort_connection(mounted)


def start_mount(
    socket: str, device: Path, mountpoint: Path, *, log: Path, pid_file: Path, enter: Sequence[str] = ()
) -> None:
    """Returns when it is mounted. Raises ClusterError with the mount's own last sentence."""
    argv = [
        *enter, sys.executable, "-m", "corral.cli.main", "--socket", socket, "gfs", "mount",
        str(device), str(mountpoint), "--foreground",
    ]  # fmt: skip
    log.write_bytes(b"")
    process = processes.spawn(argv, log=log, pid_file=pid_file)
    deadline = time.monotonic() + MOUNT_SECONDS
    while mounted_at(str(mountpoint)) is None:
        if not processes.is_alive(process):
            raise ClusterError(f"{mountpoint} is not mounted: {last_line(log)}")
        if time.monotonic() > deadline:
            raise ClusterError(f"{mountpoint} was not mounted in {MOUNT_SECONDS:g} s; see {log}")
        time.sleep(0.02)


def mount_in_background(socket: str, device: Path, mountpoint: Path) -> None:
    """`corral gfs mount`: log and pid file in a temporary directory named on failure."""
    directory = Path(tempfile.mkdtemp(prefix="corral-mount-"))
    start_mount(socket, device, mountpoint, log=directory / "log", pid_file=directory / "pid")


def last_line(path: Path) -> str:
    """The last sentence a process logged."""
    try:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return f"see {path}"
    return lines[-1].removeprefix("corral: ").removeprefix("corrald: ") if lines else f"see {path}"
