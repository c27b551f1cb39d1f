"""Lockspace engines that talk to each other at once: whatever one says is delivered before anything else happens."""

from corral.api.dlm import Completion, Request
from corral.base.engine import TICK, Received
from corral.base.ids import MemberId
from corral.base.time import FOREVER, SECOND
from corral.base.view import Round, Slotted
from corral.dlm.engine import LockspaceEngine
from corral.dlm.events import ClientGone, Done, Finish, Lease, Start, Stop, Submit
from corral.dlm.wire import CODEC


def member(node: int) -> MemberId:
    return MemberId(node, 1, 1)


class Members:
    """`heard` collects what engines emit, as (node, event)."""

    def __init__(self, *nodes: int, value_size: int = 8, **options: int) -> None:
        self.now = SECOND
        self.value_size = value_size
        self.options = options
        self.engines: dict[int, LockspaceEngine] = {}
        self.heard: list[tuple[int, object]] = []
        self.on_the_way: list[tuple[int, int, object]] = []
        self.held_back = False  # True: messages wait on their way
        self.round_id = 0
        self.cookie = 0
        for node in nodes:
            self.join(node)
        self.recover()

    def join(self, node: int, value_size: int = 0) -> None:
        size = value_size or self.value_size
        self.engines[node] = LockspaceEngine(member(node), "members", size, lease_until=FOREVER, **self.options)

    def recover(self, *joined: int) -> None:
        """A round over all that are here."""
        self.round_id += 1
        self.on_the_way.clear()
        members = tuple(Slotted(member(node), node) for node in sorted(self.engines))
        round = Round(self.round_id, "members", members, (), tuple(member(node) for node in joined), ())
        for node in sorted(self.engines):
            self.step(node, Stop())
        for node in sorted(self.engines):
            self.step(node, Start(round), talk=False)
        self.talk()
        for node in sorted(self.engines):
            self.step(node, Finish(self.round_id), talk=False)
        self.talk()

    def step(self, node: int, event: object, *, talk: bool = True) -> None:
        engine = self.engines[node]
        engine.step(self.now, event)  # type: ignore[arg-type]
        ready = engine.ready()
        for peer, message in ready.send:
            self.on_the_way.append((node, peer.node, CODEC.decode(CODEC.encode(message))))
        self.heard += [(node, event) for event in ready.emit]
        if talk and not self.held_back:
            self.talk()

    def talk(self) -> None:
        while self.on_the_way:
            sender, receiver, message = self.on_the_way.pop(0)
            if receiver in self.engines:
                self.step(receiver, Received(member(sender), message), talk=False)

    def submit(self, node: int, client: int, handle: int, request: Request) -> list[tuple[int, object]]:
        """What everybody hears of it."""
        self.cookie += 1
        self.heard.clear()
        self.step(node, Submit(client, [(handle, self.cookie, request)]))
        return list(self.heard)

    def ask(self, node: int, client: int, handle: int, request: Request) -> Completion:
        """The completion of this very request, which must be there at once."""
        heard = self.submit(node, client, handle, request)
        (done,) = [event for _, event in heard if isinstance(event, Done) and event.cookie == self.cookie]
        return done.completion

    def gone(self, node: int, client: int) -> None:
        self.step(node, ClientGone(client))

    def lapse(self, node: int) -> None:
        self.step(node, Lease(self.now))

    def renew(self, node: int) -> None:
        self.step(node, Lease(FOREVER))

    def wait(self, duration: int) -> None:
        self.now += duration
        for node, engine in sorted(self.engines.items()):
            if engine.deadline <= self.now:
                self.step(node, TICK)
