"""A durable log of small records in one file of the state directory (World.store).

The file, little-endian; frames follow each other without gaps:

====== ==== ======== =====================================================================================
offset size name     meaning
====== ==== ======== =====================================================================================
0      8    magic    b"CORRALS1"
8      8    reserved zero on write, ignored on read
16          frames   one per `append` or `replace`
====== ==== ======== =====================================================================================

A frame holds all records of one append, so a crash can only spoil the last one:

====== ==== ======== =====================================================================================
offset size name     meaning
====== ==== ======== =====================================================================================
0      4    magic    0x4D415246 ("FRAM")
4      4    length   bytes of body
8      8    sequence 1, 2, 3 ... within the file
16     4    body     CRC-32C of the body
20     4    header   CRC-32C of the 20 bytes before
24          body     each record: 4 bytes of length and the record
====== ==== ======== =====================================================================================

*Torn or damaged?* An append returns only when its frame is durable, and the next begins after that. So a bad frame with
a later frame behind it was durable once: that is damage, StoreDamaged. A bad frame with nothing behind it is an append
that a crash cut short: it is cut off. (One that rots as the very last frame cannot be told from that.)

Files are 0600 in a directory of 0700, locked by the process that has them open, and replaced by rename.
"""

import errno
import fcntl
import logging
import os
import struct
from collections.abc import Sequence
from typing import Final, final

import google_crc32c

from corral.base.world import StoreDamaged
from corral.real.workers import Workers

MAGIC: Final = b"CORRALS1"
HEADER_SIZE: Final = 16
FRAME_MAGIC: Final = 0x4D415246
FRAME: Final = struct.Struct("<IIQII")
assert FRAME.size == 24
RECORD_LENGTH: Final = struct.Struct("<I")
STORE_MAX: Final = 64 << 20  # bytes of one file; whoever appends replaces long before

_FRAME_START: Final = struct.pack("<I", FRAME_MAGIC)

log = logging.getLogger("corral.store")


# --- the format, pure ------------------------------------------------------------------------------------------------


def pack_frame(sequence: int, records: Sequence[bytes]) -> bytes:
    pieces: list[bytes] = []
    for record in records:
        pieces.append(RECORD_LENGTH.pack(len(record)))
        pieces.append(record)
    body = b"".join(pieces)
    head = struct.pack("<IIQI", FRAME_MAGIC, len(body), sequence, google_crc32c.value(body))
    return head + struct.pack("<I", google_crc32c.value(head)) + body


def unpack_frame(content: bytes, offset: int) -> tuple[int, list[bytes], int] | None:
    """Sequence, records and end of the frame at `offset`; None when there is no good one."""
    if offset + FRAME.size > len(content):
        return None
    magic, length, sequence, body_crc, head_crc = FRAME.unpack_from(content, offset)
    if magic != FRAME_MAGIC or google_crc32c.value(content[offset : offset + 20]) != head_crc:
        return None
    start, end = offset + FRAME.size, offset + FRAME.size + length
    if end > len(content):
        return None
    body = content[start:end]
    if google_crc32c.value(body) != body_crc:
        return None
    records: list[bytes] = []
    position = 0
    while position < length:
        if position + 4 > length:
            return None
        size: int = RECORD_LENGTH.unpack_from(body, position)[0]
        position += 4 + size
        if position > length:
            return None
        records.append(body[position - size : position])
    return sequence, records, end


def parse(content: bytes, path: str) -> tuple[list[bytes], int, int]:
    """All records, the last good sequence, and the length of the good part. Raises StoreDamaged."""
    if len(content) < HEADER_SIZE or content[:8] != MAGIC:
        raise StoreDamaged(f"{path} does not begin like a store (offset 0): {_ADVICE}")
    records: list[bytes] = []
    offset, sequence = HEADER_SIZE, 0
    while offset < len(content):
        frame = unpack_frame(content, offset)
        if frame is None and not _later_frame(content, offset + 1, sequence):
            return records, sequence, offset
        if frame is None or frame[0] != sequence + 1:
            raise StoreDamaged(f"{path} is damaged at offset {offset}: {_ADVICE}")
        sequence, found, offset = frame
        records.extend(found)
    return records, sequence, offset


def _later_frame(content: bytes, offset: int, sequence: int) -> bool:
    """Is there a good frame, newer than `sequence`, anywhere from `offset` on?"""
    while (offset := content.find(_FRAME_START, offset)) >= 0:
        frame = unpack_frame(content, offset)
        if frame is not None and frame[0] > sequence:
            return True
        offset += 1
    return False


_ADVICE: Final = (
    "the disk or another program changed it; check the disk, then let this node join again without its state "
    "(remove its state directory)"
)


# --- the file --------------------------------------------------------------------------------------------------------


