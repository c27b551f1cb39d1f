"""The lock manager's contract: VMS/Linux semantics, asyncio shape.

Source of the semantics: OpenVMS lock manager, Linux `fs/dlm` (modes, matrices, flags, statuses and their numbers are
those of `dlmconstants.h`); docs/guide/locks.md tells them for users.
"""

from collections.abc import AsyncIterator, Callable, Generator, Sequence
from types import TracebackType
from typing import Any, Final, Protocol

import msgspec

from corral.base.ids import MemberId
from corral.base.time import Seconds

# Modes. Plain ints: they index tables on the hot path.
IV: Final = -1
NL: Final = 0
CR: Final = 1
CW: Final = 2
PR: Final = 3
PW: Final = 4
EX: Final = 5
MODE_NAMES: Final = ("NL", "CR", "CW", "PR", "PW", "EX")

# Flags of a request.
NOQUEUE: Final = 0x1
CANCEL: Final = 0x2
CONVERT: Final = 0x4
VALBLK: Final = 0x8
QUECVT: Final = 0x10
IVVALBLK: Final = 0x20
CONVDEADLK: Final = 0x40
PERSISTENT: Final = 0x80
NODLCKWT: Final = 0x100
NODLCKBLK: Final = 0x200
EXPEDITE: Final = 0x400
NOQUEUEBAST: Final = 0x800
HEADQUE: Final = 0x1000
NOORDER: Final = 0x2000
ORPHAN: Final = 0x4000
ALTPR: Final = 0x8000
ALTCW: Final = 0x10000
FORCEUNLOCK: Final = 0x20000
TIMEOUT: Final = 0x40000

# Bits of a query (`Request.flags` of "query"); numbers of the 2004 API.
THIS_LOCK: Final = 0x7  # in the place of a mode: that of the asking lock
QUERY_MODE: Final = 0x7  # mask: the mode to compare with
QUEUE_WAIT: Final = 0x8
QUEUE_CONVERT: Final = 0x10
QUEUE_GRANT: Final = 0x20
QUERY_QUEUES: Final = 0x38  # all three, and the mask
QUERY_LOCAL: Final = 0x40  # only what is known without asking another member
QUERY_HIGHER: Final = 0x100
QUERY_LOWER: Final = 0x200
QUERY_EQUAL: Final = 0x300
QUERY_BLOCKING: Final = 0x400  # granted locks in the way of what the asking lock (or the mode) wants
QUERY_NOT_BLOCKING: Final = 0x500
QUERY_ALL: Final = 0x600
QUERY_KIND: Final = 0xF00  # mask
QUERY_REQUESTED: Final = 0x1000  # compare requested modes, not granted ones

# Flags of a completion.
DEMOTED: Final = 0x1
VALNOTVALID: Final = 0x2
ALTMODE: Final = 0x4

# Statuses of a completion: 0, a negative errno, or one of these.
ECANCEL: Final = -0x10001
EUNLOCK: Final = -0x10002  # a successful unlock

WARN_NS: Final = 5_000_000_000  # a wait longer than this is told (`LockWaits`)
VALUE_SIZE: Final = 32  # default length of a value block; per lockspace a multiple of 8


class LockInfo(msgspec.Struct, array_like=True, gc=False):
    """One lock in the answer to a query. `lock` is its client's handle, `state` its queue (a QUEUE_* bit); -1: none.

    Ranges are (first, last) of the granted and the requested mode; None: everything.
    """

    member: MemberId
    client: int
    lock: int
    owner: int
    state: int
    granted: int
    requested: int
    token: int
    range: tuple[int, int] | None = None
    requested_range: tuple[int, int] | None = None


class ResourceInfo(msgspec.Struct, array_like=True, gc=False):
    """The answer to a query: the resource, how many locks it has on each queue, and those that were asked for.

    `sequence` counts the writes of the value block. `master` None: not known here (QUERY_LOCAL).
    """

    name: bytes
    master: MemberId | None
    granted: int
    converting: int
    waiting: int
    value: bytes
    value_valid: bool
    sequence: int
    locks: list[LockInfo]


class LockWaits(msgspec.Struct, array_like=True, gc=False):
    """A request or conversion has waited for longer than the lockspace finds normal (5 s). Told once; it waits on.

    `lock` is the client's handle. `blockers`: the granted locks in its way, or if there are none those that are before
    it in the queues, at most 16; empty while the lockspace recovers.
    """

    lock: int
    resource: bytes
    mode: int
    waited_ns: int
    blockers: list[LockInfo]


class SpaceState(msgspec.Struct, frozen=True):
    """What a lockspace can promise here now (DESIGN 5). `state` is one of

    "running"    requests are answered, held locks are guaranteed
    "suspended"  a recovery runs: held locks stay, bodies go on, requests wait
    "lapsed"     the lease has lapsed: `held.valid` is False, kept locks are not taken again, requests wait
    "lost"       every lock is lost for good
    """

    state: str
    reason: str


SpaceEvent = SpaceState | LockWaits


