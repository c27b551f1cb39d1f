"""An inode in memory: the dinode's fields, and what its kind of file needs (payload, extents, directory, data cache).

An Inode lives as long as somebody refers to it (kernel lookups, open handles, dirty state) or the cache has room. Its
content is valid only while its glock is held in SH or EX (`loaded`); losing the glock clears `loaded`, not the
references, so the formal number of a reference stays comparable (ESTALE).
"""

from typing import Any, Final, final

from corral.api.gfs import Attributes
from corral.gfs import format as fmt
from corral.gfs.data import FileData
from corral.gfs.directory import Directory
from corral.gfs.extent import ExtentTree, pack_items
from corral.gfs.format import BlockDamaged
from corral.gfs.glock import Glock
from corral.gfs.meta import Meta

S_IFMT: Final = 0o170000
S_IFSOCK: Final = 0o140000
S_IFLNK: Final = 0o120000
S_IFREG: Final = 0o100000
S_IFBLK: Final = 0o060000
S_IFDIR: Final = 0o040000
S_IFCHR: Final = 0o020000
S_IFIFO: Final = 0o010000
KINDS: Final = frozenset((S_IFSOCK, S_IFLNK, S_IFREG, S_IFBLK, S_IFDIR, S_IFCHR, S_IFIFO))


