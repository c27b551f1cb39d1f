"""The header of every frame between two members (docs/format/wire.md).

Little-endian, 40 bytes:

====== ==== ======== =============================================================================
offset size name     meaning
====== ==== ======== =============================================================================
0      2    magic    0x4C43 ("CL")
2      1    version  1
3      1    kind     DATA, ACK, HELLO, WELCOME, REFUSE, CLOSE (append-only)
4      2    port     which engine; for a service group its group number
6      2    reserved zero on write, ignored on read
8      4    length   bytes of body that follow
12     4    round    round of the group the frame belongs to; 0 for ports without rounds
16     8    sequence DATA: 1, 2, 3 ... within the session; else 0
24     8    ack      highest sequence received in order from the peer in this session
32     8    session  number of the session, chosen by the side with the lower member id
====== ==== ======== =============================================================================
"""

import struct
from typing import Final, NamedTuple

from corral.base.errors import PeerError
from corral.wire.codec import MESSAGE_MAX

MAGIC: Final = 0x4C43
VERSION: Final = 1
HEADER: Final = struct.Struct("<HBBHHIIQQQ")
assert HEADER.size == 40

DATA: Final = 1
ACK: Final = 2
HELLO: Final = 3
WELCOME: Final = 4
REFUSE: Final = 5
CLOSE: Final = 6
KINDS: Final = frozenset((DATA, ACK, HELLO, WELCOME, REFUSE, CLOSE))

# Ports of corrald's own engines; service groups use numbers from GROUP_PORT_MIN up, given out with the group.
PORT_CMAN: Final = 1
PORT_LIFT: Final = 2
PORT_FENCE: Final = 3
PORT_GROUP: Final = 4
PORT_EVENT: Final = 5
GROUP_PORT_MIN: Final = 64
USER_PORT_MIN: Final = 49152  # from here on a full queue is the sender's business: Busy instead of a broken session
PORT_MAX: Final = 65535


class Frame(NamedTuple):
    kind: int
    port: int
    round: int
    sequence: int
    ack: int
    session: int
    body: memoryview | bytes


def pack_header(kind: int, port: int, round_id: int, sequence: int, ack: int, session: int, length: int) -> bytes:
    return HEADER.pack(MAGIC, VERSION, kind, port, 0, length, round_id, sequence, ack, session)


def parse(message: bytes) -> Frame:
    """One whole message (header and body) as the network delivered it. Raises PeerError."""
    if len(message) < HEADER.size:
        raise PeerError(f"frame of {len(message)} bytes is shorter than its header")
    magic, version, kind, port, _reserved, length, round_id, sequence, ack, session = HEADER.unpack_from(message)
    if magic != MAGIC:
        raise PeerError(f"frame begins with {magic:#06x}, not with {MAGIC:#06x}")
    if version != VERSION:
        raise PeerError(f"frame of version {version}; this is version {VERSION}")
    if kind not in KINDS:
        raise PeerError(f"unknown frame kind {kind}")
    if length != len(message) - HEADER.size:
        raise PeerError(f"frame says {length} bytes of body and carries {len(message) - HEADER.size}")
    if length > MESSAGE_MAX:
        raise PeerError(f"frame body of {length} bytes exceeds {MESSAGE_MAX}")
    return Frame(kind, port, round_id, sequence, ack, session, memoryview(message)[HEADER.size :])
