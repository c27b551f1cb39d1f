"""How the demo's applications reach the shared files: system calls on a mount, or corral's library without FUSE.

The story and its applications are the same either way. What differs is here: what has to be there before a node's
applications can work, what they are told on their command line, and which processes are the filesystem on a node.
"""

from typing import Final, Protocol, final

from corral.base.ids import NodeId
from corral.base.world import ProcessId
from corral.cli import images, processes
from corral.cli.localcluster import LocalCluster

JOURNALS: Final = 12  # one for each process that has the filesystem open, also while a dead one's is recovered


class Reach(Protocol):
    """One way to reach files on every node of a cluster."""

    @property
    def summary(self) -> str:
        """One line for the table."""

    def prepare(self, size: int) -> None:
        """A fresh filesystem of `size` bytes; every node can use it."""

    def join(self, node: NodeId) -> None:
        """A node that has come back can use it again."""

    def leave(self, node: NodeId) -> None:
        """Everything durable and let go on this node."""

    def arguments(self, node: NodeId) -> list[str]:
        """What an application on that node is told, and gives to `open_files`."""

    def processes(self, node: NodeId, applications: list[ProcessId]) -> list[ProcessId]:
        """Those that write to the disk on this node, where these applications run."""


@final
class Mounted:
    """Through the kernel: one mount a node, applications that know nothing of corral."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster

    @property
    def summary(self) -> str:
        return f"{len(self._cluster.config.nodes)}, opened O_DIRECT"

    def prepare(self, size: int) -> None:
        self._cluster.mount_all(size)

    def join(self, node: NodeId) -> None:
        self._cluster.mounts.mount(node)

    def leave(self, node: NodeId) -> None:
        self._cluster.mounts.unmount(node)

    def arguments(self, node: NodeId) -> list[str]:
        return ["mounted", str(self._cluster.layout.node(node).mount)]

    def processes(self, node: NodeId, applications: list[ProcessId]) -> list[ProcessId]:
        mount = processes.read_pid_file(self._cluster.layout.node(node).mount_pid)
        return [mount] if mount is not None else []


@final
class Library:
    """Through `corral.open_filesystem`: every application is a participant of the cluster itself."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster

    @property
    def summary(self) -> str:
        return "none: each application opens the image itself, O_DIRECT"

    def prepare(self, size: int) -> None:
        images.mkfs(self._cluster.layout.disk, size, cluster=self._cluster.config.name, name="home", journals=JOURNALS)

    def join(self, node: NodeId) -> None:
        """Each application does it for itself."""

    def leave(self, node: NodeId) -> None:
        """Each application did it when it ended."""

    def arguments(self, node: NodeId) -> list[str]:
        return ["library", str(self._cluster.layout.node(node).socket), str(self._cluster.layout.disk)]

    def processes(self, node: NodeId, applications: list[ProcessId]) -> list[ProcessId]:
        return applications