class Completion(msgspec.Struct, array_like=True, gc=False):
    """What became of a request. `mode` is the granted mode after it; `value` is readable beside `value_valid`.
    `report` answers a query.
    """

    status: int
    flags: int
    mode: int
    value: bytes
    value_valid: bool
    token: int
    report: ResourceInfo | None = None


class Request(msgspec.Struct, array_like=True, gc=False):
    """One operation for `submit`.

    `op`: "lock" | "convert" | "unlock" | "cancel" | "purge" | "query". `lock` names the handle for the next three.
    `owner` is 0 for the default (the handle itself) or any number the client chooses (POSIX owners, transactions).

    `range` is (first, last), both inclusive, 0 to 2**64 - 1: the lock is about that part of the resource only, and in
    nobody's way elsewhere. None: everything; in a "convert" the range stays. A conversion to another range is granted
    like one to another mode, and keeps mode and range until then.

    "purge" unlocks orphans: `lock` is the node where their clients died (0: this one), `owner` the dead client (0:
    every one); it completes with 0 when the unlocks have begun.

    "query" asks who has and who wants a resource: `resource`, or that of the handle `lock` if it is empty. `flags` are
    query bits, `owner` how many locks to tell at most (0: 4096). It completes with 0 and a `report`; with -E2BIG (-7)
    when there were more locks, -ENOENT when nobody uses that name, -EINVAL for bits that do not go together.
    """

    op: str
    resource: bytes = b""
    mode: int = NL
    flags: int = 0
    lock: int = 0
    value: bytes | None = None
    owner: int = 0
    timeout_ns: int = 0  # 0: none
    range: tuple[int, int] | None = None


class Lock(Protocol):
    """A held lock. Losing its guarantee for good raises LockLost in the body of `async with`."""

    @property
    def resource(self) -> bytes: ...
    @property
    def mode(self) -> int: ...
    @property
    def value(self) -> bytes: ...
    @property
    def value_valid(self) -> bool: ...
    @property
    def valid(self) -> bool:
        """False once the lease has lapsed: from then on only the token guards outside effects."""

    @property
    def token(self) -> int:
        """Grows with every grant by the master; unique per resource over the life of the cluster (DESIGN 5)."""

    @property
    def kept(self) -> bool:
        """Asked for with keep=True, idle, and guaranteed: `with` would take it again now."""

    async def convert(
        self,
        mode: int,
        *,
        wait: bool = True,
        value: bytes | None = None,
        timeout: Seconds | None = None,
        flags: int = 0,
    ) -> None: ...

    async def unlock(self, *, value: bytes | None = None) -> None: ...

    def __enter__(self) -> "Lock":
        """Takes a kept lock again without waiting, for a body that does not wait either: that is not cancelled when
        the guarantee is lost. Raises WouldBlock when it is not `kept`, LockLost when it is lost."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def unlock_nowait(self) -> None:
        """The same without waiting for it to be done; nothing happens if it is not held any more."""


class Pending(Protocol):
    """What `lock()` returns: `await` it for a Lock, or `async with` it."""

    def __await__(self) -> Generator[Any, Any, Lock]: ...
    async def __aenter__(self) -> Lock: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Lockspace(Protocol):
    """Granted modes on a resource are pairwise compatible among all unfenced members.

    Cancelling the awaiting task cancels the request; a grant that was already on its way is given back.
    Errors: WouldBlock, TimedOut, Deadlock, LockLost, NoQuorum is never raised (requests wait, bounded by timeout).
    """

    @property
    def name(self) -> str: ...

    def lock(
        self,
        resource: bytes | str,
        mode: int = EX,
        *,
        wait: bool = True,
        timeout: Seconds | None = None,
        keep: bool = False,
        flags: int = 0,
        on_block: Callable[[int], None] | None = None,
    ) -> Pending: ...

    def submit(
        self,
        requests: Sequence[Request],
        completed: Callable[[int, Completion], None] | None,
        blocking: Callable[[int, int], None] | None = None,
    ) -> list[int]:
        """The low level: every flag. Returns a handle per request (for convert, unlock and cancel the given one).
        `completed(handle, completion)` and `blocking(handle, mode)` are called from the loop, never before return;
        with `completed` None nobody is told, and less travels.
        A request that is illegal completes with its negative errno like any other."""

    @property
    def state(self) -> SpaceState:
        """What it can promise now."""

    def watch(self) -> AsyncIterator[SpaceEvent]:
        """The present state and every change of it, and each wait that lasts too long; ends with "lost". Raises Busy
        instead of leaving a gap."""

    async def close(self) -> None: ...
    async def release(self, force: int = 0) -> None:
        """This node leaves the lockspace, for every client here. Raises Busy while it is in use: with `force` 0 by
        locks of clients here or locks of others mastered here, with 1 by locks of clients here; with 2 never."""


class LockManager(Protocol):
    @property
    def local(self) -> bool:
        """True: one member only, single-node shortcuts are allowed."""

    async def lockspace(self, name: str, *, value_size: int = VALUE_SIZE, exclusive: bool = False) -> Lockspace:
        """Raises ClusterError: others have another length, or with `exclusive` this node is in it already."""
