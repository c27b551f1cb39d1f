"""Mutual TLS 1.3 connections (World.network; DESIGN 5, comm); the datagrams are in `datagrams`.

A connection exists for its owner only when both sides have shown a certificate of the cluster's CA that names a node of
this cluster, and the listening side's owner took it (stream.GREETING). There is no mode without TLS. Strangers cost
little: handshakes have a time limit and a bound (the oldest one gives way), failures are counted and logged once per
source and minute.
"""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any, Final, final

from corral.base.ids import NodeId
from corral.base.time import Instant
from corral.base.world import Connection, ConnectionHandler, DatagramSocket, Listener
from corral.real import address as addresses
from corral.real.complaints import Complaints
from corral.real.counters import Counters
from corral.real.datagrams import RealDatagrams
from corral.real.identity import Credentials, names_of
from corral.real.stream import GREETING, LINGER_SECONDS, Fatal, Stream, Streams
from corral.real.turn import Turn

HANDSHAKE_SECONDS: Final = 5.0  # connect included
HALF_OPEN_MAX: Final = 128  # handshakes under way on one listener; each costs up to 300 KiB
CONNECTIONS_MAX: Final = 1024  # of authenticated peers on one listener
ACCEPT_BATCH: Final = 16  # connections taken in one loop turn
BACKLOG: Final = 128
ACCEPT_PAUSE_SECONDS: Final = 0.5  # after accept failed for lack of descriptors
USER_TIMEOUT_MS: Final = 15_000  # unacknowledged data for so long breaks a connection (comm's detection is faster)
KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))

log = logging.getLogger("corral.network")


