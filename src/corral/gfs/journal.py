"""The journal of one slot while its filesystem is mounted: transactions, commits, checkpoints, hand-overs.

Operations change metadata objects without awaiting in between and `add` them to the running transaction; a commit takes
a snapshot of all of them at once, so every operation is in one commit, whole. A commit is: data written and flushed,
then one write of header, descriptors, revokes and images, then one flush (docs/format/disk.md, section 7).

One runner serves all jobs (commit, checkpoint, hand-over), one after the other; waiters of the same kind share one
round. It is a task of its own, so a cancelled fsync never tears a commit.

    running --commit--> durable, images pending --checkpoint / hand-over--> in place --tail moves--> forgotten

Invariants:
  GFS-4  an image is written in place only after its commit is durable.
  GFS-5  a freed block is given out again only after the commit that freed (and revoked) it is durable.
  GFS-6  data is written and flushed before the commit that makes it reachable is written.
  GFS-7  ring space is reused only after a durable header says so.
  GFS-8  when a glock leaves EX no image of its blocks can be replayed from here: all in place, and revoked or
         behind the tail.
"""

from collections.abc import Awaitable, Callable, Iterable
from errno import EIO
from typing import Any, Final, final

from corral.base.world import World
from corral.gfs import format as fmt
from corral.gfs.device import Device
from corral.gfs.glock import Glock
from corral.gfs.meta import Meta

COMMIT: Final = 0
CHECKPOINT: Final = 1
HANDOVER: Final = 2

IN_FLIGHT: Final = 1 << 63  # in `logged`: the sequence is not known yet
SPARE: Final = 2  # ring blocks kept for the empty commit that moves the tail
RUNNING_MAX: Final = 2048  # objects in one transaction, whatever the journal's size
HANDOVER_ALL: Final = 1024  # pending images that a hand-over puts in place together with those it was asked for


@final
class Ring:
    """Where the blocks of a journal file lie: positions in the ring to block numbers, in contiguous runs."""

    __slots__ = ("blocks", "extents")

    def __init__(self, extents: Iterable[tuple[int, int, int]]) -> None:
        self.extents = sorted(extents)  # (position, block number, count)
        self.blocks = sum(count for _, _, count in self.extents)

    def address(self, position: int) -> int:
        for first, number, count in self.extents:
            if first <= position < first + count:
                return number + position - first
        raise ValueError(position)

    def runs(self, position: int, length: int) -> Iterable[tuple[int, int]]:
        """(block number, count) for `length` blocks from `position`, around the end of the ring."""
        while length:
            for first, number, count in self.extents:
                if first <= position < first + count:
                    take = min(length, first + count - position)
                    yield number + position - first, take
                    position = (position + take) % self.blocks
                    length -= take
                    break
            else:
                raise ValueError(position)


@final
class Commit:
    """A durable commit at or after the tail. `pins`: images that are not in place yet and live nowhere newer."""

    __slots__ = ("length", "numbers", "pins", "position", "sequence")

    def __init__(self, sequence: int, position: int, length: int, numbers: list[int]) -> None:
        self.sequence = sequence
        self.position = position
        self.length = length
        self.numbers = numbers
        self.pins = 0


@final
class Pending:
    """The newest committed image of a block that is not in place yet."""

    __slots__ = ("commit", "image", "meta")

    def __init__(self, meta: Meta, image: bytes, commit: Commit) -> None:
        self.meta = meta
        self.image = image
        self.commit = commit


@final
class Transaction:
    """What operations did since the last snapshot. `frees`: called once it is durable, to make freed blocks usable."""

    __slots__ = ("ended", "forgotten", "frees", "metas", "number", "revokes", "tombstones")

    def __init__(self, number: int) -> None:
        self.number = number
        self.metas: list[Meta] = []
        self.revokes: set[int] = set()
        self.forgotten: list[int] = []
        self.tombstones: list[int] = []
        self.ended: list[int] = []
        self.frees: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self.metas or self.revokes or self.frees)


@final
class Job:
    __slots__ = ("future", "glock", "kind", "number")

    def __init__(self, kind: int, number: int, glock: Glock | None, future: Any) -> None:
        self.kind = kind
        self.number = number
        self.glock = glock
        self.future = future


