"""Reading a journal: head, commits from the tail, revokes; and putting what it holds in place.

Used when mounting, by a survivor for a dead node's slot, and by fsck. Everything read is checked; a journal that does
not check out (other than a torn newest commit) raises JournalDamaged and is left alone.
"""

from typing import Final, final

from corral.gfs import format as fmt
from corral.gfs.device import Device
from corral.gfs.journal import Ring

SCAN: Final = 256  # blocks read at a time


class JournalDamaged(Exception):
    """The message says which slot, which position and what to do."""


@final
class LogHeader:
    __slots__ = ("descriptors", "flags", "length", "position", "revoke_blocks", "revokes", "sequence", "tags", "tail")

    def __init__(self, block: bytes | bytearray) -> None:
        values = fmt.LOG_HEAD.unpack_from(block, fmt.HEADER_SIZE)
        self.sequence, self.flags, _, self.position, tail, tail_sequence = values[:6]
        self.length, self.descriptors, self.revoke_blocks, self.tags, self.revokes = values[6:11]
        self.tail: tuple[int, int] = (tail, tail_sequence)

    def plausible(self, blocks: int) -> bool:
        return (
            0 < self.length <= blocks
            and self.length == 1 + self.descriptors + self.revoke_blocks + self.tags
            and self.descriptors == -(-self.tags // fmt.LOG_TAGS_MAX)
            and self.revoke_blocks == -(-self.revokes // fmt.LOG_REVOKES_MAX)
            and self.tail[0] < blocks
            and self.tail[1] <= self.sequence
        )


@final
class JournalState:
    """What a scan found. `next_sequence` is above every header in the ring; `next_position` follows the head."""

    __slots__ = ("clean", "head", "images", "next_position", "next_sequence", "revoked_numbers", "skipped")

    def __init__(self, head: LogHeader, next_sequence: int, blocks: int) -> None:
        self.head = head
        self.clean = bool(head.flags & fmt.UNMOUNT)
        self.next_sequence = next_sequence
        self.next_position = (head.position + head.length) % blocks
        self.images: dict[int, bytes] = {}  # block -> newest image not revoked
        self.revoked_numbers: set[int] = set()
        self.skipped = 0


async def _read_ring(device: Device, ring: Ring, position: int, length: int) -> bytearray:
    content = bytearray()
    for number, count in ring.runs(position, length):
        content += await device.read(number, count)
    return content


async def scan(device: Device, ring: Ring, slot: int, uuid: bytes) -> JournalState:
    """Finds the head and reads what is to be replayed. Raises JournalDamaged, OSError."""
    headers: list[LogHeader] = []
    for position in range(0, ring.blocks, SCAN):
        count = min(SCAN, ring.blocks - position)
        content = await _read_ring(device, ring, position, count)
        for index in range(count):
            at = index * fmt.BLOCK
            magic, kind, *_ = fmt.HEADER.unpack_from(content, at)
            if magic == fmt.MAGIC and kind == fmt.LOG_HEADER:
                header = _header(content[at : at + fmt.BLOCK], ring, position + index, slot, uuid)
                if header is not None:
                    headers.append(header)
    headers.sort(key=lambda header: header.sequence, reverse=True)
    for header in headers[:2]:
        if await _read_commit(device, ring, header) is not None:
            state = JournalState(header, headers[0].sequence + 1, ring.blocks)
            if not state.clean:
                await _collect(device, ring, slot, uuid, state)
            return state
    raise JournalDamaged(f"journal {slot}: no whole commit at its head; run fsck, which can discard the journal")


def _header(block: bytearray, ring: Ring, position: int, slot: int, uuid: bytes) -> LogHeader | None:
    try:
        fmt.check(block, fmt.LOG_HEADER, ring.address(position))
    except fmt.BlockDamaged:
        return None
    values = fmt.LOG_HEAD.unpack_from(block, fmt.HEADER_SIZE)
    if values[2] != slot or values[3] != position or values[12] != uuid:
        return None
    header = LogHeader(block)
    return header if header.plausible(ring.blocks) else None


async def _read_commit(
    device: Device, ring: Ring, header: LogHeader
) -> tuple[list[tuple[int, bytes]], list[int]] | None:
    """The images and revokes of a whole commit; None when any part of it is missing, torn or stale."""
    content = bytes(await _read_ring(device, ring, header.position, header.length))
    tags: list[tuple[int, int]] = []
    revokes: list[int] = []
    for index in range(1, 1 + header.descriptors + header.revoke_blocks):
        block = content[index * fmt.BLOCK : (index + 1) * fmt.BLOCK]
        kind = fmt.LOG_DESCRIPTOR if index <= header.descriptors else fmt.LOG_REVOKES
        try:
            fmt.check(block, kind, ring.address((header.position + index) % ring.blocks))
        except fmt.BlockDamaged:
            return None
        sequence, count = fmt.LOG_LIST.unpack_from(block, fmt.HEADER_SIZE)
        if sequence != header.sequence or count > (
            fmt.LOG_TAGS_MAX if kind == fmt.LOG_DESCRIPTOR else fmt.LOG_REVOKES_MAX
        ):
            return None
        if kind == fmt.LOG_DESCRIPTOR:
            for item in range(count):
                number, checksum, _ = fmt.LOG_TAG.unpack_from(block, fmt.LOG_AT + item * fmt.LOG_TAG.size)
                tags.append((number, checksum))
        else:
            for item in range(count):
                revokes.append(fmt.LOG_REVOKE.unpack_from(block, fmt.LOG_AT + item * fmt.LOG_REVOKE.size)[0])
    if len(tags) != header.tags or len(revokes) != header.revokes:
        return None
    images: list[tuple[int, bytes]] = []
    at = (1 + header.descriptors + header.revoke_blocks) * fmt.BLOCK
    for number, checksum in tags:
        image = content[at : at + fmt.BLOCK]
        at += fmt.BLOCK
        if number >= device.blocks or number < fmt.SUPERBLOCK_AT:
            return None
        if not _is_image(image, number, checksum):
            return None
        images.append((number, image))
    return images, revokes


def _is_image(image: bytes, number: int, checksum: int) -> bool:
    """What the tag names: sound by itself, of this block, and this very version of it."""
    return fmt.checksum_of(image) == checksum and fmt.HEADER.unpack_from(image)[3] == number and fmt.verified(image)


async def _collect(device: Device, ring: Ring, slot: int, uuid: bytes, state: JournalState) -> None:
    """All commits from the tail to the head, newest image of each block, revokes applied."""
    position, sequence = state.head.tail
    newest: dict[int, tuple[int, bytes]] = {}
    revoked: dict[int, int] = {}
    while True:
        block = await device.read(ring.address(position))
        header = _header(block, ring, position, slot, uuid)
        commit = None
        if header is not None and header.sequence == sequence:
            commit = await _read_commit(device, ring, header)
        if header is None or commit is None:
            raise JournalDamaged(
                f"journal {slot}: commit {sequence} at position {position} is damaged; run fsck, which can discard it"
            )
        images, revokes = commit
        for number, image in images:
            newest[number] = (sequence, image)
        for number in revokes:
            revoked[number] = sequence
        if sequence == state.head.sequence:
            break
        position = (position + header.length) % ring.blocks
        sequence += 1
    state.revoked_numbers = set(revoked)
    for number, (logged, image) in newest.items():
        if logged >= revoked.get(number, 0):
            state.images[number] = image
        else:
            state.skipped += 1


async def put_in_place(device: Device, state: JournalState) -> None:
    """Writes and flushes every image. May be repeated."""
    await device.write_runs(sorted(state.images.items()))
    await device.flush()


async def write_clean_header(
    device: Device, ring: Ring, slot: int, uuid: bytes, state: JournalState, wall: int
) -> None:
    """An empty commit with UNMOUNT behind the head: the journal needs no replay any more."""
    position, sequence = state.next_position, state.next_sequence
    await device.write(ring.address(position), [clean_header(ring, slot, uuid, position, sequence, wall)])
    await device.flush()
    state.clean = True
    state.next_position = (position + 1) % ring.blocks
    state.next_sequence = sequence + 1


def clean_header(ring: Ring, slot: int, uuid: bytes, position: int, sequence: int, wall: int) -> bytes:
    head = bytearray(fmt.BLOCK)
    fmt.LOG_HEAD.pack_into(
        head, fmt.HEADER_SIZE, sequence, fmt.UNMOUNT, slot, position, position, sequence, 1, 0, 0, 0, 0, wall, uuid
    )
    return fmt.seal(head, fmt.LOG_HEADER, ring.address(position), sequence)