@final
class RealNetwork:
    """`credentials` None: datagrams only; listen and connect raise."""

    def __init__(
        self,
        turn: Turn,
        credentials: Credentials | None,
        now: Callable[[], Instant],
        fatal: Fatal,
    ) -> None:
        self.counters: Final = Counters()
        self._turn = turn
        self._loop = turn.loop
        self._credentials = credentials
        self._now = now
        self._fatal = fatal
        self._complaints = Complaints(log)
        self.open_streams: Final = Streams()
        self._open: set[TlsListener | RealDatagrams] = set()

    def complain(self, source: str, sentence: str) -> None:
        self._complaints.about(self._now(), source, sentence)

    def _need_credentials(self) -> Credentials:
        if self._credentials is None:
            raise OSError(errno.ENOKEY, "this process has no certificate, so it can neither listen nor connect")
        return self._credentials

    # --- connections ------------------------------------------------------------------------------------------------

    async def listen(self, address: str, accept: Callable[[Connection], ConnectionHandler]) -> Listener:
        credentials = self._need_credentials()
        sock = await self._bound(address, socket.SOCK_STREAM)
        sock.listen(BACKLOG)
        listener = TlsListener(self, sock, credentials, accept)
        self._open.add(listener)
        return listener

    async def connect(self, address: str, node: NodeId, handler: ConnectionHandler) -> Connection:
        credentials = self._need_credentials()
        stream = Stream(self._turn, self._fatal, self.open_streams)
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                sock = await self._connected(address)
                try:
                    await self._loop.create_connection(
                        lambda: stream,
                        sock=sock,
                        ssl=credentials.client_context,
                        server_hostname="",
                        ssl_handshake_timeout=HANDSHAKE_SECONDS,
                        ssl_shutdown_timeout=LINGER_SECONDS,
                    )
                except BaseException:
                    sock.close()
                    raise
                self._check_node(stream, address, node)
                try:
                    greeting = await stream.greeting()
                except ConnectionError as error:
                    raise ConnectionAbortedError(
                        errno.ECONNABORTED, f"{address} refused this node: {error}; its log says why"
                    ) from None
                if greeting != GREETING:
                    raise ConnectionAbortedError(errno.ECONNABORTED, f"{address} does not speak corral's protocol")
        except TimeoutError:
            stream.refuse("timed out")
            raise TimeoutError(
                errno.ETIMEDOUT, f"{address} did not answer within {HANDSHAKE_SECONDS:g} s: is it reachable?"
            ) from None
        except BaseException as error:
            stream.refuse("not connected")
            if isinstance(error, ssl.SSLError):
                raise _tls_error(address, error) from None
            raise
        stream.node = node
        stream.open(handler)
        return stream

    def _check_node(self, stream: Stream, address: str, node: NodeId) -> None:
        certified = self._identity(stream)
        if certified == node:
            return
        if stream.extra("peercert"):
            found = "a stranger" if certified is None else f"node {certified}"
            sentence = f"{address} is {found}, not node {node}: check the addresses in the configuration"
        else:
            sentence = f"{address} broke the connection during the handshake; its log says why"
        raise ConnectionAbortedError(errno.ECONNABORTED, sentence)

    async def _connected(self, address: str) -> socket.socket:
        """A TCP connection to the first of the host's addresses that answers. ConnectionRefusedError: none listens."""
        found = await self._look_up(address, socket.SOCK_STREAM)
        errors: list[OSError] = []
        for family, kind, protocol, _, name in found:
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
            try:
                _tune(sock)
                await self._loop.sock_connect(sock, name)
            except OSError as error:
                sock.close()
                errors.append(error)
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        for failure in errors:
            if not isinstance(failure, ConnectionRefusedError):
                raise OSError(failure.errno, f"{address}: {failure.strerror or failure}")
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens on {address}")

    async def _look_up(self, address: str, kind: socket.SocketKind) -> list[Any]:
        """Addresses come from configuration and from other members: whatever is wrong with one is an OSError."""
        try:
            host, port = addresses.parse(address)
            return await self._loop.getaddrinfo(host, port, type=kind)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(errno.EHOSTUNREACH, f"{address}: {reason}; check the host name") from None
        except ValueError as error:  # UnicodeError is one
            raise OSError(errno.EINVAL, f"{address[:100]!r} is no address: {error}") from None

    def _identity(self, stream: Stream) -> NodeId | None:
        """The node of our cluster that the peer's certificate names."""
        certificate: dict[str, Any] | None = stream.extra("peercert")
        names = names_of(certificate) if certificate else None
        if names is None or names[0] != self._need_credentials().cluster:
            return None
        return names[1]

    # --- datagrams --------------------------------------------------------------------------------------------------

    async def datagrams(self, address: str, deliver: Callable[[str, bytes], None]) -> DatagramSocket:
        sock = await self._bound(address, socket.SOCK_DGRAM)
        datagrams = RealDatagrams(
            self._loop, sock, deliver, self.counters, self.complain, self._fatal, self._open.discard
        )
        self._open.add(datagrams)
        return datagrams

    async def _bound(self, address: str, kind: socket.SocketKind) -> socket.socket:
        found = await self._look_up(address, kind)
        family, _, protocol, _, name = found[0]
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
        try:
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(name)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"cannot listen on {address}: {error.strerror}") from None
        return sock

    # --- end --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Listeners and datagram sockets at once; connections send what they can and break."""
        for item in list(self._open):
            item.close()
        self.open_streams.close()


