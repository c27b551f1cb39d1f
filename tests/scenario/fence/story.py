"""Tells fencing stories: several engines, an instant network, every step by hand.

A story file is commands, a line `----`, and what happened. Commands:

    nodes 1 2 3                      configured nodes; every one has the methods `power`, then `storage`
    set post_fail_delay 3            a setting; or: set delay 3 1.5 (of a node), set reboot (action of all methods)
    round 1 2 failed 3.1 ...         Stop, then Start on these members. A member or victim is NODE.INCARNATION, .1 when
                                     left out. Also: joined ..., unclean ..., startup, absent ...
    stop                             on every member
    agent 1 ok|fail|late [text]      the newest unanswered attempt of node 1 ends
    sleep 2                          seconds
    ack 2 3 ann: pulled the plug     to node 2, about node 3
    request 2 3 reason               to node 2: fence node 3
    lose                             from now on messages are lost;  deliver: no more
    fencing 3                        which nodes would answer WAIT to node 3
    status 2                         what node 2 says it waits for
"""

from typing import Any

from corral.api.fence import (
    HOW_NAMES,
    Device,
    FenceConfig,
    FenceDeferred,
    FenceFailed,
    FenceStarted,
    Method,
    NodeFenced,
    NodeFencing,
)
from corral.base.engine import TICK, Received
from corral.base.ids import MemberId, NodeId, NodeIncarnation
from corral.base.time import SECOND
from corral.base.view import Round, Slotted
from corral.fence.engine import FenceEngine
from corral.fence.events import (
    AttemptDone,
    CancelAttempt,
    ExpelNode,
    FenceRequest,
    ManualAck,
    Refused,
    RoundDone,
    RunAttempt,
    Start,
    Stop,
)
from corral.fence.wire import CODEC


def life(word: str) -> NodeIncarnation:
    node, _, incarnation = word.partition(".")
    return NodeIncarnation(int(node), int(incarnation or 1))


def named(victim: NodeIncarnation) -> str:
    return f"{victim.node}.{victim.incarnation}"


def event_line(event: Any) -> str:
    """One emitted event, as the story tells it."""
    if isinstance(event, RunAttempt):
        devices = " then ".join(" with ".join(use.device for use in group) for group in event.groups)
        return f"runs {devices}: {event.action} {named(event.victim)}"
    if isinstance(event, CancelAttempt):
        return "stops its agent"
    if isinstance(event, NodeFenced):
        return f"knows {named(event.victim)} fenced ({HOW_NAMES[event.how]})"
    if isinstance(event, FenceFailed):
        return f"failed to fence {named(event.victim)} by {event.method or 'anything'}: {event.text}"
    if isinstance(event, FenceDeferred):
        return f"defers {named(event.victim)} to {event.to}"
    if isinstance(event, RoundDone):
        return f"is done with round {event.round}"
    if isinstance(event, ExpelNode):
        return f"wants {named(event.member)} out of the view: {event.reason}"
    if isinstance(event, Refused):
        return f"refuses: {event.text}"
    assert isinstance(event, FenceStarted), event
    return ""  # RunAttempt has said it


