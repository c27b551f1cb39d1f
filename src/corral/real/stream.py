"""Whole messages over one byte stream, TLS or Unix: the Connection both share (base/world.py).

On the stream every message is a 4-byte little-endian length and that many bytes. A length above MESSAGE_LIMIT breaks
the connection before anything is buffered for it. The first message of a stream is a greeting sent by the side that
listens, once its owner has accepted the caller: so `connect` returns only when there really is somebody there who takes
us, and a refusal by certificate is an error of `connect`, not a connection that breaks at once.

Everything sent in one loop turn leaves in one write (measured.md: the biggest single lever of the transport), up to
WRITE_MAX; while the transport says it is full the rest waits here, where `pending` sees it.
"""

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, cast, final

from corral.base.ids import NodeId
from corral.base.world import Buffer, Connection, ConnectionHandler, Credentials
from corral.real.turn import Turn
from corral.wire.codec import MESSAGE_MAX
from corral.wire.frame import HEADER

MESSAGE_LIMIT: Final = MESSAGE_MAX + HEADER.size  # the longest message a stream carries
GREETING: Final = b"corral stream 1\n"
GREETING_LIMIT: Final = 64  # until the greeting came nothing longer is believed
WRITE_MAX: Final = 256 << 10  # bytes given to the transport at once; it does not tell what the TCP layer below holds
LINGER_SECONDS: Final = 2.0  # how long a closed stream may go on sending what was queued

_LENGTH: Final = struct.Struct("<I")
_LENGTH_AT: Final = _LENGTH.unpack_from
# Between get_buffer and buffer_updated nothing else runs, so one buffer serves all streams. Without it uvloop allocates
# 256 KiB for every read of a TLS stream and gives most of it back: mmap, mremap, munmap and page faults each time
# (measured on a 100-byte echo: they are more than half of the round trip).
_READ: Final = memoryview(bytearray(256 << 10))
_CHUNKS_MAX: Final = 512  # pieces of one unfinished message before they are joined: tiny reads must not cost memory

Fatal = Callable[[BaseException, str], None]  # our own bug escaped to the loop: stop this process


