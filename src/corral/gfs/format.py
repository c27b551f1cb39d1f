"""Bytes on the shared disk: the constants and layouts of docs/format/disk.md (normative), and the seal on every block.

A `Layout` names the fields of one structure in order; a unit test compares each with its table in the document.
Everything that is journaled starts with the 32-byte block header: magic, type, checksum, own address, generation.
`seal` fills it, `check` verifies it and raises `BlockDamaged` with a reason that can be counted and shown.
"""

import zlib
from struct import Struct, calcsize
from typing import Any, Final, final

import google_crc32c

BLOCK: Final = 4096
SECTOR: Final = 512
MAGIC: Final = 0x4C41524F  # "ORAL", little-endian
VERSION: Final = 1
SUPERBLOCK_AT: Final = 16  # block number: the first 64 KiB stay untouched

# Block types. Append only; numbers are never reused.
SUPERBLOCK: Final = 1
RGRP: Final = 2
RGRP_BITMAP: Final = 3  # reserved
DINODE: Final = 4
EXTENT_NODE: Final = 5
LEAF: Final = 6
TABLE: Final = 7
LOG_HEADER: Final = 8
LOG_DESCRIPTOR: Final = 9
XATTR: Final = 10  # reserved
XATTR_DATA: Final = 11  # reserved
LOG_REVOKES: Final = 12
RINDEX: Final = 13
TYPE_NAMES: Final = {
    SUPERBLOCK: "superblock",
    RGRP: "resource group",
    RGRP_BITMAP: "resource group bitmap",
    DINODE: "dinode",
    EXTENT_NODE: "extent node",
    LEAF: "directory leaf",
    TABLE: "directory table",
    LOG_HEADER: "log header",
    LOG_DESCRIPTOR: "log descriptor",
    XATTR: "extended attributes",
    XATTR_DATA: "extended attribute data",
    LOG_REVOKES: "log revokes",
    RINDEX: "resource group index",
}

# Block states in a resource group's bitmap: two bits, four blocks a byte, lowest bits first.
FREE: Final = 0
USED: Final = 1
UNLINKED: Final = 2
DINODE_STATE: Final = 3
STATE_NAMES: Final = ("FREE", "USED", "UNLINKED", "DINODE")

# Flags of a dinode.
STUFFED: Final = 0x1
SYSTEM: Final = 0x2
EXHASH: Final = 0x4
TRUNCATING: Final = 0x8

# Flags of a log header.
UNMOUNT: Final = 0x1

# Flags of an extent.
UNWRITTEN: Final = 0x1

# Features. A mount refuses unknown INCOMPATIBLE bits, and to write with unknown READ_ONLY_COMPATIBLE ones.
FEATURES_COMPATIBLE: Final = 0
FEATURES_READ_ONLY: Final = 0
FEATURES_INCOMPATIBLE: Final = 0x1  # EXTENTS_EXHASH_CLUSTERS: the format of version 1


