"""Datagrams that only the peer of this session can have made, and only once (docs/format/wire.md, datagrams).

A datagram is header, payload and a 16-byte keyed BLAKE2b over both. The key is made of two random halves, one from each
side, exchanged in HELLO and WELCOME over TLS; each direction has its own, so a reflected datagram does not open. Every
connection brings new keys (`key_id` is its attempt number); the ones before stay good for receiving within the same
session, because datagrams and the connection do not arrive in step. Replays are told by a counter and a window of 64
(RFC 4303, 3.4.3, is the classic description of the window).
"""

import hashlib
import hmac
import struct
from typing import Final, NamedTuple, final

from corral.base.errors import PeerError
from corral.base.ids import NODE_MAX

MAGIC: Final = 0x4743  # "CG"
VERSION: Final = 1
HEADER: Final = struct.Struct("<HBBIIIQ")
assert HEADER.size == 24
TAG: Final = 16
PAYLOAD_MAX: Final = 1400 - HEADER.size - TAG  # one unfragmented packet on any link
WINDOW: Final = 64
_MASK: Final = (1 << WINDOW) - 1

# What `Opener.open` found. Anything but FRESH is counted under the name in FINDINGS and dropped.
FRESH: Final = 0
FORGED: Final = 1
REPLAYED: Final = 2
UNKNOWN_KEY: Final = 3
FINDINGS: Final = ("fresh", "datagram forged", "datagram replayed", "datagram under an unknown key")


class Datagram(NamedTuple):
    node: int
    serial: int
    key_id: int
    counter: int


def parse(datagram: bytes) -> Datagram:
    """The header, not yet authenticated: good for finding the session only. Raises PeerError."""
    if len(datagram) < HEADER.size + TAG:
        raise PeerError(f"datagram of {len(datagram)} bytes is shorter than header and tag")
    if len(datagram) > HEADER.size + PAYLOAD_MAX + TAG:
        raise PeerError(f"datagram of {len(datagram)} bytes is too long")
    magic, version, _reserved, node, serial, key_id, counter = HEADER.unpack_from(datagram)
    if magic != MAGIC:
        raise PeerError(f"datagram begins with {magic:#06x}, not with {MAGIC:#06x}")
    if version != VERSION:
        raise PeerError(f"datagram of version {version}; this is version {VERSION}")
    if not 1 <= node <= NODE_MAX:
        raise PeerError(f"node {node} is not in 1..{NODE_MAX}")
    return Datagram(node, serial, key_id, counter)


def derive(caller_half: bytes, callee_half: bytes, from_caller: bool) -> bytes:
    """The key of one direction: `caller` is whoever connected."""
    label = b"corral caller->cal" if from_caller else b"corral callee->cal"
    return hashlib.blake2b(caller_half + callee_half + label, digest_size=32).digest()


@final
class Sealer:
    """One direction, outgoing."""

    __slots__ = ("_base", "_counter", "_key_id", "_node", "_serial")

    def __init__(self, key: bytes, key_id: int, node: int, serial: int) -> None:
        self._base = hashlib.blake2b(key=key, digest_size=TAG)
        self._key_id = key_id & 0xFFFFFFFF
        self._node = node
        self._serial = serial
        self._counter = 0

    def seal(self, payload: bytes) -> bytes:
        assert len(payload) <= PAYLOAD_MAX, "heartbeats are bounded by design"
        self._counter += 1
        head = HEADER.pack(MAGIC, VERSION, 0, self._node, self._serial, self._key_id, self._counter)
        sealed = head + payload
        tag = self._base.copy()
        tag.update(sealed)
        return sealed + tag.digest()


@final
class Opener:
    """One direction, incoming, under one key. `seen` has a bit for each of the WINDOW counters up to `highest`."""

    __slots__ = ("_base", "highest", "key_id", "seen")

    def __init__(self, key: bytes, key_id: int) -> None:
        self._base = hashlib.blake2b(key=key, digest_size=TAG)
        self.key_id = key_id & 0xFFFFFFFF
        self.highest = 0
        self.seen = 0

    def open(self, datagram: bytes, header: Datagram) -> int:
        """FRESH, or why not. The tag is checked before the counter moves, so a forger cannot shift the window."""
        counter = header.counter
        age = self.highest - counter
        if counter == 0 or age >= WINDOW or (age >= 0 and self.seen >> age & 1):
            return REPLAYED
        tag = self._base.copy()
        tag.update(memoryview(datagram)[:-TAG])
        if not hmac.compare_digest(tag.digest(), datagram[-TAG:]):
            return FORGED
        if age < 0:
            # Shifting by a hostile distance is bounded: past the window nothing of `seen` is left anyway.
            self.seen = 1 if -age >= WINDOW else (self.seen << -age | 1) & _MASK
            self.highest = counter
        else:
            self.seen |= 1 << age
        return FRESH


def payload_of(datagram: bytes) -> bytes:
    return datagram[HEADER.size : -TAG]
