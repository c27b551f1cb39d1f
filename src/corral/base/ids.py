"""Names of the things a cluster is made of.

A *node* is a machine, known by a small configured integer. Each start of its corrald is an *incarnation*, a number that
only rises. A *member* is one process of that incarnation: corrald itself (serial 0) or a participant, whose serial is
handed out by its corrald and never reused within the incarnation.
"""

from typing import Final, NamedTuple, TypeAlias

NodeId: TypeAlias = int  # 1 .. NODE_MAX, configured
Incarnation: TypeAlias = int  # max(kept + 1, seconds since 1970 at start)
Serial: TypeAlias = int  # 0 is corrald

NODE_MAX: Final = 4095
NAME_MAX: Final = 64  # bytes in a lock, lockspace, group or cluster name


class MemberId(NamedTuple):
    """One process of one incarnation of one node: the address comm, group and dlm use."""

    node: NodeId
    incarnation: Incarnation
    serial: Serial

    def __str__(self) -> str:
        return f"{self.node}.{self.serial}" if self.serial else f"{self.node}"


class NodeIncarnation(NamedTuple):
    """One life of one node: what cman, quorum and fence reason about."""

    node: NodeId
    incarnation: Incarnation

    def corrald(self) -> MemberId:
        return MemberId(self.node, self.incarnation, 0)


class ViewId(NamedTuple):
    """Orders views: a larger epoch is newer. Unique; among quorate views the epoch alone is unique (DESIGN 5, cman)."""

    epoch: int
    coordinator: NodeId

    def __str__(self) -> str:
        return f"{self.epoch}.{self.coordinator}"


NO_VIEW: Final = ViewId(0, 0)
