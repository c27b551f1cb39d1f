"""Which node of which cluster a certificate names, and what a node shows to others.

A node's certificate carries one subjectAltName, the URI `corral://CLUSTER/node/N` (CLUSTER percent-encoded). It says
nothing about addresses, so a node may move. Apart from `pki`, because making and loading certificates needs a large
library, and a process that only talks over local sockets does not.
"""

import ssl
from typing import Any, Final, final
from urllib.parse import quote, unquote

from corral.base.ids import NODE_MAX, NodeId

SCHEME: Final = "corral"


def node_uri(cluster: str, node: NodeId) -> str:
    return f"{SCHEME}://{quote(cluster, safe='')}/node/{node}"


def parse_node_uri(uri: str) -> tuple[str, NodeId] | None:
    """The cluster and node a URI names; None when it is not one of ours."""
    prefix = f"{SCHEME}://"
    if not uri.startswith(prefix):
        return None
    parts = uri[len(prefix) :].split("/")
    if len(parts) != 3 or parts[1] != "node" or not (parts[2].isascii() and parts[2].isdigit()) or len(parts[2]) > 4:
        return None
    node = int(parts[2])
    if not 1 <= node <= NODE_MAX:
        return None
    return unquote(parts[0]), node


def names_of(certificate: dict[str, Any]) -> tuple[str, NodeId] | None:
    """Cluster and node of a peer's verified certificate (as `ssl.getpeercert()` gives it); None: not a node's."""
    found = [
        names
        for kind, value in certificate.get("subjectAltName", ())
        if kind == "URI" and (names := parse_node_uri(value)) is not None
    ]
    return found[0] if len(found) == 1 else None  # two identities in one certificate are none


@final
class Credentials:
    """What this node shows to others and accepts from them. Made by `load`; the contexts are shared by connections."""

    __slots__ = ("client_context", "cluster", "node", "server_context")

    def __init__(
        self, cluster: str, node: NodeId, server_context: ssl.SSLContext, client_context: ssl.SSLContext
    ) -> None:
        self.cluster: Final = cluster
        self.node: Final = node
        self.server_context: Final = server_context
        self.client_context: Final = client_context
