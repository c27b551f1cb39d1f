"""Targets: everything that turns bytes from outside into values.

A decoder may take its input or refuse it with the documented error. Its canary is a decoder that lets one kind of
refusal through as an ordinary exception: it fails as soon as a case is refused, so it proves that refusals happen.
"""

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from corral.api.fence import parse_fencing
from corral.base.errors import ConfigurationError, PeerError
from corral.base.world import StoreDamaged
from corral.cman import lift_wire
from corral.cman import wire as cman_wire
from corral.comm import seal
from corral.comm import wire as comm_wire
from corral.dlm import wire as dlm_wire
from corral.fence import wire as fence_wire
from corral.fuse import protocol as fuse
from corral.gfs import format as gfs_format
from corral.gfs import superblock
from corral.node import config
from corral.providers import ipc_wire
from corral.providers.agents.metadata import parse_metadata
from corral.real import address, identity, store
from corral.wire import frame
from corral.wire.codec import Codec
from tests.fuzz.generate import INTERESTING, Values, damage, encode
from tests.fuzz.target import Target

Decode = Callable[[Any], Any]
Make = Callable[[Random], Any]


def decoder(name: str, make: Make, decode: Decode, refusals: tuple[type[Exception], ...]) -> Target:
    def case(random: Random) -> str:
        try:
            decode(make(random))
        except refusals as refusal:
            sentence = str(refusal)
            assert sentence, "a refusal without a word"
            assert len(sentence) < 20_000, "a refusal that repeats its input"
            return "refused"
        return "taken"

    def canary(random: Random) -> str:
        decode(make(random))
        return "taken"

    return Target(name, case, canary, ("taken", "refused"))


# --- message families ------------------------------------------------------------------------------------------------

VALUES = Values()


def messages(name: str, codec: Codec[Any]) -> Target:
    """Values of the family, half of them damaged; what is taken must come back the same."""

    def make(random: Random) -> bytes:
        for _ in range(10):
            data = encode(VALUES.of(random.choice(codec.types), random))
            if data is not None:
                return data if random.random() < 0.5 else damage(data, random)
        return b""

    def decode(data: bytes) -> None:
        message = codec.decode(data)
        assert codec.decode(codec.encode(message)) == message, "does not survive being sent on"

    return decoder(name, make, decode, (PeerError,))


def dlm_batch(random: Random) -> bytes:
    """A body of a few messages, now and then of more than one may hold; half of them damaged."""
    some = [VALUES.of(random.choice(dlm_wire.CODEC.types), random) for _ in range(random.choice((1, 2, 3, 64, 70)))]
    data = encode(some)
    if data is None:
        return b""
    return data if random.random() < 0.5 else damage(data, random)


def frame_bytes(random: Random) -> bytes:
    body = random.randbytes(random.choice((0, 1, 40, 300)))
    kind = random.randrange(9)
    numbers = [random.choice(INTERESTING[:26]) for _ in range(4)]
    head = frame.pack_header(kind, 3, numbers[0] & 0xFFFFFFFF, numbers[1], numbers[2], numbers[3], len(body))
    return head + body if random.random() < 0.4 else damage(head + body, random)


def control_frame(random: Random) -> bytes:
    kind = random.choice(sorted(comm_wire.BODIES))
    body = encode(VALUES.of(comm_wire.BODIES[kind], random)) or b""
    if random.random() < 0.3:
        good = comm_wire.Close(1, "leaving") if random.random() < 0.5 else comm_wire.Refuse(1, (1, 1, 0), "wait")  # type: ignore[arg-type]
        kind, body = (frame.CLOSE if isinstance(good, comm_wire.Close) else frame.REFUSE), comm_wire.CODEC.encode(good)
    whole = frame.pack_header(kind, 0, 0, 0, 0, 0, len(body)) + body
    return whole if random.random() < 0.6 else damage(whole, random)


OPENER_KEY = bytes(32)


def datagram(random: Random) -> bytes:
    sealer = seal.Sealer(OPENER_KEY, 7, random.choice((0, 1, 4095, 4096)), 0)
    sealed = b""
    for _ in range(random.choice((1, 2, 70))):
        sealed = sealer.seal(random.randbytes(random.choice((0, 10, seal.PAYLOAD_MAX))))
    return sealed if random.random() < 0.5 else damage(sealed, random)


def open_datagram(data: bytes) -> None:
    header = seal.parse(data)
    opener = seal.Opener(OPENER_KEY, 7)
    if opener.open(data, header) == seal.FRESH:
        assert opener.open(data, header) == seal.REPLAYED, "a datagram opened twice"
        seal.payload_of(data)


# --- files and texts -------------------------------------------------------------------------------------------------