class Story:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.now = 1000 * SECOND
        self.nodes: list[NodeId] = []
        self.settings: dict[str, float] = {}
        self.delays: dict[NodeId, float] = {}
        self.action = "off"
        self.engines: dict[NodeIncarnation, FenceEngine] = {}
        self.members: list[NodeIncarnation] = []
        self.running: dict[NodeIncarnation, list[RunAttempt]] = {}
        self.lost = False
        self.rounds = 0

    def tell(self, script: str) -> str:
        for line in script.splitlines():
            words = line.split("#")[0].split()
            if words:
                getattr(self, f"do_{words[0]}")(words[1:])
        return "\n".join(self.lines) + "\n"

    # --- commands --------------------------------------------------------------------------------------------------

    def do_nodes(self, words: list[str]) -> None:
        self.nodes = [int(word) for word in words]

    def do_set(self, words: list[str]) -> None:
        if words[0] == "delay":
            self.delays[int(words[1])] = float(words[2])
        elif words[0] == "reboot":
            self.action = "reboot"
        else:
            self.settings[words[0]] = float(words[1])

    def do_round(self, words: list[str]) -> None:
        groups: dict[str, list[NodeIncarnation]] = {"members": []}
        current = groups["members"]
        for word in words:
            if word[0].isdigit():
                current.append(life(word))
            else:
                current = groups.setdefault(word, [])
        for member in self.members:
            self.feed(member, Stop())
        members = self.members = sorted(groups["members"])
        self.rounds += 1
        round = Round(
            self.rounds,
            "fence",
            tuple(Slotted(member.corrald(), slot) for slot, member in enumerate(members)),
            tuple(Slotted(victim.corrald(), 0) for victim in sorted(groups.get("failed", []))),
            tuple(member.corrald() for member in sorted(groups.get("joined", []))),
            (),
        )
        clean = frozenset(members) - set(groups.get("unclean", []))
        absent = tuple(victim.node for victim in groups.get("absent", []))
        self.lines.append(f"round {self.rounds}: {' '.join(named(member) for member in members)}")
        for member in members:
            self.engines.setdefault(member, FenceEngine(member.node, self.config()))
        for member in members:
            self.feed(member, Start(round, clean, "startup" in groups, absent))

    def do_stop(self, _words: list[str]) -> None:
        for member in self.members:
            self.feed(member, Stop())

    def do_agent(self, words: list[str]) -> None:
        node, outcome, text = int(words[0]), words[1], " ".join(words[2:])
        by = next(
            member for member in sorted(self.engines, reverse=True) if member.node == node and self.running[member]
        )
        attempt = self.running[by].pop()
        self.feed(by, AttemptDone(attempt.attempt, outcome == "ok", text))

    def do_sleep(self, words: list[str]) -> None:
        end = self.now + round(float(words[0]) * SECOND)
        while True:
            deadline, member = min((self.engines[member].deadline, member) for member in self.engines)
            if deadline > end:
                break
            self.now = max(self.now, deadline)
            self.lines.append(f"+{(self.now - 1000 * SECOND) / SECOND:g}s")
            self.feed(member, TICK)
        self.now = end

    def do_ack(self, words: list[str]) -> None:
        self.feed(self.member(words[0]), ManualAck(NodeIncarnation(int(words[1]), 0), " ".join(words[2:]), 1))

    def do_request(self, words: list[str]) -> None:
        self.feed(self.member(words[0]), FenceRequest(NodeIncarnation(int(words[1]), 0), " ".join(words[2:])))

    def do_lose(self, _words: list[str]) -> None:
        self.lost = True

    def do_deliver(self, _words: list[str]) -> None:
        self.lost = False

    def do_fencing(self, words: list[str]) -> None:
        waits = [str(member.node) for member in self.members if self.engines[member].fencing(int(words[0]))]
        self.lines.append(f"node {words[0]} would be told to wait by: {' '.join(waits) or 'nobody'}")

    def do_status(self, words: list[str]) -> None:
        status = self.engines[self.member(words[0])].status(self.now)
        self.lines.append(f"{words[0]} says: {status.waits_for or 'waiting for nothing'}")

    # --- machinery -------------------------------------------------------------------------------------------------

    def config(self) -> FenceConfig:
        methods = [Method("power", ["pdu"], self.action), Method("storage", ["array"], self.action)]
        settings: dict[str, Any] = dict(self.settings)
        return FenceConfig(
            devices=[Device("pdu", "fence_apc", timeout=10, limit=0), Device("array", "fence_scsi", limit=0)],
            nodes={node: NodeFencing(methods, self.delays.get(node, 0.0)) for node in self.nodes},
            **settings,
        )

    def member(self, word: str) -> NodeIncarnation:
        return next(member for member in self.members if member.node == int(word))

    def feed(self, member: NodeIncarnation, event: Any) -> None:
        """Steps one engine and whatever its messages set off, in the order they were sent."""
        queue: list[tuple[NodeIncarnation, Any]] = [(member, event)]
        while queue:
            receiver, event = queue.pop(0)
            engine = self.engines.get(receiver)
            if engine is None:
                continue
            engine.step(self.now, event)
            ready = engine.ready()
            for emitted in ready.emit:
                self.emitted(receiver, emitted)
            if not self.lost:
                me = MemberId(receiver.node, receiver.incarnation, 0)
                for peer, message in ready.send:
                    heard = Received(me, CODEC.decode(CODEC.encode(message)))
                    queue.append((NodeIncarnation(peer.node, peer.incarnation), heard))

    def emitted(self, member: NodeIncarnation, event: Any) -> None:
        if isinstance(event, RunAttempt):
            self.running.setdefault(member, []).append(event)
        line = event_line(event)
        if line:
            self.lines.append(f"{member.node} {line}")
