"""Unix sockets within one machine: connections over a link that no rule reaches, with the peer's credentials."""

import asyncio
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from corral.base.time import SECOND
from corral.base.world import Connection, ConnectionHandler, Credentials, Listener
from corral.sim.connection import SimConnection, join
from corral.sim.network import Accept, Fabric

if TYPE_CHECKING:
    from corral.sim.process import Process


class SimLocalListener:
    def __init__(self, process: "Process", path: str, accept: Accept) -> None:
        self.process = process
        self.address = path
        self.accept = accept
        self.open = True
        process.machine.sockets[path] = self
        process.resources[self] = None

    def close(self) -> None:
        """The socket file stays until somebody removes it or listens there again, as after a crash."""
        self.open = False
        self.process.resources.pop(self, None)


class Greeting:
    """The handler of a connection that is not established yet."""

    def __init__(self, connected: "asyncio.Future[None]") -> None:
        self._connected = connected

    def received(self, messages: list[bytes]) -> None:
        raise AssertionError("a message before the greeting")

    def broken(self, reason: str) -> None:
        _complete(self._connected, ConnectionResetError(errno.ECONNRESET, f"not connected: {reason}"))


class SimLocal:
    """`World.local` of one process."""

    def __init__(self, fabric: Fabric, process: "Process") -> None:
        self._fabric = fabric
        self._process = process

    async def listen(self, path: str, accept: Callable[[Connection], ConnectionHandler]) -> Listener:
        self._process.check_alive()
        known = self._process.machine.sockets.get(path)
        if known is not None and known.open:
            raise OSError(errno.EADDRINUSE, f"somebody listens on {path} already")
        return SimLocalListener(self._process, path, accept)

    async def connect(self, path: str, handler: ConnectionHandler) -> Connection:
        client = self._process
        client.check_alive()
        listener = client.machine.sockets.get(path)
        if listener is None:
            raise FileNotFoundError(errno.ENOENT, f"there is no socket {path}")
        if not listener.open:
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens on {path}")
        connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        server = listener.process
        link = self._fabric.link(client.machine.hosts[0], client.machine.hosts[0])
        here = SimConnection(
            self._fabric, client, link, f"{client.name} with {server.name} locally", None, _credentials(server)
        )
        there = SimConnection(
            self._fabric, server, link, f"{server.name} with {client.name} locally", None, _credentials(client)
        )
        here.handler = Greeting(connected)
        join(here, there)
        # The kernel would connect at once; it is the greeting that a stopped server does not give.
        now = self._fabric.scheduler.now
        server.loop.deliver(now + link.latency(), self._accept, listener, there, connected)
        try:
            async with asyncio.timeout(self._fabric.knobs.connect_timeout / SECOND):
                await connected
        except (OSError, asyncio.CancelledError):
            here.abort()
            raise
        here.handler = handler
        return here

    def _accept(self, listener: SimLocalListener, connection: SimConnection, connected: "asyncio.Future[None]") -> None:
        """In the server."""
        if not connection.open or not connection.peer.open:
            return
        if not listener.open:
            refusal = ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens on {listener.address}")
            self._fabric.scheduler.after(0, _complete, connected, refusal)
            return
        delay = self._fabric.link(listener.process.machine.hosts[0], listener.process.machine.hosts[0]).latency()
        connection.not_before(self._fabric.scheduler.now + delay)
        self._fabric.scheduler.after(delay, _complete, connected, None)  # before what the server sends on accepting
        connection.handler = listener.accept(connection)


def _credentials(process: "Process") -> Credentials:
    return Credentials(process.pid, process.uid, process.gid)


def _complete(future: "asyncio.Future[None]", error: OSError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