@final
class TlsListener:
    """Accepts, bounds the handshakes under way, and hands over those who prove to be nodes of this cluster."""

    def __init__(
        self,
        network: RealNetwork,
        sock: socket.socket,
        credentials: Credentials,
        accept: Callable[[Connection], ConnectionHandler],
    ) -> None:
        self._network = network
        self._loop = network._loop
        self._sock = sock
        self._credentials = credentials
        self._accept = accept
        self._half_open: dict[asyncio.Task[None], str] = {}  # oldest first → its host
        self._address = addresses.unparse(sock.getsockname())
        self._closed = False
        self._loop.add_reader(sock.fileno(), self._acceptable)

    @property
    def address(self) -> str:
        return self._address

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._network._open.discard(self)
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for task in self._half_open:
            task.cancel()

    def _acceptable(self) -> None:
        for _ in range(ACCEPT_BATCH):
            try:
                sock, name = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptors or no memory: the backlog keeps them meanwhile
                self._pause(error)
                return
            self._begin(sock, name[0])

    def _pause(self, error: OSError) -> None:
        network = self._network
        network.counters.accepts_failed += 1
        network.complain(
            "accept",
            f"cannot accept connections on {self._address}: {error.strerror}; raise the limit of open files",
        )
        self._loop.remove_reader(self._sock.fileno())
        self._loop.call_later(ACCEPT_PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._sock.fileno(), self._acceptable)

    def _begin(self, sock: socket.socket, host: str) -> None:
        sock.setblocking(False)
        network = self._network
        if len(network.open_streams) >= CONNECTIONS_MAX:
            network.counters.connections_refused += 1
            sock.close()
            return
        if len(self._half_open) >= HALF_OPEN_MAX:
            # An honest handshake takes milliseconds, so the oldest is the likeliest to be somebody holding a place.
            oldest = next(iter(self._half_open))
            source = self._half_open.pop(oldest)
            oldest.cancel()
            network.counters.half_open_dropped += 1
            self._complain(source, f"{source} holds unfinished handshakes on {self._address}; the oldest gives way")
        task = self._loop.create_task(self._handshake(sock, host), name=f"handshake with {host}")
        self._half_open[task] = host
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._half_open.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._network._fatal(error, "accepting a connection")

    async def _handshake(self, sock: socket.socket, host: str) -> None:
        network = self._network
        stream = Stream(
            network._turn, network._fatal, network.open_streams, lambda stream: self._established(stream, host)
        )
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                _tune(sock)
                # TLS from the first byte: a plain transport in between could read, and lose, the peer's hello.
                await self._loop.connect_accepted_socket(
                    lambda: stream,
                    sock,
                    ssl=self._credentials.server_context,
                    ssl_handshake_timeout=HANDSHAKE_SECONDS,
                    ssl_shutdown_timeout=LINGER_SECONDS,
                )
        except OSError as error:  # ssl.SSLError, a time-out and a broken connection are all OSErrors
            stream.refuse("the handshake failed")
            sock.close()
            network.counters.handshakes_failed += 1
            self._complain(host, f"{host} failed to authenticate to {self._address}: {_why(error)}")
        except asyncio.CancelledError:
            stream.refuse("gave way")
            sock.close()
            raise

    def _established(self, stream: Stream, host: str) -> None:
        """The handshake is done: is it a node of this cluster?"""
        network = self._network
        node = network._identity(stream)
        if node is None:
            network.counters.strangers += 1
            stream.refuse("its certificate names another cluster")
            self._complain(
                host,
                f"{host} showed a certificate of our CA that does not name a node of cluster "
                f"{self._credentials.cluster!r}: give it one made for this cluster",
            )
            return
        stream.node = node
        if self._closed:
            stream.refuse("no longer listening")
            return
        try:
            stream.accept(self._accept)
        except Exception as error:
            network._fatal(error, "accepting a connection")

    def _complain(self, source: str, sentence: str) -> None:
        self._network.complain(source, sentence)


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    for option, value in KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _why(error: OSError) -> str:
    """A failed handshake in the words of whoever must repair it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{error.verify_message}; it needs a certificate made with this cluster's CA"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).replace("_", " ").lower()
        return f"{reason}; only nodes with a certificate of this cluster's CA may connect"
    if isinstance(error, TimeoutError):
        return f"no handshake within {HANDSHAKE_SECONDS:g} s"
    return error.strerror or str(error) or "the connection broke"


def _tls_error(address: str, error: ssl.SSLError) -> OSError:
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = f"its certificate is not from our cluster's CA ({error.verify_message})"
    else:
        reason = (error.reason or str(error)).replace("_", " ").lower()
    return ConnectionAbortedError(errno.ECONNABORTED, f"{address} cannot be trusted: {reason}")