class Journal:
    """`write_data()` writes all dirty file data; `failed(error)` is called once when the journal cannot be trusted."""

    def __init__(
        self,
        world: World,
        device: Device,
        ring: Ring,
        *,
        slot: int,
        uuid: bytes,
        sequence: int,
        position: int,
        write_data: Callable[[], Awaitable[None]],
        failed: Callable[[str], None],
    ) -> None:
        self.world = world
        self.device = device
        self.ring = ring
        self.slot = slot
        self.uuid = uuid
        self.sequence = sequence  # of the next commit
        self.position = position  # where it goes
        self.durable = 0  # number of the newest durable transaction
        self.running = Transaction(1)
        self.limit = min(RUNNING_MAX, max(8, ring.blocks // 4))
        self.commits: list[Commit] = []
        self.used = 0  # ring blocks at or after the durable tail
        self.logged: dict[int, tuple[int, Glock]] = {}  # block -> (newest sequence with its image, its glock)
        self.pending: dict[int, Pending] = {}
        self.counts = {"commits": 0, "commit_blocks": 0, "checkpoints": 0, "handovers": 0, "revokes": 0}
        self.broken: OSError | None = None
        self.in_flight: dict[int, bytes] = {}  # images of the commit being written
        self.ended: set[int] = set()  # dinodes freed by a transaction that is not durable yet
        self._write_data = write_data
        self._failed = failed
        self._jobs: list[Job] = []
        self._serving = False

    # --- what operations call (never waits) --------------------------------------------------------------------------

    def add(self, meta: Meta) -> None:
        """The object was or will be changed in this step: it is part of the running transaction."""
        if not meta.dirty:
            meta.dirty = True
            meta.glock.dirty += 1
            self.running.metas.append(meta)

    def free(self, number: int, meta: Meta | None = None) -> None:
        """A metadata block was freed in this step: it must not be replayed any more."""
        if meta is not None:
            self.add(meta)  # its glock leaves only after the commit that says so, though no image goes into that
            meta.freed = True
        entry = self.logged.pop(number, None)
        if entry is not None:
            entry[1].logged.discard(number)
            self.running.revokes.add(number)
            self.running.forgotten.append(number)

    def bury(self, number: int, *, everywhere: bool) -> None:
        """A freed dinode: nobody here finds a file in it from now on, although its last image is still about.
        `everywhere`: zeros go to its place before the block is used again, so that another node's stale reference
        finds none either. The revoke tells a replay to do the same."""
        self.ended.add(number)
        self.running.ended.append(number)
        if everywhere:
            self.running.revokes.add(number)
            self.running.tombstones.append(number)

    def when_durable(self, call: Callable[[], None]) -> None:
        self.running.frees.append(call)

    @property
    def full(self) -> bool:
        """The running transaction is as large as this journal allows: operations wait for a commit."""
        return len(self.running.metas) >= self.limit

    def newest_image(self, number: int) -> bytes | None:
        """Of a block whose object may have left memory: what is on its way to its place."""
        if number in self.ended:
            return fmt.ZERO_BLOCK
        image = self.in_flight.get(number)
        if image is None:
            entry = self.pending.get(number)
            image = entry.image if entry is not None else None
        return image

    # --- what they wait for ------------------------------------------------------------------------------------------

    async def commit(self) -> None:
        """All that was done before the call is durable on return."""
        if self.durable < self.running.number - 1 or self.running:
            await self._request(COMMIT, None)

    async def checkpoint(self) -> None:
        """All committed images are in place and the tail is past them."""
        await self._request(CHECKPOINT, None)

    async def handover(self, glock: Glock) -> None:
        """Nothing of this glock is left to be committed, written in place or replayed (GFS-8)."""
        if glock.dirty or glock.logged or self._serving:
            await self._request(HANDOVER, glock)

    async def close(self) -> None:
        """After the last operation: everything in place, an UNMOUNT header on disk."""
        while self.running or self._serving:
            await self._request(COMMIT, None)
        await self.checkpoint()
        assert not self.running, "GFS-8"
        await self._write_log([], [], fmt.UNMOUNT)

    async def _request(self, kind: int, glock: Glock | None) -> None:
        if self.broken is not None:
            raise self._error()
        number = self.running.number if self.running else self.running.number - 1
        job = Job(kind, number, glock, self.world.future())
        self._jobs.append(job)
        if not self._serving:
            self._serving = True
            self.world.spawn(self._serve(), "gfs: journal")
        if await job.future is not None:
            raise self._error()

    def _error(self) -> OSError:
        return OSError(EIO, f"the journal of slot {self.slot} cannot be written: this mount has withdrawn")

    # --- the runner --------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        while self._jobs:
            jobs, self._jobs = self._jobs, []
            try:
                if self.broken is None:
                    await self._round(jobs)
            except OSError as error:
                self.broken = error
                self._failed(f"journal of slot {self.slot}: {error.strerror or error}")
            for job in jobs:
                if not job.future.done():
                    job.future.set_result(self.broken)
        self._serving = False

    async def _round(self, jobs: list[Job]) -> None:
        glocks = [job.glock for job in jobs if job.glock is not None]
        wanted = max((job.number for job in jobs if job.kind == COMMIT), default=0)
        if wanted > self.durable or any(glock.dirty for glock in glocks):
            await self._commit()
        if glocks:
            await self._hand_over(glocks)
        if any(job.kind == CHECKPOINT for job in jobs) or self.used > self.ring.blocks // 2:
            await self._checkpoint()

    async def _commit(self) -> None:
        transaction = self.running
        self.running = Transaction(transaction.number + 1)
        images: list[tuple[Meta, bytes]] = []
        for meta in transaction.metas:
            meta.dirty = False
            meta.glock.dirty -= 1
            if not meta.freed:
                images.append((meta, meta.seal()))
                # From here on, not from the write: a block freed meanwhile must find itself here and be revoked.
                self.logged[meta.number] = (IN_FLIGHT, meta.glock)
                meta.glock.logged.add(meta.number)
        self.in_flight = {meta.number: image for meta, image in images}
        await self._write_data()  # GFS-6; also what is not reachable through this commit: the order of history
        if self.device.unflushed:
            await self.device.flush()
        if images or transaction.revokes:
            await self._make_room(self._length(len(images), len(transaction.revokes)))
            await self._write_log(images, sorted(transaction.revokes), 0)
        self.in_flight = {}
        for number in transaction.forgotten:
            entry = self.pending.pop(number, None)
            if entry is not None:
                entry.commit.pins -= 1
        if transaction.tombstones:
            await self.device.write_runs((number, fmt.ZERO_BLOCK) for number in sorted(transaction.tombstones))
        self.ended.difference_update(transaction.ended)
        for call in transaction.frees:
            call()  # GFS-5
        self.durable = transaction.number

    def _length(self, images: int, revokes: int) -> int:
        return 1 - (-images // fmt.LOG_TAGS_MAX) - (-revokes // fmt.LOG_REVOKES_MAX) + images

    async def _make_room(self, length: int) -> None:
        if length + SPARE > self.ring.blocks - self.used:
            await self._checkpoint()
        if length + SPARE > self.ring.blocks - self.used:
            raise OSError(EIO, f"a transaction of {length} blocks does not fit a journal of {self.ring.blocks}")

    async def _write_log(self, images: list[tuple[Meta, bytes]], revokes: list[int], flags: int) -> None:
        """Writes and flushes one commit; moves the tail as far as it goes."""
        sequence, position = self.sequence, self.position
        length = self._length(len(images), len(revokes))
        assert length <= self.ring.blocks - self.used, "GFS-7"
        passed = 0
        while passed < len(self.commits) and self.commits[passed].pins == 0:
            passed += 1
        oldest = self.commits[passed] if passed < len(self.commits) else None
        tail = (oldest.position, oldest.sequence) if oldest else (position, sequence)
        blocks = self._log_blocks(sequence, position, tail, images, revokes, flags)
        for meta, _ in images:
            if meta.number in self.logged:
                self.logged[meta.number] = (sequence, meta.glock)
        at = 0
        for number, count in self.ring.runs(position, length):
            await self.device.write(number, blocks[at : at + count])
            at += count
        await self.device.flush()
        self.sequence = sequence + 1
        self.position = (position + length) % self.ring.blocks
        commit = Commit(sequence, position, length, [meta.number for meta, _ in images])
        for meta, image in images:
            older = self.pending.get(meta.number)
            if older is not None:
                older.commit.pins -= 1
            self.pending[meta.number] = Pending(meta, image, commit)
            commit.pins += 1
        self._move_tail(passed)
        self.commits.append(commit)
        self.used += length
        self.counts["commits"] += 1
        self.counts["commit_blocks"] += length
        self.counts["revokes"] += len(revokes)

    def _move_tail(self, passed: int) -> None:
        """The header that says so is durable: what lies before it can neither be replayed nor needs a revoke."""
        for commit in self.commits[:passed]:
            self.used -= commit.length
            for number in commit.numbers:
                entry = self.logged.get(number)
                if entry is not None and entry[0] == commit.sequence:
                    del self.logged[number]
                    entry[1].logged.discard(number)
        del self.commits[:passed]

    def _log_blocks(
        self,
        sequence: int,
        position: int,
        tail: tuple[int, int],
        images: list[tuple[Meta, bytes]],
        revokes: list[int],
        flags: int,
    ) -> list[bytes]:
        ring = self.ring
        length = self._length(len(images), len(revokes))
        tag_lists = [images[at : at + fmt.LOG_TAGS_MAX] for at in range(0, len(images), fmt.LOG_TAGS_MAX)]
        revoke_lists = [revokes[at : at + fmt.LOG_REVOKES_MAX] for at in range(0, len(revokes), fmt.LOG_REVOKES_MAX)]
        head = bytearray(fmt.BLOCK)
        fmt.LOG_HEAD.pack_into(
            head,
            fmt.HEADER_SIZE,
            sequence,
            flags,
            self.slot,
            position,
            tail[0],
            tail[1],
            length,
            len(tag_lists),
            len(revoke_lists),
            len(images),
            len(revokes),
            self.world.wall_ns(),
            self.uuid,
        )
        blocks = [fmt.seal(head, fmt.LOG_HEADER, ring.address(position), sequence)]
        for tags in tag_lists:
            block = bytearray(fmt.BLOCK)
            fmt.LOG_LIST.pack_into(block, fmt.HEADER_SIZE, sequence, len(tags))
            at = fmt.LOG_AT
            for meta, image in tags:
                fmt.LOG_TAG.pack_into(block, at, meta.number, fmt.checksum_of(image), 0)
                at += fmt.LOG_TAG.size
            place = ring.address((position + len(blocks)) % ring.blocks)
            blocks.append(fmt.seal(block, fmt.LOG_DESCRIPTOR, place, sequence))
        for numbers in revoke_lists:
            block = bytearray(fmt.BLOCK)
            fmt.LOG_LIST.pack_into(block, fmt.HEADER_SIZE, sequence, len(numbers))
            at = fmt.LOG_AT
            for number in numbers:
                fmt.LOG_REVOKE.pack_into(block, at, number)
                at += fmt.LOG_REVOKE.size
            place = ring.address((position + len(blocks)) % ring.blocks)
            blocks.append(fmt.seal(block, fmt.LOG_REVOKES, place, sequence))
        blocks.extend(image for _, image in images)
        assert len(blocks) == length
        return blocks

    async def _checkpoint(self) -> None:
        self.counts["checkpoints"] += 1
        await self._put_in_place(sorted(self.pending))
        if self.commits:
            await self._write_log([], [], 0)  # GFS-7: the space is ours again only when this is durable

    async def _put_in_place(self, numbers: Iterable[int]) -> None:
        entries = [(number, self.pending[number]) for number in numbers]
        if not entries:
            return
        await self.device.write_runs((number, entry.image) for number, entry in entries)
        await self.device.flush()
        for number, entry in entries:
            if self.pending.get(number) is entry:
                del self.pending[number]
                entry.commit.pins -= 1

    async def _hand_over(self, glocks: list[Glock]) -> None:
        self.counts["handovers"] += len(glocks)
        if not any(glock.logged for glock in glocks):
            return
        if len(self.pending) <= HANDOVER_ALL:
            # One file wanted elsewhere is seldom the last: in the same two flushes everything committed goes to its
            # place and behind the tail, and the glocks wanted next have nothing left here to wait for.
            await self._checkpoint()
            assert all(not glock.logged for glock in glocks if glock.dirty == 0), "GFS-8"
            return
        numbers = sorted(set().union(*(glock.logged for glock in glocks)))
        await self._put_in_place([number for number in numbers if number in self.pending])
        revokes = [number for number in numbers if number in self.logged]
        if revokes:
            await self._make_room(self._length(0, len(revokes)))
            revokes = [number for number in revokes if number in self.logged]  # the tail may have passed some
        if revokes:
            await self._write_log([], revokes, 0)
            for number in revokes:
                entry = self.logged.pop(number, None)
                if entry is not None:
                    entry[1].logged.discard(number)
        assert all(not glock.logged for glock in glocks if glock.dirty == 0), "GFS-8"
