"""The network of a simulation: hosts, listeners, connections being made, datagrams, partitions.

Addresses are `host:port`. A machine has one host name per physical network (links of the same index see each other);
`localhost` and `127.0.0.1` mean the machine itself, `0.0.0.0` all its hosts. A process speaks for the node whose
certificate it holds (`Process.node`) in the cluster whose CA signed it (`Process.cluster`): `connect` refuses a peer
that is somebody else, and what the wrong caller sees is a plain OSError, as with a failed TLS handshake.
"""

import asyncio
import errno
from collections.abc import Callable, Container, Iterable
from random import Random
from typing import TYPE_CHECKING, Final

from corral.base.ids import NodeId
from corral.base.world import Connection, ConnectionHandler, DatagramSocket, Listener
from corral.sim.connection import SimConnection, join
from corral.sim.knobs import Knobs
from corral.sim.links import Cut, LaidRule, Link, Rule
from corral.sim.loop import DEAD, RUNNING, Scheduler
from corral.sim.trace import Trace

if TYPE_CHECKING:
    from corral.sim.machine import Machine
    from corral.sim.process import Process

Accept = Callable[[Connection], ConnectionHandler]

LOOPBACK: Final = frozenset(("localhost", "127.0.0.1", "::1"))
ANY: Final = "0.0.0.0"
DATAGRAM_MAX: Final = 65_507
HANDSHAKE_TRIPS: Final = 2  # TCP and TLS 1.3


class Fabric:
    """All wires, and who listens where."""

    def __init__(self, scheduler: Scheduler, trace: Trace, rng: Random, knobs: Knobs) -> None:
        self.scheduler = scheduler
        self.trace = trace
        self.knobs = knobs
        self._rng = rng
        self.hosts: dict[str, Machine] = {}
        self.listeners: dict[tuple[str, int], SimListener] = {}
        self.sockets: dict[tuple[str, int], SimDatagramSocket] = {}
        self.laid: list[LaidRule] = []
        self.refused = 0  # connections whose certificate was not the one expected
        self._links: dict[tuple[str, str], Link] = {}
        self._orphans: dict[Machine, list[SimConnection]] = {}

    # --- links and rules ---

    def link(self, source: str, target: str) -> Link:
        link = self._links.get((source, target))
        if link is None:
            inside = self.hosts[source] is self.hosts[target]
            link = Link(self._rng, self.knobs, source, target, inside=inside)
            self._links[source, target] = link
            self._lay(link)
        return link

    def relink(self) -> None:
        for link in self._links.values():
            self._lay(link)

    def _lay(self, link: Link) -> None:
        if self.hosts[link.source] is self.hosts[link.target]:
            return  # no rule reaches into a machine
        link.rules = tuple(
            laid.rule for laid in self.laid if link.source in laid.sources and link.target in laid.targets
        )

    def lay(self, rule: Rule, sources: Iterable[str], targets: Iterable[str], *, both: bool = False) -> list[LaidRule]:
        """Puts a rule on all links from `sources` to `targets` (machine or host names), with `both` also back."""
        left, right = self._hosts_of(sources), self._hosts_of(targets)
        laid = [LaidRule(self, rule, left, right)]
        if both:
            laid.append(LaidRule(self, rule, right, left))
        self.laid.extend(laid)
        self.relink()
        return laid

    def partition(self, one: Iterable[str], other: Iterable[str], *, one_way: bool = False) -> list[LaidRule]:
        """Cuts every link from `one` to `other`, and back unless `one_way`. Heal with `heal(laid)`."""
        return self.lay(Cut(), one, other, both=not one_way)

    def heal(self, laid: Iterable[LaidRule] | None = None) -> None:
        """Takes these rules away, or all."""
        for rule in list(self.laid if laid is None else laid):
            rule.heal()

    def _hosts_of(self, names: Iterable[str]) -> frozenset[str]:
        hosts: set[str] = set()
        for name in names:
            if name in self.hosts:
                hosts.add(name)
            else:
                found = [host for host, machine in self.hosts.items() if machine.name == name]
                if not found:
                    raise ValueError(f"no machine or host is called {name}")
                hosts.update(found)
        return frozenset(hosts)

    # --- addresses ---

    def resolve(self, machine: "Machine", address: str) -> tuple[str, int]:
        """(host, port) as the tables hold it. Raises OSError for what is not `host:port`."""
        host, colon, port = address.rpartition(":")
        if not colon or not port.isdigit() or int(port) > 65535:
            raise OSError(errno.EINVAL, f"{address!r} is not host:port")
        host = host.strip("[]")
        return (machine.hosts[0] if host in LOOPBACK else host), int(port)

    def bind(self, machine: "Machine", address: str, taken: Container[tuple[str, int]]) -> tuple[list[str], int]:
        """The hosts and the port to bind. Raises OSError when it is in use or not here."""
        host, port = self.resolve(machine, address)
        hosts = list(machine.hosts) if host == ANY else [host]
        if any(self.hosts.get(each) is not machine for each in hosts):
            raise OSError(errno.EADDRNOTAVAIL, f"{address} is not an address of {machine.name}")
        if port == 0:
            port = machine.ephemeral_port()
            while any((each, port) in taken for each in hosts):
                port = machine.ephemeral_port()
        elif any((each, port) in taken for each in hosts):
            raise OSError(errno.EADDRINUSE, f"{address} is in use")
        return hosts, port

    def route(self, machine: "Machine", target: str) -> Link:
        """The link from this machine to a host: over the network both are on. Raises OSError when there is none."""
        owner = self.hosts.get(target)
        if owner is None:
            raise OSError(errno.EHOSTUNREACH, f"no route to host {target}")
        if owner is machine:
            return self.link(target, target)
        index = owner.hosts.index(target)
        return self.link(machine.hosts[min(index, len(machine.hosts) - 1)], target)

    # --- machines that lost power ---

    def orphaned(self, end: SimConnection) -> None:
        """Its peer's machine lost power: it finds out when its own time runs out, or soon after the reboot."""
        knobs = self.knobs
        when = self.scheduler.now + knobs.user_timeout + self._rng.randrange(knobs.retry_last)
        end.break_at(when, "timed out")
        self._orphans.setdefault(end.peer.process.machine, []).append(end)

    def booted(self, machine: "Machine") -> None:
        for end in self._orphans.pop(machine, []):
            end.break_at(self.scheduler.now + self._rng.randrange(self.knobs.retry_last), "reset by the peer")


