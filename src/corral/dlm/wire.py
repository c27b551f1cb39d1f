"""The lock manager's messages (docs/format/wire.md). Tags are append-only, fields are only ever appended.

A lock is named by its holder's number for it: client << 32 | handle. `operation` counts the operations on that lock;
a master that has answered operation n answers n again from its state, so resending is always safe. Round and group
are in the frame: an engine only sees messages of the round it is in.
"""

from typing import Final

import msgspec

from corral.api.dlm import ResourceInfo
from corral.base.ids import MemberId
from corral.wire.codec import Batches, Codec


class Request(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """A new lock. With `lookup` it goes to the directory, which takes it as well if it is the master itself."""

    lock: int
    operation: int
    name: bytes
    mode: int
    flags: int
    owner: int
    value: bytes | None
    lookup: bool
    range: tuple[int, int] | None = None


class Convert(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    lock: int
    operation: int
    mode: int
    flags: int
    value: bytes | None
    range: tuple[int, int] | None = None


class Unlock(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """In whatever state the lock is; for a lock the master does not have the answer is EUNLOCK as well."""

    lock: int
    operation: int
    flags: int
    value: bytes | None


class Cancel(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """Of `operation` if it still waits. Has no answer of its own: the operation's tells what happened."""

    lock: int
    operation: int


class Completed(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """The one answer to an operation, sent at once or when it is granted."""

    lock: int
    operation: int
    status: int
    flags: int
    mode: int
    token: int
    value: bytes | None
    sequence: int
    current: bool
    range: tuple[int, int] | None = None


class Blocking(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    lock: int
    mode: int


class Master(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    """The directory's answer to a lookup. To the new master itself: start tokens above `floor`."""

    name: bytes
    master: MemberId
    floor: int


class NotMaster(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    """To a Request that came to a member that does not master the name (any more, or yet): look up again."""

    lock: int
    operation: int


class Remove(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=9):
    """Master to directory: nobody uses this name any more; its tokens went up to `token`."""

    name: bytes
    token: int


class Names(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=10):
    """Recovery: I master these names of your directory share."""

    names: list[bytes]


class Claim(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=11):
    """Recovery: who masters these names now? The first to ask does."""

    names: list[bytes]


class Masters(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=12):
    """Recovery: the answer to a Claim, in its order."""

    names: list[bytes]
    masters: list[MemberId]


class RecoverLock(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A lock as its holder knows it. `granted` IV: unknown (a PR/CW conversion). `requested` IV: idle."""

    name: bytes
    lock: int
    owner: int
    granted: int
    requested: int
    flags: int
    operation: int
    token: int
    value: bytes | None
    sequence: int
    current: bool
    range: tuple[int, int] | None = None
    requested_range: tuple[int, int] | None = None


class RecoverLocks(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=13):
    """Recovery: my locks on names that you master now."""

    locks: list[RecoverLock]


class Reached(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=14):
    """Barrier: all I had to send in this stage has been sent to you before this. My value blocks have `value_size`
    bytes (0: not told)."""

    stage: int
    value_size: int = 0


class Purge(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=15):
    """Unlock the orphans that this dead client left on you (0: all). Asked again in each round until answered."""

    number: int
    client: int


class Purged(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=16):
    """The answer to a Purge: the unlocks have begun."""

    number: int


class Query(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=17):
    """To whoever masters the name, or to the directory: who holds and who waits? `mode` as `bits` need it."""

    number: int
    name: bytes
    bits: int
    mode: int
    limit: int


class Queried(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=18):
    """The answer to a Query. Without a report: `master` does, if the sender is the directory and knows."""

    number: int
    status: int
    report: ResourceInfo | None
    master: MemberId | None


CHUNK: Final = 256  # names or locks in one recovery message

TYPES: Final = (
    Request,
    Convert,
    Unlock,
    Cancel,
    Completed,
    Blocking,
    Master,
    NotMaster,
    Remove,
    Names,
    Claim,
    Masters,
    RecoverLocks,
    Reached,
    Purge,
    Purged,
    Query,
    Queried,
)
CODEC: Final[Codec[object]] = Codec(TYPES)
BATCHES: Final[Batches[object]] = Batches(TYPES)  # what travels: one payload for all that one step said to a member
