"""Answers to what people ask corrald: plain dictionaries, so that every door prints the same (docs/format/ipc.md)."""

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, final

import msgspec

from corral.api.cman import LEVEL_NAMES
from corral.api.fence import HOW_NAMES, PROOF_NAMES, FenceStatus, NodeFenced
from corral.base.errors import ClusterError
from corral.node.warden import Local

if TYPE_CHECKING:
    from corral.node.node import Node

Arguments = dict[str, Any]


@final
class Answers:
    def __init__(self, node: "Node") -> None:
        self._node = node
        self._table: Final = {
            "cman.status": self._cman,
            "fence.status": self._fence,
            "fence.ack": self._fence_ack,
            "fence.check": self._fence_check,
            "fence.node": self._fence_node,
            "groups": self._groups,
            "history": self._history,
            "leave": self._leave,
            "timing": self._timing,
            "participants": self._participants,
            "paths": self._paths,
            "statistics": self._statistics,
        }

    async def __call__(self, what: str, arguments: Arguments) -> Any:
        answer = self._table.get(what)
        if answer is None:
            raise ClusterError(f"corrald does not know {what!r}; use the same version of both")
        found = answer(arguments)
        return await found if isinstance(found, Coroutine) else found

    def _cman(self, _arguments: Arguments) -> Any:
        node = self._node
        view = node.view
        names = {entry.id: entry.name for entry in node.config.nodes}
        members = [] if view is None else list(view.nodes)
        up = set(node.agreement.heartbeat.up)
        return {
            "cluster": node.config.name,
            "node": node.node,
            "incarnation": node.me.incarnation,
            "members": members,
            "quorate": bool(view is not None and view.quorate),
            "active": node.active,
            "epoch": 0 if view is None else view.id.epoch,
            "coordinator": 0 if view is None else view.id.coordinator,
            "lease": node.lease_until() > node.world.now(),
            "waits_for": self._waits_for(),
            "nodes": [
                {
                    "id": entry.id,
                    "name": names[entry.id],
                    "address": entry.address,
                    "member": entry.id in members,
                    "link": "self" if entry.id == node.node else "up" if entry.id in up else "down",
                }
                for entry in node.config.nodes
            ],
        }

    def _waits_for(self) -> str:
        """One sentence; empty when everything runs."""
        node = self._node
        view = node.view
        if view is None:
            return "the first view: other configured nodes have not answered yet"
        if not view.quorate:
            present = len(view.members)
            needed = len(node.config.nodes) // 2 + 1
            return f"quorum: {present} of {len(node.config.nodes)} nodes are here, {needed} are needed"
        if not node.active:
            return node.fencing.status().waits_for or "every member to pass its lease guard"
        if node.lease_until() <= node.world.now():
            return "the lease: too few members have echoed this node's heartbeats"
        waiting = node.lift.waiting_for()
        here = "; ".join(said for local in node.warden.locals.values() if (said := self._participant_waits(local)))
        for group in sorted(waiting):
            nodes = ", ".join(str(n) for n in waiting[group])
            return f"{group} to recover on node {nodes}" + (
                f" ({here})" if node.node in waiting[group] and here else ""
            )
        return here

    def _fence(self, _arguments: Arguments) -> Any:
        status: FenceStatus = self._node.fencing.status()
        return {
            "round": status.round,
            "done": status.done,
            "waits_for": status.waits_for,
            "victims": [
                {
                    "node": victim.victim.node,
                    "incarnation": victim.victim.incarnation,
                    "fencer": victim.fencer,
                    "method": victim.method,
                    "running": victim.running,
                    "failures": victim.failures,
                    "last_error": victim.last_error,
                    "waits_for": victim.waits_for,
                }
                for victim in status.victims
            ],
            "history": [_fenced(fact) for fact in status.history],
        }

    def _fence_ack(self, arguments: Arguments) -> Any:
        victim = arguments.get("node")
        operator = arguments.get("operator", "")
        if not isinstance(victim, int) or isinstance(victim, bool):
            raise ClusterError("fence ack needs the id of a node")
        if not isinstance(operator, str) or len(operator) > 200:
            raise ClusterError("the operator's word has at most 200 characters")
        self._node.fencing.acknowledge(victim, operator or "acknowledged")
        return None

    def _fence_node(self, arguments: Arguments) -> Any:
        victim, reason = arguments.get("node"), arguments.get("reason", "")
        if not isinstance(victim, int) or isinstance(victim, bool):
            raise ClusterError("fence node needs the id of a node")
        if not isinstance(reason, str) or len(reason) > 200:
            raise ClusterError("the reason has at most 200 characters")
        self._node.fence(victim, reason or "an operator asked for it")
        return None

    def _fence_check(self, _arguments: Arguments) -> Any:
        return self._node.fencing.check()

    def _groups(self, _arguments: Arguments) -> Any:
        lift = self._node.lift
        return [
            {
                "name": group.name,
                "level": LEVEL_NAMES[group.level],
                "number": group.number,
                "round": lift.rounds[group.name].id if group.name in lift.rounds else 0,
                "members": [
                    {"member": str(entry.member), "slot": entry.slot, "pid": entry.process.pid}
                    for entry in group.members
                ],
                "failed": [str(entry.member) for entry in group.failed()],
            }
            for group in (lift.groups[name] for name in sorted(lift.groups))
        ]

    def _participants(self, _arguments: Arguments) -> Any:
        return [
            {
                "member": str(local.member),
                "pid": local.process.pid,
                "purpose": local.purpose,
                "groups": sorted(local.groups),
                "dying": local.dying,
                "waits_for": self._participant_waits(local),
            }
            for _, local in sorted(self._node.warden.locals.items())
        ]

    def _participant_waits(self, local: Local) -> str:
        """What holds this participant up; empty when nothing does."""
        return local.waits_for() or self._node.lift.joins_waiting().get(local.member, "")

    def _history(self, arguments: Arguments) -> Any:
        since = arguments.get("since", 0)
        if not isinstance(since, int) or isinstance(since, bool):
            raise ClusterError("history needs an instant in nanoseconds since boot")
        return [list(happening) for happening in self._node.chronicle.since(since)]

    def _leave(self, _arguments: Arguments) -> Any:
        self._node.world.spawn(self._node.leave(), "leave the cluster")
        return None

    def _timing(self, _arguments: Arguments) -> Any:
        return [
            {"name": name, "seconds": length / 1e9, "meaning": meaning}
            for name, length, meaning in self._node.timing.table()
        ]

    def _paths(self, _arguments: Arguments) -> Any:
        """What a participant needs before it attaches."""
        node = self._node
        return {
            "node": node.node,
            "participants": node.paths.participants,
            "certificates": node.paths.certificates,
        }

    def _statistics(self, _arguments: Arguments) -> Any:
        node = self._node
        return {
            "comm": msgspec.to_builtins(node.comm.statistics()),
            "lapses": node.lapses,
            "loop": node.loop_statistics(),
            "evictions": node.warden.evictions,
            "callers_refused": node.door.refused,
            "dropped": {
                "heartbeat": node.agreement.heartbeat.dropped,
                "undecodable": node.agreement.dropped,
                "lift": node.lift.dropped,
                "fence": node.fencing.dropped,
            },
        }


def _fenced(fact: NodeFenced) -> dict[str, Any]:
    return {
        "node": fact.victim.node,
        "incarnation": fact.victim.incarnation,
        "how": HOW_NAMES[fact.how],
        "proof": PROOF_NAMES[fact.proof],
        "method": fact.method,
        "agent": fact.agent,
        "by": fact.by,
        "seconds": fact.duration_ns / 1e9,
        "at": fact.wall_seconds,
        "text": fact.text,
    }