class SimListener:
    def __init__(self, fabric: Fabric, process: "Process", keys: list[tuple[str, int]], address: str, accept: Accept):
        self._fabric = fabric
        self.process = process
        self.keys = keys
        self.address = address
        self.accept = accept
        for key in keys:
            fabric.listeners[key] = self
        process.resources[self] = None

    def close(self) -> None:
        for key in self.keys:
            if self._fabric.listeners.get(key) is self:
                del self._fabric.listeners[key]
        self.process.resources.pop(self, None)


class SimDatagramSocket:
    def __init__(
        self,
        fabric: Fabric,
        process: "Process",
        keys: list[tuple[str, int]],
        address: str,
        deliver: Callable[[str, bytes], None],
    ) -> None:
        self._fabric = fabric
        self._scheduler = fabric.scheduler
        self._trace = fabric.trace
        self.process = process
        self.keys = keys
        self.address = address
        self._deliver = deliver
        self._open = True
        self._routes: dict[str, tuple[Link, tuple[str, int], str]] = {}
        self._unread = 0
        self._name = f"{process.name} {address}"
        for key in keys:
            fabric.sockets[key] = self
        process.resources[self] = None

    def send(self, address: str, payload: bytes) -> None:
        if not self._open:
            return
        route = self._routes.get(address)
        if route is None:
            route = self._route(address)
            if route is None:
                return
        link, key, source = route
        size = len(payload)
        if size > DATAGRAM_MAX:
            return
        target = self._fabric.sockets.get(key)
        if target is None:
            return
        now = self._scheduler.now
        delays = link.datagram_delays(size)
        if not delays:
            self._trace.wire(now, self._name, f"lost to {address}", (payload,), size)
            return
        payload = bytes(payload)
        loop = target.process.loop
        for delay in delays:
            if loop.state != RUNNING:
                if target._unread >= self._fabric.knobs.datagram_backlog:
                    continue
                target._unread += 1
            loop.deliver(now + delay, target._arrive, source, payload)

    def _arrive(self, source: str, payload: bytes) -> None:
        self._unread = 0
        if self._open:
            self._trace.wire(self._scheduler.now, self._name, source, (payload,), len(payload))
            self._deliver(source, payload)

    def _route(self, address: str) -> tuple[Link, tuple[str, int], str] | None:
        machine = self.process.machine
        try:
            key = self._fabric.resolve(machine, address)
            link = self._fabric.route(machine, key[0])
        except OSError:
            return None
        source = f"{self.keys[0][0] if len(self.keys) == 1 else link.source}:{self.keys[0][1]}"
        route = self._routes[address] = (link, key, source)
        return route

    def close(self) -> None:
        self._open = False
        for key in self.keys:
            if self._fabric.sockets.get(key) is self:
                del self._fabric.sockets[key]
        self.process.resources.pop(self, None)