@final
class RealStore:
    """All file work happens in the one thread of `workers`, so appends and replaces are in the order of their calls."""

    def __init__(self, workers: Workers, directory: str, name: str) -> None:
        assert name, "a store needs a name"
        assert "/" not in name, f"store name {name!r}"
        assert not name.startswith("."), f"store name {name!r}"
        self.path: Final = os.path.join(directory, f"{name}.store")
        self._workers = workers
        self._directory = directory
        self._fd = -1
        self._sequence = 0
        self._end = 0
        self._failed: OSError | None = None

    async def read(self) -> list[bytes]:
        records: list[bytes] = await self._workers.submit(self._read)
        return records

    async def append(self, records: Sequence[bytes]) -> None:
        if records:
            await self._workers.submit(self._append, list(records))

    async def replace(self, records: Sequence[bytes]) -> None:
        await self._workers.submit(self._replace, list(records))

    def close(self) -> None:
        """After the workers are idle."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _read(self) -> list[bytes]:
        self._open()
        content = self._content()
        records, self._sequence, self._end = parse(content, self.path)
        if self._end < len(content):
            log.warning(
                "%s: the last write was cut short by a crash; %d bytes dropped", self.path, len(content) - self._end
            )
            os.ftruncate(self._fd, self._end)
            os.fdatasync(self._fd)
        return records

    def _content(self) -> bytes:
        size = os.fstat(self._fd).st_size
        if size > STORE_MAX:
            raise StoreDamaged(f"{self.path} has {size} bytes, more than a store can have ({STORE_MAX}): {_ADVICE}")
        pieces: list[bytes] = []
        offset = 0
        while piece := os.pread(self._fd, size + 1 - offset, offset):
            pieces.append(piece)
            offset += len(piece)
        return b"".join(pieces)

    def _append(self, records: list[bytes]) -> None:
        self._check()
        if self._fd < 0:
            self._read()
        frame = pack_frame(self._sequence + 1, records)
        if self._end + len(frame) > STORE_MAX:
            raise OSError(errno.EFBIG, f"{self.path} would grow over {STORE_MAX >> 20} MiB: replace its records first")
        try:
            _pwrite_all(self._fd, frame, self._end)
        except OSError as error:
            self._cut_back(error)
            raise OSError(
                error.errno, f"{self.path} cannot be written: {error.strerror}; free space or check the disk"
            ) from None
        self._sync(self._fd)
        if os.fstat(self._fd).st_nlink == 0:
            self._fail(errno.ENOENT, "was removed while in use: the state of this node is lost, start it again")
        self._sequence += 1
        self._end += len(frame)

    def _replace(self, records: list[bytes]) -> None:
        self._check()
        if self._fd < 0:
            self._open()
        fresh = MAGIC + bytes(HEADER_SIZE - len(MAGIC)) + (pack_frame(1, records) if records else b"")
        if len(fresh) > STORE_MAX:
            raise OSError(errno.EFBIG, f"{self.path} would have over {STORE_MAX >> 20} MiB")
        fd = self._install(fresh)
        os.close(self._fd)
        self._fd = fd
        self._sequence, self._end = (1 if records else 0), len(fresh)

    def _install(self, content: bytes) -> int:
        """A new file of this content under our name, durable and locked by us."""
        temporary = self.path + ".new"
        fd = -1
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _pwrite_all(fd, content, 0)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
                os.unlink(temporary)
            raise OSError(
                error.errno, f"{self.path} cannot be written: {error.strerror}; free space or check the disk"
            ) from None
        try:
            self._sync(fd)
            os.rename(temporary, self.path)
            self._sync_directory()
        except OSError as error:
            os.close(fd)
            if self._failed is None:
                self._failed = error  # renamed or not: we cannot know what a crash would leave
            raise
        return fd

    def _open(self) -> None:
        """Opens and locks the file; makes an empty one when there is none."""
        if self._fd >= 0:
            return
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        for _ in range(100):
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                self._fd = self._install(MAGIC + bytes(HEADER_SIZE - len(MAGIC)))
                return
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_ino == os.stat(self.path).st_ino:  # else it was replaced meanwhile
                    self._fd = fd
                    return
            except BlockingIOError:
                os.close(fd)
                raise OSError(
                    errno.EBUSY, f"{self.path} is in use by another process: two nodes must not share a state directory"
                ) from None
            except FileNotFoundError:
                pass
            os.close(fd)
        raise OSError(errno.EBUSY, f"{self.path} is being replaced all the time by another process")

    def _sync(self, fd: int) -> None:
        try:
            os.fdatasync(fd)
        except OSError as error:
            # After a failed sync the kernel may have dropped the pages and call the next sync a success.
            self._fail(error.errno or errno.EIO, f"could not be made durable ({error.strerror}): check the disk")

    def _sync_directory(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _cut_back(self, error: OSError) -> None:
        try:
            os.ftruncate(self._fd, self._end)
        except OSError:
            self._failed = error

    def _check(self) -> None:
        if self._failed is not None:
            raise OSError(self._failed.errno, f"{self.path} failed before: {self._failed.strerror}")

    def _fail(self, number: int, sentence: str) -> None:
        self._failed = OSError(number, f"{self.path} {sentence}")
        raise self._failed


def _pwrite_all(fd: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]