@final
class Inode(Meta):
    __slots__ = (
        "atime_ns",
        "blocks",
        "btime_ns",
        "ctime_ns",
        "data",
        "directory",
        "error",
        "extents",
        "flags",
        "formal",
        "gid",
        "goal_data",
        "goal_dinode",
        "iopen",
        "layout_version",
        "loaded",
        "lookups",
        "metadata_transaction",
        "mode",
        "mtime_ns",
        "nlink",
        "opens",
        "parent",
        "parent_formal",
        "payload",
        "rdev",
        "size",
        "transaction",
        "uid",
        "write_opens",
        "xattr",
        "xattr_inline",
    )

    kind = fmt.DINODE

    def __init__(self, number: int, glock: Glock, formal: int = 0) -> None:
        super().__init__(number, glock)
        self.formal = formal
        self.mode = self.uid = self.gid = self.nlink = self.rdev = 0
        self.size = self.blocks = 0
        self.atime_ns = self.mtime_ns = self.ctime_ns = self.btime_ns = 0
        self.flags = 0
        self.parent = self.parent_formal = 0
        self.xattr = self.xattr_inline = 0
        self.goal_data = self.goal_dinode = 0
        self.payload = bytearray()  # stuffed content of a file, link or system file
        self.extents: ExtentTree | None = None
        self.directory: Directory | None = None
        self.data: FileData | None = None
        self.loaded = False
        self.lookups = 0
        self.opens = 0
        self.write_opens = 0
        self.iopen: Glock | None = None  # held in SH while others must see that it is open here
        self.error = 0  # errno of a failed write-behind, reported once by fsync
        self.transaction = 0  # newest transaction with a change of it
        self.metadata_transaction = 0  # the same, changes of times alone left out: what fdatasync waits for
        self.layout_version = 0  # rises when blocks are taken away: a read-ahead under way is then dropped

    # --- bytes -------------------------------------------------------------------------------------------------------

    def pack(self) -> bytearray:
        block = bytearray(fmt.BLOCK)
        payload: bytes | bytearray = self.payload
        height = depth = items = 0
        directory, extents = self.directory, self.extents
        entries = 0
        if directory is not None:
            payload = directory.pack_payload()
            depth, items, entries = directory.depth, directory.items, directory.entries
        elif extents is not None:
            height, items = extents.height, len(extents.root)
            pack_items(block, fmt.PAYLOAD_AT, height, extents.root)
            payload = b""
        fmt.DINODE_HEAD.pack_into(
            block,
            fmt.HEADER_SIZE,
            self.formal,
            self.mode,
            self.uid,
            self.gid,
            self.nlink,
            self.size,
            self.blocks,
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
            self.btime_ns,
            self.rdev,
            self.flags,
            height,
            depth,
            items,
            self.xattr_inline,
            entries,
            self.parent,
            self.parent_formal,
            self.xattr,
            self.goal_data,
            self.goal_dinode,
        )
        if payload:
            block[fmt.PAYLOAD_AT : fmt.PAYLOAD_AT + len(payload)] = payload
        return block

    async def load(self, block: bytearray, read: Any, blocks: int) -> None:
        """From a block just read. Raises BlockDamaged; the object is unchanged unless it succeeds."""
        generation = fmt.check(block, fmt.DINODE, self.number)
        values = fmt.DINODE_HEAD.unpack_from(block, fmt.HEADER_SIZE)
        mode, flags, height, depth, items = values[1], values[12], values[13], values[14], values[15]
        size, entries = values[5], values[17]
        check_head(self.number, values)
        payload = block[fmt.PAYLOAD_AT :]
        directory = extents = None
        if mode & S_IFMT == S_IFDIR:
            directory = Directory(self)
            await directory.load(
                payload,
                stuffed=bool(flags & fmt.STUFFED),
                items=items,
                depth=depth,
                entries=entries,
                leaf_count=size // fmt.BLOCK,
                read=read,
            )
        elif not flags & fmt.STUFFED and mode & S_IFMT == S_IFREG:
            extents = ExtentTree(self.number, self.glock)
            await extents.load(payload, height, items, read, blocks)
        self.generation = generation
        self._take_head(values)
        self.payload = payload if flags & fmt.STUFFED and directory is None else bytearray()
        self.extents, self.directory = extents, directory
        self.loaded = True

    def _take_head(self, values: tuple[Any, ...]) -> None:
        self.formal, self.mode, self.uid, self.gid, self.nlink, self.size, self.blocks = values[:7]
        self.atime_ns, self.mtime_ns, self.ctime_ns, self.btime_ns, self.rdev, self.flags = values[7:13]
        self.xattr_inline = values[16]
        self.parent, self.parent_formal, self.xattr, self.goal_data, self.goal_dinode = values[18:23]

    def forget_content(self) -> None:
        """The glock is going: nothing cached may be believed any more."""
        assert not self.dirty, "GFS-2"
        self.loaded = False
        self.payload = bytearray()
        self.extents = None
        self.directory = None
        self.data = None
        self.layout_version += 1

    def record(self, layout: fmt.Layout) -> tuple[Any, ...]:
        """The one structure that a system file holds. Raises BlockDamaged when it is too short."""
        if len(self.payload) < layout.size:
            raise BlockDamaged(self.number, f"holds no {layout.name}")
        return layout.unpack_from(self.payload)

    # --- facts -------------------------------------------------------------------------------------------------------

    @property
    def is_directory(self) -> bool:
        return self.mode & S_IFMT == S_IFDIR

    @property
    def is_regular(self) -> bool:
        return self.mode & S_IFMT == S_IFREG

    @property
    def is_idle(self) -> bool:
        """Nobody refers to it: it may leave the cache."""
        return not (self.lookups or self.opens or self.dirty) and (self.data is None or self.data.is_clean)

    def attributes(self, ino: int) -> Attributes:
        return Attributes(
            ino,
            self.mode,
            self.nlink,
            self.uid,
            self.gid,
            self.rdev,
            self.size,
            self.blocks * (fmt.BLOCK // 512),
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
        )


def check_head(number: int, values: tuple[Any, ...]) -> None:
    """What can be said of a dinode's fields alone. Raises BlockDamaged."""
    formal, mode, size, flags = values[0], values[1], values[5], values[12]
    kind = mode & S_IFMT
    if not formal:
        raise BlockDamaged(number, "dinode has no formal number")
    if kind not in KINDS:
        raise BlockDamaged(number, f"dinode has an impossible mode {mode:o}")
    if flags & fmt.STUFFED and size > fmt.PAYLOAD:
        raise BlockDamaged(number, "stuffed content is larger than the payload")
    if size > 1 << 63:
        raise BlockDamaged(number, "impossible size")
    if kind == S_IFLNK and not flags & fmt.STUFFED:
        raise BlockDamaged(number, "symbolic link without a target")