class Attempt:
    """One connection being made: SYN over a link that may drop it, the listener's answer, the answer's way back."""

    def __init__(
        self,
        fabric: Fabric,
        process: "Process",
        address: str,
        node: NodeId,
        handler: ConnectionHandler,
        future: "asyncio.Future[SimConnection]",
    ) -> None:
        self._fabric = fabric
        self._scheduler = fabric.scheduler
        self._process = process
        self._address = address
        self._node = node
        self._handler = handler
        self._future = future
        self._key = fabric.resolve(process.machine, address)
        self._link = fabric.route(process.machine, self._key[0])
        self._back = fabric.link(self._link.target, self._link.source)
        self._connection: SimConnection | None = None
        self._waiting_for: Process | None = None
        self._over = False
        self._timeout = self._scheduler.after(
            fabric.knobs.connect_timeout,
            self._fail,
            TimeoutError(errno.ETIMEDOUT, f"connecting to {address} timed out"),
        )

    def start(self) -> None:
        self._travel(self._link, self._at_listener)

    def _travel(self, link: Link, then: Callable[[], None]) -> None:
        """Over the link as soon as it lets a packet pass."""
        if self._over:
            return
        delay = link.judge(64)
        if delay < 0:
            self._scheduler.after(self._fabric.knobs.retry_first, self._travel, link, then)
        else:
            self._scheduler.after(delay * HANDSHAKE_TRIPS, then)

    def _at_listener(self) -> None:
        """In the kernel of the machine asked."""
        if self._over:
            return
        machine = self._fabric.hosts[self._key[0]]
        if not machine.powered or machine.halted:
            self._scheduler.after(self._fabric.knobs.retry_first, self._travel, self._link, self._at_listener)
            return
        listener = self._fabric.listeners.get(self._key)
        if listener is None:
            refusal = ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens on {self._address}")
            self._travel(self._back, lambda: self._fail(refusal))
        elif listener.process.cluster != self._process.cluster or listener.process.node != self._node:
            self._fabric.refused += 1
            wrong = OSError(errno.EPROTO, f"{self._address} is not node {self._node} of this cluster")
            self._travel(self._back, lambda: self._fail(wrong))
        else:  # the handshake needs the process: a paused one leaves the caller waiting
            self._waiting_for = listener.process
            listener.process.resources[self] = None
            listener.process.loop.deliver(self._scheduler.now, self._accept, listener)

    def _accept(self, listener: SimListener) -> None:
        """In the listener's process."""
        if self._over or self._fabric.listeners.get(self._key) is not listener:
            return
        delay = self._back.judge(64)
        if delay < 0:
            retry = self._scheduler.now + self._fabric.knobs.retry_first
            listener.process.loop.deliver(retry, self._accept, listener)
            return
        self._wait_no_more()
        client, server = self._process, listener.process
        here = SimConnection(self._fabric, client, self._link, f"{client.name} with {server.name}", server.node, None)
        there = SimConnection(self._fabric, server, self._back, f"{server.name} with {client.name}", client.node, None)
        self._connection = here
        here.handler = self._handler
        join(here, there)
        delay *= HANDSHAKE_TRIPS
        there.not_before(self._scheduler.now + delay)
        self._scheduler.after(delay, self._succeed, here)
        there.handler = listener.accept(there)

    def _succeed(self, connection: SimConnection) -> None:
        if self._over:
            return
        self._over = True
        self._timeout.cancel()
        self._fabric.trace.note(self._scheduler.now, connection.name, "connected")
        if self._future.done() or self._process.loop.state == DEAD:
            connection.abort()
        else:
            self._future.set_result(connection)

    def _fail(self, error: OSError) -> None:
        if not self._over:
            self.abandon()
            if not self._future.done():
                self._future.set_exception(error)

    def close(self) -> None:
        """The process that should have accepted is gone."""
        self._wait_no_more()
        if self._fabric.hosts[self._key[0]].powered:
            reset = ConnectionResetError(errno.ECONNRESET, f"{self._address} went away")
            self._travel(self._back, lambda: self._fail(reset))

    def _wait_no_more(self) -> None:
        if self._waiting_for is not None:
            self._waiting_for.resources.pop(self, None)

    def abandon(self) -> None:
        self._over = True
        self._wait_no_more()
        self._timeout.cancel()
        if self._connection is not None:
            self._connection.abort()


class SimNetwork:
    """`World.network` of one process."""

    def __init__(self, fabric: Fabric, process: "Process") -> None:
        self._fabric = fabric
        self._process = process

    async def listen(self, address: str, accept: Accept) -> Listener:
        fabric, process = self._fabric, self._process
        process.check_alive()
        hosts, port = fabric.bind(process.machine, address, fabric.listeners)
        keys = [(host, port) for host in hosts]
        return SimListener(fabric, process, keys, f"{address.rpartition(':')[0]}:{port}", accept)

    async def connect(self, address: str, node: NodeId, handler: ConnectionHandler) -> Connection:
        self._process.check_alive()
        future: asyncio.Future[SimConnection] = asyncio.get_running_loop().create_future()
        attempt = Attempt(self._fabric, self._process, address, node, handler, future)
        attempt.start()
        try:
            return await future
        except asyncio.CancelledError:
            attempt.abandon()
            raise

    async def datagrams(self, address: str, deliver: Callable[[str, bytes], None]) -> DatagramSocket:
        fabric, process = self._fabric, self._process
        process.check_alive()
        hosts, port = fabric.bind(process.machine, address, fabric.sockets)
        keys = [(host, port) for host in hosts]
        return SimDatagramSocket(fabric, process, keys, f"{address.rpartition(':')[0]}:{port}", deliver)
