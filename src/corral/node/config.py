"""The cluster's configuration: one TOML file, the same on every node.

[cluster]
name = "home"
uuid = "7d0a…"            # made by `corral init` and `corral up`
detect = 2.0              # seconds until a silent node counts as failed; every timer derives from it
recover = 10.0            # bounds a round, a stalled participant, a flapping link; default 5 x detect

[[node]]
id = 1
name = "alpha"
address = "192.0.2.1:7400"

[fence]                   # see docs/guide/fencing.md
"""

import ipaddress
import tomllib
import uuid as uuid_module
from pathlib import Path
from typing import Any, Final, final

import msgspec
import tomlkit

from corral.api.fence import FenceConfig, parse_fencing
from corral.base.errors import ConfigurationError
from corral.base.ids import NODE_MAX, NodeId
from corral.base.time import Nanoseconds, Seconds, from_seconds

NODES_MAX: Final = 32
FILE_MAX: Final = 1 << 20
DETECT_MIN: Final = 0.1
DETECT_MAX: Final = 120.0
CLUSTER_NAME_MAX: Final = 32


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: NodeId
    address: str
    name: str = ""

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]


class _ClusterTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    uuid: str
    detect: Seconds = 2.0
    recover: Seconds | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cluster: _ClusterTable
    node: list[NodeConfig]
    fence: dict[str, Any] = {}


@final
class ClusterConfig(msgspec.Struct, frozen=True):
    """Checked: whoever has one may rely on it."""

    name: str
    uuid: str
    detect_ns: Nanoseconds
    recover_ns: Nanoseconds
    nodes: tuple[NodeConfig, ...]
    fence: FenceConfig

    def node(self, node: NodeId) -> NodeConfig:
        for entry in self.nodes:
            if entry.id == node:
                return entry
        known = ", ".join(str(entry.id) for entry in self.nodes)
        raise ConfigurationError(f"node {node} is not in the configuration of cluster {self.name}; it has {known}")

    @property
    def node_ids(self) -> tuple[NodeId, ...]:
        return tuple(entry.id for entry in self.nodes)


def load(path: Path) -> ClusterConfig:
    """Reads and checks. Raises ConfigurationError with file, key, cause and accepted values."""
    try:
        size = path.stat().st_size
        if size > FILE_MAX:
            raise ConfigurationError(f"{path} has {size} bytes; a cluster configuration has at most {FILE_MAX}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigurationError(f"{path} does not exist; `corral up --dir DIR` makes a cluster to try") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    return parse(text, str(path))


def parse(text: str, source: str) -> ClusterConfig:
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also: a number of more digits than int() takes
        raise ConfigurationError(f"{source} is not TOML: {error}") from None
    try:
        file = msgspec.convert(table, _File)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{source}: {error}") from None
    return _checked(file, source)


def _checked(file: _File, source: str) -> ClusterConfig:
    cluster = file.cluster

    def require(condition: bool, key: str, accepted: str, got: object) -> None:
        if not condition:
            raise ConfigurationError(f"{source}: {key}: expected {accepted}, got {got!r}")

    name = cluster.name
    plain = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    require(
        plain and len(name) <= CLUSTER_NAME_MAX,
        "cluster.name",
        f"1 to {CLUSTER_NAME_MAX} letters, digits, - and _",
        name,
    )
    require(_is_uuid(cluster.uuid), "cluster.uuid", "a UUID such as uuidgen prints", cluster.uuid)
    require(
        DETECT_MIN <= cluster.detect <= DETECT_MAX,
        "cluster.detect",
        f"{DETECT_MIN} to {DETECT_MAX} seconds",
        cluster.detect,
    )
    recover = 5 * cluster.detect if cluster.recover is None else cluster.recover
    require(2 * cluster.detect <= recover <= 3600, "cluster.recover", "2 x detect to 3600 seconds", recover)
    require(1 <= len(file.node) <= NODES_MAX, "node", f"1 to {NODES_MAX} tables", len(file.node))
    nodes = sorted(file.node, key=lambda node: node.id)
    ids: set[NodeId] = set()
    addresses: set[str] = set()
    for node in nodes:
        require(1 <= node.id <= NODE_MAX, "node.id", f"1 to {NODE_MAX}", node.id)
        require(node.id not in ids, "node.id", "ids that differ", f"{node.id} twice")
        require(_is_address(node.address), f"node {node.id}.address", "HOST:PORT, an IPv6 host in []", node.address)
        require(node.address not in addresses, "node.address", "addresses that differ", f"{node.address} twice")
        ids.add(node.id)
        addresses.add(node.address)
    try:
        fence = parse_fencing(file.fence, sorted(ids))
    except ConfigurationError as error:
        raise ConfigurationError(f"{source}: {error}") from None
    return ClusterConfig(name, cluster.uuid, from_seconds(cluster.detect), from_seconds(recover), tuple(nodes), fence)


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid_module.UUID(text)) == text.lower()
    except ValueError:
        return False


def _is_address(text: str) -> bool:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or len(port) > 5 or not 1 <= int(port) <= 65535:
        return False
    if host.startswith("[") and host.endswith("]"):
        try:
            return ipaddress.ip_address(host[1:-1]).version == 6
        except ValueError:
            return False
    return 0 < len(host) <= 253 and all(c.isascii() and (c.isalnum() or c in "-._") for c in host)


def write(config: ClusterConfig, path: Path) -> None:
    """Writes a file that `load` reads back as the same configuration."""
    document = tomlkit.document()
    cluster = tomlkit.table()
    cluster["name"] = config.name
    cluster["uuid"] = config.uuid
    cluster["detect"] = config.detect_ns / 1e9
    cluster["recover"] = config.recover_ns / 1e9
    document["cluster"] = cluster
    nodes = tomlkit.aot()
    for node in config.nodes:
        table = tomlkit.table()
        table["id"] = node.id
        table["address"] = node.address
        if node.name:
            table["name"] = node.name
        nodes.append(table)
    document["node"] = nodes
    fence = msgspec.to_builtins(config.fence, str_keys=True)
    document["fence"] = tomlkit.item(fence)
    path.write_text(tomlkit.dumps(document), encoding="utf-8")
