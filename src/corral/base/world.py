"""The World: all there is outside (DESIGN 3). Two implementations: `corral.real` (asyncio) and `corral.sim` (one seed).

Everything below the doors gets time, chance, network, disks and processes from here and from nowhere else. Both worlds
run on an asyncio event loop (the simulated one in virtual time), so coroutines above the engines may use
`asyncio.Future`, `asyncio.Event` and tasks freely; engines may not.

Invariants, of both (tests/conformance/world_suite.py):
  WORLD-1  a process is called gone only because its pidfd says so, or because its start time or boot id differ
  WORLD-2  `kill` reaches only the process that is meant, never another that got its pid
  WORLD-3  an accepted connection is from a peer whose certificate names a node of our cluster
  WORLD-4  `broken` comes exactly once, and nothing is delivered after it
  WORLD-5  records read back from a store are a prefix of those appended, and hold all whose append returned
  WORLD-6  after a failed sync nothing is reported durable again
  WORLD-7  a write that was started runs to its end; descriptors are not closed under it
  WORLD-8  a shared page of an earlier life never becomes current
  WORLD-9  a timer never fires early
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from random import Random
from typing import Any, NamedTuple, Protocol

from corral.base.ids import NodeId
from corral.base.time import Instant, Nanoseconds

Buffer = bytes | bytearray | memoryview


class Timer(Protocol):
    def cancel(self) -> None: ...


# --- network -------------------------------------------------------------------------------------------------------


class Credentials(NamedTuple):
    """Who is at the other end of a local stream, as the kernel says (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


class ConnectionHandler(Protocol):
    """What the owner of a connection implements. Called from the loop, never re-entrantly from `send`."""

    def received(self, messages: list[bytes]) -> None:
        """Whole messages in the order they were sent; all that one wakeup brought."""

    def broken(self, reason: str) -> None:
        """Exactly once, whoever closed; nothing is delivered after it."""


class Connection(Protocol):
    """Carries whole messages in order and reports its break. What was sent before it may or may not have arrived."""

    @property
    def node(self) -> NodeId | None:
        """The node the peer's certificate names (network); None on a local stream."""

    @property
    def credentials(self) -> Credentials | None:
        """The peer's process (local streams); None on the network."""

    @property
    def pending(self) -> int:
        """Bytes accepted by `send` that have not left this process yet."""

    def send(self, messages: Sequence[Buffer]) -> None:
        """Queue; everything queued in one loop turn leaves in one write. Ignored after a break."""

    def close(self) -> None:
        """Sends what is queued if it can at once, then breaks."""


class Listener(Protocol):
    @property
    def address(self) -> str:
        """The address bound, port resolved when 0 was asked for."""

    def close(self) -> None: ...


class DatagramSocket(Protocol):
    @property
    def address(self) -> str: ...

    def send(self, address: str, payload: bytes) -> None:
        """Best effort: may be lost, repeated, reordered; never blocks, never raises."""

    def close(self) -> None: ...


class Network(Protocol):
    """Mutual TLS connections and plain datagrams. Addresses are `host:port`."""

    async def listen(self, address: str, accept: Callable[[Connection], ConnectionHandler]) -> Listener:
        """`accept` runs after the handshake; a failed handshake is counted and never reaches it."""

    async def connect(self, address: str, node: NodeId, handler: ConnectionHandler) -> Connection:
        """Raises ConnectionRefusedError (nobody listens: the process is gone), else OSError, also when the peer's
        certificate does not name `node` of this cluster."""

    async def datagrams(self, address: str, deliver: Callable[[str, bytes], None]) -> DatagramSocket: ...


class Local(Protocol):
    """Streams within one machine (Unix sockets), whole messages as on the network."""

    async def listen(self, path: str, accept: Callable[[Connection], ConnectionHandler]) -> Listener: ...

    async def connect(self, path: str, handler: ConnectionHandler) -> Connection: ...


# --- processes -----------------------------------------------------------------------------------------------------


class ProcessId(NamedTuple):
    """A process for good: a pid alone is reused. `start` in clock ticks since boot, as /proc/PID/stat says."""

    pid: int
    start: int
    boot_id: str


class Completed(NamedTuple):
    status: int  # exit status, or -signal
    stdout: bytes
    stderr: bytes


class Processes(Protocol):
    @property
    def me(self) -> ProcessId: ...

    def identify(self, pid: int) -> ProcessId | None:
        """None when there is no such process (a zombie is none)."""

    def is_gone(self, process: ProcessId) -> bool:
        """DESIGN 4, *gone*: every thread has ended, or the pid is free or another's; a zombie is gone."""

    def kill(self, process: ProcessId) -> None:
        """SIGKILL through a pidfd, so that a reused pid is never hit. No error when it is gone."""

    async def wait_gone(self, process: ProcessId) -> None: ...

    async def run(self, argv: Sequence[str], stdin: bytes, timeout_ns: Nanoseconds) -> Completed:
        """In a process group of its own, which is killed whole at the timeout; raises TimeoutError then.
        Output is kept to 1 MiB a stream. A program that cannot be started raises OSError."""

    async def enlist(self, path: str) -> "Enlistment":
        """A participant's first act: a shared lock on `path` and this process's line in it, synced (DESIGN 4)."""

    async def muster(self, path: str) -> list[ProcessId] | None:
        """A starting corrald's question: None when the exclusive lock on `path` was had (nobody is left; the file is
        emptied), else the processes listed that are not gone."""


class Enlistment(Protocol):
    def release(self) -> None: ...


# --- storage -------------------------------------------------------------------------------------------------------


class Store(Protocol):
    """A durable log of small records, checksummed; a torn tail is cut off, any other damage raises StoreDamaged."""

    async def read(self) -> list[bytes]: ...

    async def append(self, records: Sequence[bytes]) -> None:
        """Durable on return. Raises OSError when it cannot be (then the caller promises nothing more)."""

    async def replace(self, records: Sequence[bytes]) -> None:
        """Atomically: after a crash either all old or all new records are there."""


class StoreDamaged(Exception):
    """A record other than a torn tail does not check out; the message names file and offset."""


class Disk(Protocol):
    """A shared block device or image. Offsets and lengths are multiples of `block_size` (4096), buffers need not be
    aligned. A write is durable only after a later `flush` returned; unflushed writes may be torn by 512 bytes, lost or
    reordered by a crash. Writes run to their end even when the awaiting task is cancelled."""

    @property
    def block_size(self) -> int: ...

    @property
    def size(self) -> int: ...

    async def read(self, offset: int, length: int) -> bytearray: ...

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """One gathered write."""

    async def flush(self) -> None: ...

    async def discard(self, offset: int, length: int) -> None: ...

    def close(self) -> None: ...


class World(Protocol):
    """Everything outside, for one process."""

    @property
    def rng(self) -> Random:
        """For choices that need no secrecy (back-off); in the simulator part of the seed."""

    @property
    def network(self) -> Network: ...

    @property
    def local(self) -> Local: ...

    @property
    def process(self) -> Processes: ...

    def now(self) -> Instant: ...

    def wall_seconds(self) -> int:
        """Seconds since 1970, for incarnations, log lines and file times; never for a decision about order."""

    def wall_ns(self) -> int:
        """Nanoseconds since 1970, for file times only."""

    def call_at(self, when: Instant, fn: Callable[[], None]) -> Timer: ...

    def at_turn_end(self, fn: Callable[[], None]) -> None:
        """Calls `fn` once when what is ready in this loop turn is done, before what streams were given leaves; for
        whoever gathers what is to go together."""

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """An exception that leaves the coroutine stops this process (in the simulator: fails the run)."""

    def future(self) -> asyncio.Future[Any]: ...

    async def sleep_until(self, when: Instant) -> None: ...

    def random_bytes(self, count: int) -> bytes: ...

    def store(self, name: str) -> Store:
        """A named log in this process's state directory."""

    async def disk(self, name: str) -> Disk:
        """Opens the image or device at path `name`."""

    def page(self, path: str, size: int, *, create: bool) -> memoryview:
        """A small shared mapping (DESIGN 4, the shared page). Writable for the creator and participants."""