AGENTS = sorted((Path(__file__).parents[1] / "unit" / "fence" / "metadata").glob("*.xml"))
XML_PIECES = (
    b"<parameter name='x'>", b"</parameter>", b"<!DOCTYPE a>", b"<!ENTITY b 'c'>", b"&amp;", b"&#0;", b"&lt;",
    b"<![CDATA[", b"<?xml version='9'?>", b"<a b='",
    b"<content type='select'>", b"<option/>", b"<action/>", b"<resource-agent>", b"\xc3\x28",
)  # fmt: skip


def metadata_document(random: Random) -> bytes:
    document = bytearray(random.choice(AGENTS).read_bytes()[: random.choice((2000, 100_000))])
    if random.random() < 0.3:
        return bytes(document)
    for _ in range(random.randint(0, 3)):
        start = random.randrange(len(document))
        document[start:start] = random.choice(XML_PIECES) * random.choice((1, 1, 3, 2000))
    return damage(bytes(document), random)


def read_metadata(document: bytes) -> None:
    metadata = parse_metadata(document, "fence_fuzz")
    with contextlib.suppress(ConfigurationError):
        metadata.check(dict.fromkeys(list(metadata.parameters)[::2], "1"), action="reboot", where="device d")


CONFIGURATION = """
[cluster]
name = "home"
uuid = "7d0a1f3c-5b8e-4a8b-9c3e-0c9d5a8b1e2f"
detect = 2.0
[[node]]
id = 1
address = "192.0.2.1:7400"
[[node]]
id = 2
address = "[2001:db8::2]:7400"
[fence]
post_join_delay = 6.0
[[fence.devices]]
name = "pdu"
agent = "fence_apc"
parameters = { ip = "10.0.0.9", password = "secret" }
[[fence.nodes.1.methods]]
name = "power"
devices = ["pdu", [{ device = "pdu", parameters = { plug = "1" } }]]
[[fence.nodes.2.methods]]
name = "power"
devices = ["pdu"]
"""
TOML_PIECES = (
    "9" * 5000, "nan", "inf", "-inf", "1e999", "0x7fffffffffffffff", "[" * 2000, "{a=" * 500, '"""',
    "1979-05-27T07:32:00Z",
    "[[node]]", "[fence.nodes.1]", "true", '"\\u0000"', "id = 1\n", "-1", "=", "\n", "", "'", "9999999999999999999999",
    '"' + "٣" * 5 + '"', '"h:' + "1" * 5000 + '"', "[]", "{}",
)  # fmt: skip


def configuration_text(random: Random) -> str:
    text = CONFIGURATION
    for _ in range(random.choice((0, 1, 1, 2, 5))):
        lines = text.split("\n")
        at = random.randrange(len(lines))
        piece = random.choice(TOML_PIECES)
        key, equals, _ = lines[at].partition("=")
        how = random.random()
        if how < 0.6 and equals:
            lines[at] = f"{key}= {piece}"
        elif how < 0.8:
            lines[at] = piece
        else:
            del lines[at]
        text = "\n".join(lines)
    return text


def fence_table(random: Random) -> dict[str, Any]:
    """Values of any type where a table is expected, with some of the right keys."""

    def value(depth: int) -> Any:
        kind = random.randrange(9 if depth < 4 else 6)
        if kind < 6:
            return (random.choice(INTERESTING), 1.5, "pdu", "", True, "power")[kind]
        if kind == 6:
            return [value(depth + 1) for _ in range(random.randint(0, 3))]
        keys = ("devices", "nodes", "methods", "name", "agent", "device", "parameters", "1", "2", "delay", "proof", "x")
        return {random.choice(keys): value(depth + 1) for _ in range(random.randint(0, 4))}

    if random.random() < 0.3:
        method = {"name": "m", "devices": ["pdu", value(2)] if random.random() < 0.5 else ["pdu"]}
        return {
            "devices": [{"name": "pdu", "agent": "manual"}],
            "nodes": {"1": {"methods": [{"name": "m", "devices": ["pdu"]}]}, "2": {"methods": [method]}},
        }
    table = value(0)
    return table if isinstance(table, dict) else {"devices": table}


def store_file(random: Random) -> bytes:
    content = store.MAGIC.ljust(store.HEADER_SIZE, b"\0")
    for sequence in range(1, random.randint(1, 6)):
        records = [random.randbytes(random.choice((0, 5, 200))) for _ in range(random.randint(1, 3))]
        content += store.pack_frame(sequence, records)
    return content if random.random() < 0.3 else damage(content, random)


def address_text(random: Random) -> str:
    if random.random() < 0.2:
        return random.choice(("localhost:0", "10.0.0.1:7400", "[::1]:65535", "[::1]:65536"))
    parts = ("localhost", "10.0.0.1", "[::1]", "::1", "[", "]", ":", "7400", "0", "65536", "9" * 500, "٣", "", " ")
    return "".join(random.choice(parts) for _ in range(random.randint(0, 5)))


