"""UDP (World.network.datagrams). Plain: comm authenticates datagrams with its session keys.

The socket is read and written directly: a transport in between would only add queues, and a datagram that cannot leave
at once is better lost than late. Host names are looked up aside; what is sent to one meanwhile is lost.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Final, final

from corral.real import address as addresses
from corral.real.counters import Counters
from corral.real.stream import Fatal

DATAGRAM_MAX: Final = 65_507
DATAGRAM_BATCH: Final = 64  # received in one loop turn
NAMES_MAX: Final = 512  # resolved datagram addresses remembered
NAME_SECONDS: Final = 60.0  # how long a resolved host name is believed


@final
class RealDatagrams:
    """One bound socket."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        deliver: Callable[[str, bytes], None],
        counters: Counters,
        complain: Callable[[str, str], None],
        fatal: Fatal,
        closed: "Callable[[RealDatagrams], None]",
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._deliver = deliver
        self._counters = counters
        self._complain = complain
        self._fatal = fatal
        self._on_close = closed
        self._address = addresses.unparse(sock.getsockname())
        self._names: dict[str, Any] = {}  # address as text → socket address; None while it is being resolved
        self._texts: dict[Any, str] = {}  # socket address → text
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def address(self) -> str:
        return self._address

    def send(self, address: str, payload: bytes) -> None:
        if self._closed:
            return
        name = self._names.get(address)
        if name is None and (name := self._name(address)) is None:
            self._counters.datagrams_dropped += 1
            return
        try:
            self._sock.sendto(payload, name)
        except OSError:  # buffer full, unreachable, too long, a peer's port is closed: all are loss
            self._counters.datagrams_dropped += 1

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._on_close(self)
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for task in self._tasks:
            task.cancel()

    def _readable(self) -> None:
        for _ in range(DATAGRAM_BATCH):
            try:
                payload, name = self._sock.recvfrom(DATAGRAM_MAX)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # an ICMP error for something sent earlier
                continue
            text = self._texts.get(name)
            if text is None:
                if len(self._texts) >= NAMES_MAX:
                    self._texts.clear()
                text = self._texts[name] = addresses.unparse(name)
            try:
                self._deliver(text, payload)
            except Exception as error:
                self._fatal(error, "delivery of a datagram")
            if self._closed:
                return

    def _name(self, address: str) -> Any:
        """Numeric addresses at once; a host name is looked up aside, and what is sent meanwhile is lost."""
        try:
            host, port = addresses.parse(address)
        except ValueError:
            return None  # from a peer, perhaps: as good as unreachable
        if address in self._names:
            return None  # being resolved
        if len(self._names) >= NAMES_MAX:
            self._names.clear()
        try:
            found = socket.getaddrinfo(host, port, self._sock.family, socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
        except UnicodeError:
            return None
        except OSError:
            self._names[address] = None
            task = self._loop.create_task(self._resolve(address, host, port))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return None
        name = self._names[address] = found[0][4]
        return name

    async def _resolve(self, address: str, host: str, port: int) -> None:
        try:
            found = await self._loop.getaddrinfo(host, port, family=self._sock.family, type=socket.SOCK_DGRAM)
            self._names[address] = found[0][4]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            self._complain(host[:100], f"host {host[:100]!r} cannot be resolved: {reason}; check the address")
        self._loop.call_later(NAME_SECONDS, self._names.pop, address, None)