class BlockDamaged(Exception):
    """A block is not what its place says it should be. `number`: its address; the message says what is wrong."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"block {number}: {reason}")
        self.number = number
        self.reason = reason


@final
class Layout:
    """One fixed structure: fields (name, struct code) in order, little-endian, no implicit padding.

    A field named `reserved` has a pad code ("8x"): zero on write, ignored on read.
    """

    __slots__ = ("fields", "name", "pack", "pack_into", "size", "unpack_from")

    def __init__(self, name: str, *fields: tuple[str, str]) -> None:
        form = Struct("<" + "".join(code for _, code in fields))
        self.name = name
        self.size = form.size
        self.pack = form.pack
        self.pack_into = form.pack_into
        self.unpack_from = form.unpack_from
        offset = 0
        table: list[tuple[int, int, str]] = []
        for field, code in fields:
            table.append((offset, calcsize("<" + code), field))
            offset += calcsize("<" + code)
        self.fields: Final = tuple(table)

    def names(self) -> list[str]:
        return [name for _, _, name in self.fields if name != "reserved"]

    def read(self, block: Any, offset: int = 0) -> dict[str, Any]:
        """By name; for tools and tests (hot paths use `unpack_from`)."""
        return dict(zip(self.names(), self.unpack_from(block, offset), strict=True))


HEADER: Final = Layout(
    "block header",
    ("magic", "I"),
    ("type", "H"),
    ("reserved", "2x"),
    ("checksum", "I"),
    ("reserved", "4x"),
    ("number", "Q"),
    ("generation", "Q"),
)
HEADER_SIZE: Final = 32
_CHECKSUM: Final = Struct("<I")
_CHECKSUM_AT: Final = 8

SUPER: Final = Layout(
    "superblock",
    ("version", "I"),
    ("block_size", "I"),
    ("compatible", "Q"),
    ("read_only_compatible", "Q"),
    ("incompatible", "Q"),
    ("uuid", "16s"),
    ("created_ns", "Q"),
    ("blocks", "Q"),
    ("master", "Q"),
    ("root", "Q"),
    ("rgrps", "I"),
    ("rgrp_blocks", "I"),
    ("journals", "I"),
    ("cluster_blocks", "I"),
    ("copy_1", "Q"),
    ("copy_2", "Q"),
    ("lock_table", "64s"),
    ("reserved", "64x"),
)

RGRP_HEAD: Final = Layout(
    "resource group",
    ("flags", "I"),
    ("free", "I"),
    ("dinodes", "I"),
    ("unlinked", "I"),
    ("data0", "Q"),
    ("blocks", "I"),
    ("index", "I"),
    ("clusters", "32s"),
    ("reserved", "32x"),
)
BITMAP_AT: Final = 128
BITMAP_SIZE: Final = BLOCK - BITMAP_AT  # 3968
RGRP_BLOCKS_MAX: Final = BITMAP_SIZE * 4  # 15872
CLUSTER: Final = 64  # blocks in an inode cluster: 16 bytes of bitmap
CLUSTER_BYTES: Final = CLUSTER // 4

RINDEX_ENTRY: Final = Layout("rindex entry", ("address", "Q"), ("data0", "Q"), ("blocks", "I"), ("flags", "I"))
RINDEX_AT: Final = 64
RINDEX_MAX: Final = (BLOCK - RINDEX_AT) // RINDEX_ENTRY.size  # 168
RINDEX_HEAD: Final = Layout("rindex block", ("count", "I"), ("index", "I"), ("reserved", "24x"))

DINODE_HEAD: Final = Layout(
    "dinode",
    ("formal", "Q"),
    ("mode", "I"),
    ("uid", "I"),
    ("gid", "I"),
    ("nlink", "I"),
    ("size", "Q"),
    ("blocks", "Q"),
    ("atime_ns", "q"),
    ("mtime_ns", "q"),
    ("ctime_ns", "q"),
    ("btime_ns", "q"),
    ("rdev", "I"),
    ("flags", "I"),
    ("height", "B"),
    ("depth", "B"),
    ("items", "H"),
    ("xattr_inline", "H"),
    ("reserved", "2x"),
    ("entries", "Q"),
    ("parent", "Q"),
    ("parent_formal", "Q"),
    ("xattr", "Q"),
    ("goal_data", "Q"),
    ("goal_dinode", "Q"),
    ("reserved", "88x"),
)
PAYLOAD_AT: Final = 256
PAYLOAD: Final = BLOCK - PAYLOAD_AT  # 3840

EXTENT: Final = Layout("extent", ("logical", "Q"), ("physical", "Q"), ("count", "I"), ("flags", "I"))
INDEX: Final = Layout("index entry", ("logical", "Q"), ("child", "Q"), ("reserved", "8x"))
NODE_HEAD: Final = Layout(
    "extent node", ("level", "H"), ("items", "H"), ("reserved", "4x"), ("inode", "Q"), ("reserved", "16x")
)
NODE_AT: Final = 64
ROOT_ITEMS: Final = PAYLOAD // EXTENT.size  # 160
NODE_ITEMS: Final = (BLOCK - NODE_AT) // EXTENT.size  # 168
HEIGHT_MAX: Final = 3

DIRENT: Final = Layout(
    "dirent",
    ("formal", "Q"),
    ("number", "Q"),
    ("hash", "I"),
    ("length", "H"),
    ("name_length", "B"),
    ("type", "B"),
)
NAME_MAX: Final = 255
LEAF_HEAD: Final = Layout(
    "directory leaf",
    ("depth", "H"),
    ("used", "H"),
    ("entries", "H"),
    ("reserved", "2x"),
    ("next", "Q"),
    ("directory", "Q"),
    ("reserved", "8x"),
)
LEAF_AT: Final = 64
LEAF_SIZE: Final = BLOCK - LEAF_AT  # 4032
TABLE_HEAD: Final = Layout(
    "directory table", ("index", "I"), ("reserved", "4x"), ("directory", "Q"), ("reserved", "16x")
)
TABLE_AT: Final = 64
TABLE_POINTERS: Final = 256  # in one table block
INLINE_DEPTH: Final = 8  # up to 2^8 pointers lie in the dinode
DEPTH_MAX: Final = 16  # 2^8 table blocks; beyond it leaves are chained

LOG_HEAD: Final = Layout(
    "log header",
    ("sequence", "Q"),
    ("flags", "I"),
    ("slot", "I"),
    ("position", "Q"),
    ("tail", "Q"),
    ("tail_sequence", "Q"),
    ("length", "I"),
    ("descriptors", "I"),
    ("revoke_blocks", "I"),
    ("tags", "I"),
    ("revokes", "I"),
    ("reserved", "4x"),
    ("wall_ns", "Q"),
    ("uuid", "16s"),
)
LOG_LIST: Final = Layout("log list", ("sequence", "Q"), ("count", "I"), ("reserved", "20x"))
LOG_TAG: Final = Layout("log tag", ("number", "Q"), ("checksum", "I"), ("flags", "I"))
LOG_REVOKE: Final = Layout("log revoke", ("number", "Q"))
LOG_AT: Final = 64
LOG_TAGS_MAX: Final = (BLOCK - LOG_AT) // LOG_TAG.size  # 252
LOG_REVOKES_MAX: Final = (BLOCK - LOG_AT) // LOG_REVOKE.size  # 504

STATFS: Final = Layout("statfs", ("total", "q"), ("free", "q"), ("dinodes", "q"))
INUM: Final = Layout("inum", ("next", "Q"))
INUM_RANGE: Final = Layout("inum range", ("next", "Q"), ("end", "Q"))
INUM_RANGE_LENGTH: Final = 1 << 20
QUOTA: Final = Layout("quota", ("limit", "Q"), ("warn", "Q"), ("value", "q"), ("reserved", "8x"))
QUOTA_CHANGE: Final = Layout("quota change", ("change", "q"), ("flags", "I"), ("id", "I"))

LAYOUTS: Final = (
    HEADER,
    SUPER,
    RGRP_HEAD,
    RINDEX_HEAD,
    RINDEX_ENTRY,
    DINODE_HEAD,
    EXTENT,
    INDEX,
    NODE_HEAD,
    DIRENT,
    LEAF_HEAD,
    TABLE_HEAD,
    LOG_HEAD,
    LOG_LIST,
    LOG_TAG,
    LOG_REVOKE,
    STATFS,
    INUM,
    INUM_RANGE,
    QUOTA,
    QUOTA_CHANGE,
)

ZERO_BLOCK: Final = bytes(BLOCK)


def seal(block: bytearray, kind: int, number: int, generation: int) -> bytes:
    """Fills the header and returns the finished image: what is logged and later written in place."""
    HEADER.pack_into(block, 0, MAGIC, kind, 0, number, generation)
    _CHECKSUM.pack_into(block, _CHECKSUM_AT, google_crc32c.value(bytes(block)))
    return bytes(block)


def checksum_of(image: bytes) -> int:
    """The checksum an image carries (not recomputed)."""
    return int(_CHECKSUM.unpack_from(image, _CHECKSUM_AT)[0])


def verified(image: bytes) -> bool:
    """Magic and checksum are right, whatever the type and the place."""
    if len(image) != BLOCK or HEADER.unpack_from(image)[0] != MAGIC:
        return False
    plain = bytearray(image)
    _CHECKSUM.pack_into(plain, _CHECKSUM_AT, 0)
    return bool(google_crc32c.value(bytes(plain)) == checksum_of(image))


def check(block: bytes | bytearray, kind: int, number: int) -> int:
    """Verifies a block read from address `number`; returns its generation. Raises BlockDamaged."""
    magic, found, checksum, address, generation = HEADER.unpack_from(block)
    if magic != MAGIC:
        raise BlockDamaged(number, "is not a metadata block (wrong magic)")
    plain = bytearray(block)
    _CHECKSUM.pack_into(plain, _CHECKSUM_AT, 0)
    if google_crc32c.value(bytes(plain)) != checksum:
        raise BlockDamaged(number, "checksum does not match")
    if found != kind:
        raise BlockDamaged(number, f"is a {TYPE_NAMES.get(found, found)} instead of a {TYPE_NAMES[kind]}")
    if address != number:
        raise BlockDamaged(number, f"says it is block {address}")
    return int(generation)


def name_hash(name: bytes) -> int:
    """The 32-bit hash that places a name in its directory."""
    return int(google_crc32c.value(name))


def name_cookie(name: bytes, hashed: int) -> int:
    """Where readdir goes on: ordered by hash, then by a second hash of 20 bits; 0, 1 and 2 belong to ".", ".."."""
    return (hashed << 20 | zlib.crc32(name) & 0xFFFFF) + 3
