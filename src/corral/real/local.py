"""Streams within one machine over Unix sockets (World.local; DESIGN 4, Identity).

The kernel says who calls (SO_PEERCRED): that is the whole authentication, so the socket's mode is 0660 from the first
moment anybody can connect. A socket file left by a dead daemon is replaced, one that answers is not; starters of the
same path take turns by a lock on its directory. Paths longer than a Unix address holds are reached through /proc.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Final, cast, final

from corral.base.world import Connection, ConnectionHandler, Credentials, Listener
from corral.real.stream import GREETING, Fatal, Stream, Streams
from corral.real.turn import Turn

SOCKET_MODE: Final = 0o660
ADDRESS_MAX: Final = 107  # bytes in sun_path
BACKLOG: Final = 256
CONNECTIONS_MAX: Final = 1024
GREETING_SECONDS: Final = 5.0
TURN_SECONDS: Final = 2.0  # how long a starter waits for another one on the same path

_UCRED: Final = struct.Struct("3i")

log = logging.getLogger("corral.local")


@final
class RealLocal:
    def __init__(self, turn: Turn, fatal: Fatal) -> None:
        self.refused = 0  # connections over CONNECTIONS_MAX
        self._turn = turn
        self._loop = turn.loop
        self._fatal = fatal
        self.open_streams: Final = Streams()
        self._listeners: set[LocalListener] = set()

    async def listen(self, path: str, accept: Callable[[Connection], ConnectionHandler]) -> Listener:
        sock = await self._bind(path)
        identity = os.stat(path)
        listener = LocalListener(self, path, (identity.st_dev, identity.st_ino), accept)
        try:
            listener.server = await self._loop.create_unix_server(listener.stream, sock=sock, backlog=BACKLOG)
        except BaseException:
            sock.close()
            raise
        self._listeners.add(listener)
        return listener

    async def connect(self, path: str, handler: ConnectionHandler) -> Connection:
        """Raises FileNotFoundError or ConnectionRefusedError when nobody listens, PermissionError, else OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        stream = Stream(self._turn, self._fatal, self.open_streams)
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                while True:
                    try:
                        with _reachable(path) as address:
                            sock.connect(address)
                        break
                    except BlockingIOError:  # its backlog is full
                        await asyncio.sleep(0.01)
                await self._loop.create_unix_connection(lambda: stream, sock=sock)
                if await stream.greeting() != GREETING:
                    raise ConnectionAbortedError(errno.ECONNABORTED, f"{path} does not speak corral's protocol")
        except TimeoutError:
            stream.refuse("timed out")
            sock.close()
            raise TimeoutError(
                errno.ETIMEDOUT, f"{path} did not answer within {GREETING_SECONDS:g} s: is its process stopped?"
            ) from None
        except OSError as error:
            stream.refuse("not connected")
            sock.close()
            raise type(error)(error.errno or errno.ECONNABORTED, f"{path}: {error.strerror or error}") from None
        except BaseException:
            stream.refuse("not connected")
            sock.close()
            raise
        stream.credentials = _credentials_of(stream)
        stream.open(handler)
        return stream

    async def _bind(self, path: str) -> socket.socket:
        directory = os.path.dirname(path) or "."
        turn = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            await self._take_turn(turn, path)
            _clear_stale(path)
            with _reachable(path) as address:
                sock.bind(address)
            os.chmod(path, SOCKET_MODE)  # before listen: nobody can have connected yet
            sock.listen(BACKLOG)  # within our turn: the next starter must find it answering
        except BaseException:
            sock.close()
            raise
        finally:
            os.close(turn)
        return sock

    async def _take_turn(self, turn: int, path: str) -> None:
        deadline = self._loop.time() + TURN_SECONDS
        while True:
            try:
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if self._loop.time() > deadline:
                    raise OSError(
                        errno.EBUSY, f"another process is starting on {path}: wait for it, or stop it"
                    ) from None
            await asyncio.sleep(0.01)

    # --- end --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        for listener in list(self._listeners):
            listener.close()
        self.open_streams.close()


@final
class LocalListener:
    def __init__(
        self,
        local: RealLocal,
        path: str,
        identity: tuple[int, int],
        accept: Callable[[Connection], ConnectionHandler],
    ) -> None:
        self.server: asyncio.AbstractServer | None = None
        self._local = local
        self._path = path
        self._identity = identity  # device and inode of our socket file
        self._accept = accept

    @property
    def address(self) -> str:
        return self._path

    def close(self) -> None:
        if self.server is None:
            return
        self.server.close()
        self.server = None
        self._local._listeners.discard(self)
        with contextlib.suppress(OSError):
            now = os.lstat(self._path)
            if (now.st_dev, now.st_ino) == self._identity:  # not the socket of whoever came after us
                os.unlink(self._path)

    def stream(self) -> Stream:
        return Stream(self._local._turn, self._local._fatal, self._local.open_streams, self._established)

    def _established(self, stream: Stream) -> None:
        local = self._local
        if len(local.open_streams) > CONNECTIONS_MAX:
            local.refused += 1
            stream.refuse("too many connections")
            return
        stream.credentials = _credentials_of(stream)
        try:
            stream.accept(self._accept)
        except Exception as error:
            local._fatal(error, "accepting a local connection")


def _credentials_of(stream: Stream) -> Credentials:
    sock = cast(socket.socket, stream.extra("socket"))
    return Credentials(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def _clear_stale(path: str) -> None:
    """Removes a socket file nobody answers on. Raises OSError when somebody does, or when it is no socket."""
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        with sock, _reachable(path) as address:
            sock.connect(address)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        if not _is_socket(path):
            raise FileExistsError(
                errno.EEXIST, f"{path} exists and is not a socket: remove it, or choose another path"
            ) from None
        log.info("%s was left by a process that is gone; replaced", path)
        os.unlink(path)
        return
    except BlockingIOError:  # somebody listens whose backlog is full
        pass
    raise OSError(errno.EADDRINUSE, f"a process already answers on {path}: stop it first, or choose another path")


def _is_socket(path: str) -> bool:
    return os.lstat(path).st_mode & 0o170000 == 0o140000


@contextlib.contextmanager
def _reachable(path: str) -> Iterator[str]:
    """A name of `path` that fits into a Unix address."""
    if len(os.fsencode(path)) <= ADDRESS_MAX:
        yield path
        return
    directory, name = os.path.split(path)
    if len(os.fsencode(name)) > 64:
        raise OSError(errno.ENAMETOOLONG, f"socket name {name!r} is longer than 64 bytes: choose a shorter one")
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