def uri_text(random: Random) -> str:
    if random.random() < 0.3:
        return identity.node_uri(random.choice(("home", "a/b", "é")), random.choice((1, 0, 4095, 4096)))
    parts = ("corral://", "corral:", "//", "home", "/", "node", "1", "4096", "9" * 5000, "?", "#", "%00", "é", "")
    return "".join(random.choice(parts) for _ in range(random.randint(0, 6)))


def refuse_none(decode: Decode) -> Decode:
    """For decoders that answer None: a refusal like another."""

    def refuse(data: Any) -> None:
        if decode(data) is None:
            raise PeerError("None")

    return refuse


# --- disk and kernel -------------------------------------------------------------------------------------------------


def superblock_block(random: Random) -> bytes:
    good = superblock.Superblock(
        gfs_format.VERSION, gfs_format.BLOCK, 0, 0, 0, bytes(16), 1, 1000, 100, 101, 1, 500, 1, 8, 0, 0,
        b"c:n".ljust(64, b"\0"),
    )  # fmt: skip
    names = [name for name in good.__struct_fields__ if isinstance(getattr(good, name), int)]
    values = {name: getattr(good, name) for name in good.__struct_fields__}
    for _ in range(random.randint(0, 2)):
        values[random.choice(names)] = random.choice(INTERESTING[:21])
    number = gfs_format.SUPERBLOCK_AT
    image = good.image(number)
    with contextlib.suppress(struct.error):  # a value that its field cannot hold: damage alone must do
        image = superblock.Superblock(**values).image(number)
    # A device reads whole blocks, whatever is in them.
    return image if random.random() < 0.7 else damage(image, random)[: gfs_format.BLOCK].ljust(gfs_format.BLOCK, b"\0")


def fuse_request(random: Random) -> tuple[int, int, bytearray, memoryview]:
    opcodes = [opcode for opcode, layout in enumerate(fuse.LAYOUTS) if layout is not None]
    opcode = random.choice(opcodes)
    size, _, _ = fuse.LAYOUTS[opcode]
    tail = b"".join(
        random.choice((b"name\0", b"a", b"\0", b"/", b"x" * 300 + b"\0", b"")) for _ in range(random.randint(0, 3))
    )
    body = random.randbytes(size) + tail
    if random.random() < 0.3:
        body = damage(body, random)
    header = bytearray(fuse.HEADER_BUFFER)
    rest = bytearray(4096)
    room = fuse.HEADER_BUFFER - fuse.HEADER_SIZE
    header[fuse.HEADER_SIZE : fuse.HEADER_SIZE + min(room, len(body))] = body[:room]
    rest[: len(body[room:][:4096])] = body[room:][:4096]
    length = fuse.HEADER_SIZE + len(body)
    if random.random() < 0.2:
        length = random.choice((fuse.HEADER_SIZE, fuse.HEADER_SIZE + 1, length + 1, length + 5000))
    return opcode, length, header, memoryview(bytes(rest))


def targets() -> list[Target]:
    peer = (PeerError,)
    operator = (ConfigurationError,)
    return [
        decoder("frame", frame_bytes, frame.parse, peer),
        decoder("comm-control", control_frame, lambda data: comm_wire.body_of(frame.parse(data)), peer),
        decoder("comm-datagram", datagram, open_datagram, peer),
        messages("cman-heartbeats", cman_wire.HEARTBEATS),
        messages("cman-messages", cman_wire.MESSAGES),
        messages("cman-records", cman_wire.RECORDS),
        messages("lift-messages", lift_wire.CODEC),
        messages("lift-state", lift_wire.STATE_CODEC),
        messages("lift-attachment", lift_wire.ATTACHMENT_CODEC),
        messages("fence-messages", fence_wire.CODEC),
        messages("dlm-messages", dlm_wire.CODEC),
        decoder("dlm-batches", dlm_batch, dlm_wire.BATCHES.decode, peer),
        messages("ipc-to-corrald", ipc_wire.TO_CORRALD),
        messages("ipc-from-corrald", ipc_wire.FROM_CORRALD),
        messages("ipc-to-locks", ipc_wire.TO_LOCK_SERVICE),
        messages("ipc-from-locks", ipc_wire.FROM_LOCK_SERVICE),
        decoder("fence-metadata", metadata_document, read_metadata, operator),
        decoder("configuration", configuration_text, lambda text: config.parse(text, "cluster.toml"), operator),
        decoder("fence-table", fence_table, lambda table: parse_fencing(table, [1, 2]), operator),
        decoder("store", store_file, lambda content: store.parse(content, "store"), (StoreDamaged,)),
        decoder("address", address_text, address.parse, (ValueError,)),
        decoder("node-uri", uri_text, refuse_none(identity.parse_node_uri), peer),
        decoder(
            "superblock",
            superblock_block,
            lambda block: superblock.parse(block, gfs_format.SUPERBLOCK_AT, 1000),
            (gfs_format.BlockDamaged, superblock.Refused),
        ),
        decoder("fuse-request", fuse_request, refuse_none(lambda request: fuse.decode(*request)), peer),
    ]
