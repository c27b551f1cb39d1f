"""Where `corral up` puts things, and how a new local cluster is made.

DIR/cluster.toml   the configuration        DIR/nodeI/corrald.sock  DIR/nodeI/mnt  DIR/nodeI/log  DIR/nodeI/pid
DIR/pki/           certificates             DIR/nodeI/state/        what node I keeps
DIR/disk.img       the shared disk
"""

import asyncio
import os
import random
import socket
import uuid
from pathlib import Path
from typing import Final, NamedTuple

from corral.api.fence import process_fencing
from corral.base.errors import ClusterError, ConfigurationError
from corral.base.ids import NO_VIEW, NodeId
from corral.base.time import Seconds, from_seconds
from corral.base.view import QuorumRecord
from corral.cman.state import first_state
from corral.cman.timing import Timing
from corral.cman.wire import RECORDS
from corral.node.config import DETECT_MAX, DETECT_MIN, NODES_MAX, ClusterConfig, NodeConfig, load, write
from corral.real import pki
from corral.real.process import machine_id
from corral.real.world import RealWorld

PORTS: Final = range(20000, 30000)  # below Linux's ephemeral ports, so that nobody is given one by chance


class NodeFiles(NamedTuple):
    """The files of one node of a local cluster."""

    root: Path

    @property
    def socket(self) -> Path:
        return self.root / "corrald.sock"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def participants(self) -> Path:
        return self.state / "participants"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def pid(self) -> Path:
        return self.root / "pid"

    @property
    def mount(self) -> Path:
        return self.root / "mnt"

    @property
    def mount_pid(self) -> Path:
        return self.root / "mount.pid"

    @property
    def mount_log(self) -> Path:
        return self.root / "mount.log"


class Layout(NamedTuple):
    root: Path

    @property
    def config(self) -> Path:
        return self.root / "cluster.toml"

    @property
    def pki(self) -> Path:
        return self.root / "pki"

    @property
    def disk(self) -> Path:
        return self.root / "disk.img"

    def node(self, node: NodeId) -> NodeFiles:
        return NodeFiles(self.root / f"node{node}")

    def load(self) -> ClusterConfig:
        if not self.config.exists():
            raise ClusterError(f"there is no cluster in {self.root}; `corral up --dir {self.root}` makes one")
        return load(self.config)


def free_port(taken: set[int]) -> int:
    """A loopback port free for TCP and UDP now."""
    for _ in range(200):
        port = random.SystemRandom().choice(PORTS)
        if port in taken:
            continue
        try:
            with (
                socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
            ):
                tcp.bind(("127.0.0.1", port))
                udp.bind(("127.0.0.1", port))
        except OSError:
            continue
        taken.add(port)
        return port
    raise ClusterError(f"no free port on 127.0.0.1 between {PORTS.start} and {PORTS.stop}; end what uses them")


def make(layout: Layout, nodes: int, *, name: str = "local", detect: Seconds = 0.5) -> ClusterConfig:
    """A new local cluster: configuration, certificates, first state. Raises ConfigurationError."""
    if not 1 <= nodes <= NODES_MAX:
        raise ConfigurationError(f"a cluster has 1 to {NODES_MAX} nodes, not {nodes}")
    if not DETECT_MIN <= detect <= DETECT_MAX:  # not a number is not either
        raise ConfigurationError(f"detect is {DETECT_MIN:g} to {DETECT_MAX:g} seconds, not {detect:g}")
    try:
        layout.root.mkdir(mode=0o755, parents=True, exist_ok=True)
        if any(layout.root.iterdir()):
            raise ClusterError(f"{layout.root} is not empty and holds no cluster; name an empty or new directory")
    except OSError as error:
        raise ClusterError(f"{layout.root} cannot be used: {error.strerror or error}") from None
    taken: set[int] = set()
    entries = tuple(NodeConfig(node, f"127.0.0.1:{free_port(taken)}", f"node{node}") for node in range(1, nodes + 1))
    config = ClusterConfig(
        name,
        str(uuid.uuid4()),
        from_seconds(detect),
        from_seconds(5 * detect),
        entries,
        process_fencing(range(1, nodes + 1), machine=machine_id()),
    )
    pki.create_authority(layout.pki, name)
    timing = Timing(config.detect_ns, config.recover_ns)
    record = QuorumRecord(NO_VIEW, tuple((entry.id, 1) for entry in entries), nodes, timing.lease_ns)
    for entry in entries:
        pki.create_node(layout.pki, entry.id)
        layout.node(entry.id).state.mkdir(mode=0o700, parents=True)
    asyncio.run(_first_states(layout, config, record))
    # Last: a directory with cluster.toml is a whole cluster.
    temporary = layout.config.with_suffix(".new")
    write(config, temporary)
    os.replace(temporary, layout.config)
    return config


async def _first_states(layout: Layout, config: ClusterConfig, record: QuorumRecord) -> None:
    for entry in config.nodes:
        world = RealWorld(str(layout.node(entry.id).state))
        try:
            await world.store("cman").replace([RECORDS.encode(first) for first in first_state(record)])
        finally:
            await world.close()