@final
class Stream(asyncio.BufferedProtocol):
    """One connection. `established(stream)` is called when the transport is up (for TLS: after the handshake)."""

    __slots__ = (
        "_at_turn_end",
        "_backlog",
        "_chunks",
        "_closed",
        "_fatal",
        "_flushing",
        "_greeted",
        "_handler",
        "_held",
        "_limit",
        "_live",
        "_loop",
        "_need",
        "_out",
        "_paused",
        "_queued",
        "_reason",
        "_reported",
        "_transport",
        "_unread",
        "credentials",
        "established",
        "node",
    )

    def __init__(
        self,
        turn: Turn,
        fatal: Fatal,
        live: "Streams",
        established: "Callable[[Stream], None] | None" = None,
    ) -> None:
        self.node: NodeId | None = None
        self.credentials: Credentials | None = None
        self.established = established
        self._loop = turn.loop
        self._at_turn_end = turn.at_end
        self._fatal = fatal
        self._live = live
        self._handler: ConnectionHandler | None = None
        self._transport: asyncio.Transport | None = None
        self._limit = GREETING_LIMIT
        self._greeted: asyncio.Future[bytes] | None = None  # connecting side: completed by the first message
        self._held: list[bytes] = []  # came with the greeting, before the handler was there
        self._chunks: list[bytes] = []
        self._unread = 0  # bytes in _chunks
        self._need = _LENGTH.size  # bytes that make the next message whole
        self._out: list[Buffer] = []  # sent in this loop turn
        self._backlog: deque[memoryview] = deque()  # of earlier turns, while the transport is full
        self._queued = 0  # bytes in both
        self._flushing = False
        self._paused = False  # the transport has enough for now
        self._closed = False
        self._reason = ""
        self._reported = False

    # --- the contract -----------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        if self._transport is None or self._closed:
            return 0
        return self._queued + self._transport.get_write_buffer_size()

    def send(self, messages: Sequence[Buffer]) -> None:
        if self._closed:
            return
        out = self._out
        queued = 0
        for message in messages:
            length = message.nbytes if isinstance(message, memoryview) else len(message)
            assert length <= MESSAGE_LIMIT, f"message of {length} bytes; a stream carries up to {MESSAGE_LIMIT}"
            out.append(_LENGTH.pack(length))
            out.append(message)
            queued += length + 4
        self._queued += queued
        if not self._flushing:
            self._flushing = True
            self._at_turn_end(self._flush)

    def close(self) -> None:
        self._close("closed by this side", abort=False)

    # --- life -------------------------------------------------------------------------------------------------------

    def accept(self, accept: Callable[[Connection], ConnectionHandler]) -> None:
        """Listening side: hands the connection to its owner. The greeting goes first, whatever the owner sends."""
        self._limit = MESSAGE_LIMIT
        self.send((GREETING,))
        self._handler = accept(self)

    async def greeting(self) -> bytes:
        """Connecting side: waits for the greeting; raises ConnectionError when the stream breaks before."""
        if self._reason:
            raise ConnectionAbortedError(self._reason)
        self._greeted = self._loop.create_future()
        try:
            if self._held:
                return self._held.pop(0)
            return await self._greeted
        finally:
            self._greeted = None

    def open(self, handler: ConnectionHandler) -> None:
        """Connecting side: after the greeting; what comes next goes to the handler, from the next loop turn on, so that
        whoever awaits `connect` has the connection first."""
        self._handler = handler
        self._limit = MESSAGE_LIMIT
        self._loop.call_soon(self._release)

    def refuse(self, reason: str) -> None:
        """Ends a stream that was never given to a handler."""
        self._close(reason, abort=True)
        self._live.discard(self)  # a connect cancelled at the last moment: uvloop never tells such a protocol its end

    def drop(self) -> None:
        """Breaks at once, also a stream that is still sending what was queued before `close`."""
        self._close("closed by this side", abort=True)
        if self._transport is not None:
            self._transport.abort()

    def extra(self, name: str) -> Any:
        return None if self._transport is None else self._transport.get_extra_info(name)

    # --- called by the loop ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._closed:  # given up while the handshake was under way
            self._transport.abort()
            return
        self._live.add(self)
        if self.established is not None:
            established, self.established = self.established, None
            established(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return _READ

    def buffer_updated(self, nbytes: int) -> None:
        length: int = _LENGTH_AT(_READ)[0]
        if length == nbytes - 4 and length <= self._limit and not self._unread and not self._closed:
            self._deliver([bytes(_READ[4:nbytes])])  # as most reads are: one whole message
        else:
            self.data_received(bytes(_READ[:nbytes]))

    def data_received(self, data: bytes) -> None:
        if self._closed:
            return
        if self._unread:
            self._chunks.append(data)
            self._unread += len(data)
            if self._unread < self._need:
                if len(self._chunks) >= _CHUNKS_MAX:
                    self._chunks = [b"".join(self._chunks)]
                return
            data = b"".join(self._chunks)
        self._split(data)

    def eof_received(self) -> None:
        if not self._reason:
            self._reason = "closed by the peer in the middle of a message" if self._unread else "closed by the peer"

    def connection_lost(self, error: Exception | None) -> None:
        self._live.discard(self)
        if not self._reason:
            self._reason = _sentence(error) if error is not None else "closed by the peer"
        self._closed = True
        self._report()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if not self._closed:
            self._pump()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _split(self, data: bytes) -> None:
        """Delivers the whole messages in `data` and keeps the rest."""
        messages: list[bytes] = []
        position, end = 0, len(data)
        need = _LENGTH.size
        excess = 0
        while end - position >= 4:
            length: int = _LENGTH.unpack_from(data, position)[0]
            if length > self._limit and (self._limit == MESSAGE_LIMIT or position == 0):
                excess = length
                break
            stop = position + 4 + length
            if stop > end:
                need = stop - position
                break
            messages.append(data[position + 4 : stop])
            position = stop
        self._unread = end - position
        self._need = need
        self._chunks = [data[position:]] if self._unread else []
        if messages:
            self._deliver(messages)
        if excess and not self._closed:
            self._close(f"the peer sent a message of {excess} bytes, more than {self._limit}", abort=True)

    def _deliver(self, messages: list[bytes]) -> None:
        if self._handler is None or self._held:
            self._hold(messages)
            return
        try:
            self._handler.received(messages)
        except Exception as error:
            self._fatal(error, "a connection's received()")

    def _hold(self, messages: list[bytes]) -> None:
        """Before the handler is there: at most what one read brings, then the peer waits."""
        if self._greeted is not None and not self._greeted.done() and not self._held:
            self._greeted.set_result(messages.pop(0))
        self._held.extend(messages)
        assert self._transport is not None
        self._transport.pause_reading()

    def _release(self) -> None:
        held, self._held = self._held, []
        if self._closed:
            self._report()  # it broke between connect and now
            return
        assert self._transport is not None
        self._transport.resume_reading()
        if held:
            self._deliver(held)

    def _flush(self) -> None:
        """At the end of a loop turn: from here on the senders' buffers are theirs again."""
        self._flushing = False
        if self._closed:
            return
        out, self._out = self._out, []
        if out:
            content = b"".join(out)
            if len(content) <= WRITE_MAX and not self._paused and not self._backlog and self._transport is not None:
                self._queued -= len(content)
                self._transport.write(content)
                return
            self._backlog.append(memoryview(content))
        self._pump()

    def _pump(self) -> None:
        """Hands to the transport what it takes."""
        transport, backlog = self._transport, self._backlog
        while backlog and not self._paused and transport is not None:
            content = backlog.popleft()
            if len(content) > WRITE_MAX:
                backlog.appendleft(content[WRITE_MAX:])
                content = content[:WRITE_MAX]
            self._queued -= len(content)
            transport.write(content)

    def _close(self, reason: str, *, abort: bool) -> None:
        if self._closed:
            return
        if not abort and self._transport is not None:
            self._transport.write(b"".join((*self._backlog, *self._out)))
        self._closed = True
        self._reason = self._reason or reason
        self._out.clear()
        self._backlog.clear()
        self._queued = 0
        self._chunks.clear()
        transport = self._transport
        if transport is not None:
            if abort:
                transport.abort()
            else:
                transport.close()
                self._loop.call_later(LINGER_SECONDS, self._stop_lingering)
        self._loop.call_soon(self._report)

    def _stop_lingering(self) -> None:
        if self in self._live and self._transport is not None:
            self._transport.abort()

    def _report(self) -> None:
        if self._greeted is not None and not self._greeted.done():
            self._greeted.set_exception(ConnectionAbortedError(self._reason))
        if self._handler is None or self._reported or self._held:
            return
        self._reported = True
        handler, reason = self._handler, self._reason
        try:
            handler.broken(reason)
        except Exception as error:
            self._fatal(error, "a connection's broken()")


def _sentence(error: Exception) -> str:
    """What a break's exception says, on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


@final
class Streams(set[Stream]):
    """Those that live, of one kind: each adds and removes itself."""

    def close(self) -> None:
        """They send what they can and break."""
        for stream in list(self):
            stream.close()

    def drop(self) -> None:
        """At once, whatever they still have to send."""
        for stream in list(self):
            stream.drop()
