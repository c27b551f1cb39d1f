"""Tells a story of cman: the engines of a whole cluster on the simulator's heap, with even clocks and even delays.

    nodes N                  how many are configured; none runs yet
    start 1 2                their corralds start
    settle [d]               d times `detect` pass (2 when not said)
    kill 3                   its corrald and everything it ran are gone at once, and nobody says so
    power off                the same for all
    cut 1 > 3 | cut 1 - 3    nothing arrives from 1 at 3 | either way; their session hangs
    heal                     everything arrives again
    forget 3                 the state directory of node 3 (which does not run) is deleted
    pause 3 | resume 3       its corrald does not run, its clock does
    leave 3                  its participants are gone, it asks to be left out
    fencing 3 | fencing      every member knows that an agent works on node 3 | on none any more
    expel 3                  every member is told that node 3 is to be fenced
    ambush Accept 1          the next such message is the last thing node 1 sends
    views                    who is in which view now, and what the others wait for

Below the dashes stands what happened: a line begins with the time since the command in tenths of `detect`, and with the
nodes it happened on. A node that was excluded or lost its memory starts again by itself, as corrald does.
"""

from typing import Any

from corral.base.ids import MemberId, NodeId
from corral.base.time import MILLISECOND, SECOND
from corral.base.view import View
from corral.cman import wire
from corral.cman.events import (
    Active,
    CleanlyStopped,
    Excluded,
    Expel,
    FencingNow,
    Installed,
    Leave,
    Left,
    Outdated,
    Stop,
)
from tests.sim.cman_cluster import DETECT, TIMING, Cluster, Node, Session


def nodes_of(view: View) -> str:
    return "{" + ",".join(str(node) for node in view.nodes) + "}"


class Story(Cluster):
    """One telling."""

    def __init__(self) -> None:
        self.now = 0
        self.lines: list[str] = []
        self.begun = 0
        self.seen: dict[str, tuple[int, list[NodeId]]] = {}

    # --- an even world ---

    def delay_ns(self) -> int:
        return MILLISECOND // 5

    def write_ns(self, node: Node) -> int:
        return 2 * MILLISECOND

    def connect_later(self, a: NodeId, b: NodeId) -> None:
        pair = (min(a, b), max(a, b))
        if pair not in self.connecting:
            self.connecting.add(pair)
            self.later(10 * MILLISECOND, self.connect, pair)

    def restart_later(self, node: Node) -> None:
        if node.node in self.comes_back:
            self.comes_back.discard(node.node)
            self.later(10 * MILLISECOND, self.restart, node, node.life)

    # --- telling ---

    def tell(self, script: str) -> str:
        for line in script.splitlines():
            words = line.partition("#")[0].split()
            if words:
                self.lines.append(f"> {' '.join(words)}")
                self.begun = self.now
                self.seen = {}
                getattr(self, f"do_{words[0]}")(*words[1:])
                self.lines += [
                    f"{(at - self.begun) * 10 / DETECT:4.0f}  {' '.join(map(str, nodes))} {what}"
                    for what, (at, nodes) in self.seen.items()
                ]
        self.check_sequence()
        return "\n".join(self.lines) + "\n"

    def note(self, node: NodeId, event: Any) -> None:
        what = self.words(node, event)
        if what:
            nodes = self.seen.setdefault(what, (self.now, []))[1]
            if node not in nodes:
                nodes.append(node)
                nodes.sort()

    def words(self, node: NodeId, event: Any) -> str:
        if isinstance(event, Stop):
            return f"stopped, promised {event.id}"
        if isinstance(event, Installed):
            left = "".join(f", {member.node} left" for member in event.left)
            unclean = "".join(f", {member.node} unclean" for member in event.unclean)
            quorate = "quorate" if event.view.quorate else "inquorate"
            return f"in view {event.view.id} {nodes_of(event.view)} {quorate}{left}{unclean}"
        if isinstance(event, Active):
            return f"declared {event.id} active"
        if isinstance(event, Excluded):
            self.comes_back.add(node)
            return f"excluded by view {event.view.id} {nodes_of(event.view)}, starts again"
        if isinstance(event, Outdated):
            self.comes_back.add(node)
            return "known already in this incarnation, starts again"
        if isinstance(event, Left):
            return "left" if event.clean else "left, not cleanly"
        if isinstance(event, CleanlyStopped):
            return "wrote its clean stop"
        return ""

    def message(self, sender: Node, peer: MemberId, message: Any) -> None:
        super().message(sender, peer, message)
        if self.trap == (type(message).__name__, sender.node):
            self.trap = ("", 0)
            self.seen[f"killed after its {type(message).__name__}"] = (self.now, [sender.node])
            self.later(0, self.do_kill, str(sender.node))

    # --- commands ---

    def do_nodes(self, count: str) -> None:
        super().__init__(1, int(count))
        self.comes_back: set[NodeId] = set()
        self.trap = ("", 0)
        self.calm = True
        self.timing = TIMING  # a seed may draw others
        for node in self.nodes.values():
            node.ppm = 0
            node.offset = SECOND

    def do_start(self, *nodes: str) -> None:
        for node in nodes:
            self.nodes[int(node)].start()

    def do_settle(self, detects: str = "2") -> None:
        self.run_until(self.now + round(float(detects) * DETECT))

    def do_kill(self, *nodes: str) -> None:
        for node in nodes:
            victim = self.nodes[int(node)]
            sessions = list(victim.sessions.values())
            for session in sessions:
                session.broken = True  # hangs: nobody says so
            victim.crash(zombies=False)
            self.later(DETECT * 11 // 10, self.hang_up, sessions, victim.node)

    def hang_up(self, sessions: list[Session], victim: NodeId) -> None:
        for session in sessions:
            session.broken = False
            self.break_session(session, refused=False, by=victim)

    def do_power(self, off: str) -> None:
        assert off == "off"
        self.do_kill(*(str(node.node) for node in self.nodes.values() if node.running))

    def do_cut(self, a: str, how: str, b: str) -> None:
        self.cut.add((int(a), int(b)))
        if how == "-":
            self.cut.add((int(b), int(a)))

    def do_heal(self) -> None:
        self.cut = set()

    def do_forget(self, node: str) -> None:
        assert not self.nodes[int(node)].running
        self.nodes[int(node)].log = []

    def do_pause(self, node: str) -> None:
        self.nodes[int(node)].paused = True

    def do_resume(self, node: str) -> None:
        self.resume(self.nodes[int(node)], self.nodes[int(node)].life)

    def do_leave(self, node: str) -> None:
        self.nodes[int(node)].active = None
        self.nodes[int(node)].feed_member(Leave())

    def do_fencing(self, *nodes: str) -> None:
        for node in self.nodes.values():
            if node.running:
                node.feed_member(FencingNow(frozenset(map(int, nodes))))

    def do_expel(self, victim: str) -> None:
        member = self.nodes[int(victim)].me
        for node in self.nodes.values():
            if node.running:
                node.feed_member(Expel(member))

    def do_ambush(self, message: str, node: str) -> None:
        assert hasattr(wire, message)
        self.trap = (message, int(node))

    def do_views(self) -> None:
        for node in self.nodes.values():
            if not node.running:
                state = "is down"
            elif node.member.view is None or node.member.stopped:
                state = f"waits {node.member.waiting()}"
            else:
                view = node.member.view
                waits = node.member.waiting() or "for its lease"
                what = "serving" if node.serving() else f"waits {waits}"
                state = f"in {view.id} {nodes_of(view)}, {what}"
            self.lines.append(f"      {node.node} {state}")
