"""Unix sockets within one machine: connections over a link that no rule reaches, with the peer's credentials."""

import asyncio
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

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
        server = listener.process
        link = self._fabric.link(client.machine.hosts[0], client.machine.hosts[0])
        here = SimConnection(
            self._fabric, client, link, f"{client.name} with {server.name} locally", None, _credentials(server)
        )
        there = SimConnection(
            self._fabric, server, link, f"{server.name} with {client.name} locally", None, _credentials(client)
        )
        here.handler = handler
        join(here, there)
        scheduler = self._fabric.scheduler
        accepted = scheduler.now + link.latency()
        here.not_before(accepted)
        server.loop.deliver(accepted, _accept, listener, there)
        # The kernel completes a local connect without the server: only what is sent waits for it.
        delay = link.latency()
        there.not_before(scheduler.now + delay)
        connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        scheduler.after(delay, _complete, connected)
        try:
            await connected
        except asyncio.CancelledError:
            here.close()
            raise
        return here


def _credentials(process: "Process") -> Credentials:
    return Credentials(process.pid, process.uid, process.gid)


def _accept(listener: SimLocalListener, connection: SimConnection) -> None:
    if connection.open:
        if listener.open:
            connection.handler = listener.accept(connection)
        else:
            connection.abort()


def _complete(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
