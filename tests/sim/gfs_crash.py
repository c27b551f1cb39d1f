"""Power loss at every moment: record what a random workload writes and flushes, cut, mount, fsck, compare.

`run(seed)` makes a filesystem, does random operations with random fsyncs through the library interface, and notes for
each operation where in the write log it was acknowledged. Then for many cuts it builds the image a crash could leave:
all writes up to the last flush are there; later ones are there, lost, or torn by 512 bytes, in any combination. The
image is mounted (which replays), unmounted, checked by fsck, and its tree compared:

  * the tree is the state after some prefix of the operations (whole operations, in order: a suffix was lost);
  * that prefix covers everything acknowledged as durable before the cut;
  * bytes of every file that was fsynced and not written since are exact; others are made of bytes once written there,
    or zeros, and never of another file's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from corral.api.gfs import ROOT, Caller, Changes
from corral.gfs import fsck, mkfs
from corral.gfs.filesystem import GfsFilesystem
from corral.gfs.mount import mount
from corral.gfs.volume import Options
from tests.unit.gfs.world import BLOCK, MemoryDisk, World

SECTOR = 512
ME = Caller(1000, 1000, 1)
BLOCKS = 8192
CUTS = 12


class ViolationError(AssertionError):
    """What a crash must never show. The message begins with the name of the promise."""


@dataclass
class File:
    """A file as the model knows it: `data` is what was written; `durable` is its size and bytes at the last fsync."""

    number: int
    data: bytearray = field(default_factory=bytearray)
    history: int = 0  # operation that last changed its data


@dataclass
class Step:
    """One namespace state: path -> ("d", ) | ("f", file) | ("l", target), after operation `index`."""

    tree: dict[bytes, tuple[Any, ...]]
    sizes: dict[int, int]
    log_at: int  # length of the write log when the operation had been acknowledged


@dataclass
class Recording:
    base: bytearray
    log: list[tuple[str, int, bytes]]
    steps: list[Step]
    durable: list[tuple[int, int]]  # (log length, step): from there on that step must survive
    contents: dict[int, list[tuple[int, bytes]]]  # file -> (step, all bytes) after each change
    exact: dict[int, list[tuple[int, int, bool]]]  # file -> (log length, index into contents, data only) of its fsyncs


class Workload:
    """Random operations on a real filesystem and on a dictionary."""

    def __init__(self, world: World, filesystem: GfsFilesystem, disk: MemoryDisk, rng: Random) -> None:
        self.world = world
        self.filesystem = filesystem
        self.disk = disk
        self.rng = rng
        self.tree: dict[bytes, tuple[Any, ...]] = {b"": ("d",)}
        self.files: dict[int, File] = {}
        self.inos: dict[bytes, int] = {b"": ROOT}
        self.next_file = 1
        assert disk.log is not None
        self.recording = Recording(bytearray(disk.content), disk.log, [], [], {}, {})
        self._step()

    # --- the model ---------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        sizes = {entry[1]: len(self.files[entry[1]].data) for entry in self.tree.values() if entry[0] == "f"}
        self.recording.steps.append(Step(dict(self.tree), sizes, len(self.recording.log)))

    def _durable(self) -> None:
        self.recording.durable.append((len(self.recording.log), len(self.recording.steps) - 1))

    def _changed(self, number: int) -> None:
        data = bytes(self.files[number].data)
        self.recording.contents.setdefault(number, []).append((len(self.recording.steps), data))

    def _paths(self, kind: str) -> list[bytes]:
        return sorted(path for path, entry in self.tree.items() if entry[0] == kind)

    def _new_name(self) -> bytes:
        parent = self.rng.choice(self._paths("d"))
        name = b"n%d" % self.rng.randrange(60)
        if self.rng.random() < 0.3:
            name += b"-" + b"x" * self.rng.randrange(180)
        return parent + b"/" + name

    @staticmethod
    def _split(path: bytes) -> tuple[bytes, bytes]:
        parent, _, name = path.rpartition(b"/")
        return parent, name

    def choose(self) -> None:
        """Before each operation: which mount does it (here there is one)."""

    async def ino(self, path: bytes) -> int:
        """As the kernel knows the file."""
        return self.inos[path]

    # --- operations --------------------------------------------------------------------------------------------------

    async def run(self, count: int) -> None:
        actions: list[tuple[int, Callable[[], Any]]] = [
            (18, self.create),
            (6, self.mkdir),
            (4, self.symlink),
            (5, self.link),
            (12, self.unlink),
            (4, self.rmdir),
            (10, self.rename),
            (22, self.write),
            (6, self.truncate),
            (10, self.fsync),
            (3, self.many),
        ]
        weights = [weight for weight, _ in actions]
        for _ in range(count):
            self.choose()
            await self.rng.choices(actions, weights)[0][1]()
            self._step()

    async def create(self) -> None:
        path = self._new_name()
        if path in self.tree:
            return
        parent, name = self._split(path)
        entry = await self.filesystem.mknod(await self.ino(parent), name, 0o100644, 0, ME)
        number = self.next_file
        self.next_file += 1
        self.files[number] = File(number)
        self.tree[path] = ("f", number)
        self.inos[path] = entry.ino
        self._changed(number)

    async def many(self) -> None:
        """Enough names to make a directory grow leaves."""
        parent = self.rng.choice(self._paths("d"))
        for index in range(self.rng.randrange(5, 40)):
            path = parent + b"/m%d-" % index + b"y" * 100
            if path not in self.tree:
                parent_path, name = self._split(path)
                entry = await self.filesystem.symlink(await self.ino(parent_path), name, b"t%d" % index, ME)
                self.tree[path] = ("l", b"t%d" % index)
                self.inos[path] = entry.ino
                self._step()

    async def mkdir(self) -> None:
        path = self._new_name()
        if path in self.tree:
            return
        parent, name = self._split(path)
        entry = await self.filesystem.mkdir(await self.ino(parent), name, 0o755, ME)
        self.tree[path] = ("d",)
        self.inos[path] = entry.ino

    async def symlink(self) -> None:
        path = self._new_name()
        if path in self.tree:
            return
        parent, name = self._split(path)
        target = b"to-%d" % self.rng.randrange(1000)
        entry = await self.filesystem.symlink(await self.ino(parent), name, target, ME)
        self.tree[path] = ("l", target)
        self.inos[path] = entry.ino

    async def link(self) -> None:
        path, files = self._new_name(), self._paths("f")
        if path in self.tree or not files:
            return
        old = self.rng.choice(files)
        parent, name = self._split(path)
        await self.filesystem.link(await self.ino(old), await self.ino(parent), name, ME)
        self.tree[path] = self.tree[old]
        self.inos[path] = self.inos[old]

    async def unlink(self) -> None:
        paths = self._paths("f") + self._paths("l")
        if not paths:
            return
        path = self.rng.choice(paths)
        parent, name = self._split(path)
        await self.filesystem.unlink(await self.ino(parent), name, ME)
        del self.tree[path], self.inos[path]

    async def rmdir(self) -> None:
        empty = [
            path for path in self._paths("d") if path and not any(other.startswith(path + b"/") for other in self.tree)
        ]
        if not empty:
            return
        path = self.rng.choice(empty)
        parent, name = self._split(path)
        await self.filesystem.rmdir(await self.ino(parent), name, ME)
        del self.tree[path], self.inos[path]

    async def rename(self) -> None:
        paths = [path for path in sorted(self.tree) if path]
        if not paths:
            return
        old, new = self.rng.choice(paths), self._new_name()
        if (new + b"/").startswith(old + b"/") or (old + b"/").startswith(new + b"/"):
            return
        if new in self.tree and (self.tree[new][0] == "d" or self.tree[old][0] == "d"):
            return
        parent, name = self._split(old)
        new_parent, new_name = self._split(new)
        await self.filesystem.rename(await self.ino(parent), name, await self.ino(new_parent), new_name, 0, ME)
        if self.tree.get(new) == self.tree[old] and self.tree[old][0] == "f":
            return  # two names of one file: rename does nothing
        for table in (self.tree, self.inos):
            moved = {path: value for path, value in table.items() if path == old or path.startswith(old + b"/")}
            for path, value in moved.items():
                del table[path]  # type: ignore[attr-defined]
                table[new + path[len(old) :]] = value  # type: ignore[index]

    async def _file(self) -> tuple[int, File] | None:
        files = self._paths("f")
        if not files:
            return None
        path = self.rng.choice(files)
        return await self.ino(path), self.files[self.tree[path][1]]

    async def write(self) -> None:
        found = await self._file()
        if found is None:
            return
        ino, file = found
        size = self.rng.choice([1, 100, 3000, 4096, 5000, 20_000, 70_000])
        offset = self.rng.choice([0, len(file.data), self.rng.randrange(60_000)])
        # Every byte names its file: another file's content is recognised at once.
        data = bytes([file.number % 251 + 1]) * size
        opened = await self.filesystem.open(ino, 2, ME)
        await self.filesystem.write(
            ino, opened.handle, offset, data, append=False, from_cache=False, kill_suidgid=False
        )
        await self.filesystem.release(ino, opened.handle, None)
        if offset > len(file.data):
            file.data.extend(bytes(offset - len(file.data)))
        file.data[offset : offset + size] = data
        self._changed(file.number)

    async def truncate(self) -> None:
        found = await self._file()
        if found is None:
            return
        ino, file = found
        size = self.rng.choice([0, 10, 3839, 4096, 6000, 50_000])
        await self.filesystem.setattr(ino, Changes(size=size), None, ME)
        if size < len(file.data):
            del file.data[size:]
        else:
            file.data.extend(bytes(size - len(file.data)))
        self._changed(file.number)

    async def fsync(self) -> None:
        found = await self._file()
        if found is None:
            await self.filesystem.sync()
        else:
            ino, file = found
            opened = await self.filesystem.open(ino, 2, ME)
            before = len(self.recording.contents[file.number]) - 1
            data_only = self.rng.random() < 0.3
            await self.filesystem.fsync(ino, opened.handle, data_only=data_only)
            await self.filesystem.release(ino, opened.handle, None)
            self.recording.exact.setdefault(file.number, []).append((len(self.recording.log), before, data_only))
            return
        self._durable()


# --- the crash ------------------------------------------------------------------------------------------------------


def crash_image(recording: Recording, cut: int, rng: Random) -> bytearray:
    """A state of the disk that a power loss after `cut` log entries may leave."""
    image = bytearray(recording.base)
    flushed = max((offset for kind, offset, _ in recording.log[:cut] if kind == "flush"), default=0)
    mood = rng.choice(["all", "none", "some", "torn"])
    for index in range(cut):
        kind, offset, data = recording.log[index]
        if kind != "write":
            continue
        if index < flushed or mood == "all":
            image[offset : offset + len(data)] = data
        elif mood != "none":
            for at in range(0, len(data), SECTOR if mood == "torn" else BLOCK):
                size = SECTOR if mood == "torn" else BLOCK
                if rng.random() < 0.5:
                    image[offset + at : offset + at + size] = data[at : at + size]
    return image


async def read_tree(filesystem: GfsFilesystem) -> tuple[dict[bytes, tuple[Any, ...]], dict[bytes, bytes]]:
    """path -> ("d",) | ("f", inode) | ("l", target), and the bytes of files."""
    tree: dict[bytes, tuple[Any, ...]] = {b"": ("d",)}
    contents: dict[bytes, bytes] = {}
    waiting = [(b"", ROOT)]
    while waiting:
        path, ino = waiting.pop()
        offset = 0
        while True:
            entries = await filesystem.readdir(ino, 0, offset, 20_000, plus=True)
            if not entries:
                break
            offset = entries[-1].cookie
            for entry in entries:
                if entry.name in (b".", b".."):
                    continue
                if entry.entry is None:
                    raise ViolationError(f"CRASH-READ {path!r}/{entry.name!r} cannot be read")
                child = path + b"/" + entry.name
                if entry.type == 0o04:
                    tree[child] = ("d",)
                    waiting.append((child, entry.ino))
                elif entry.type == 0o12:
                    tree[child] = ("l", await filesystem.readlink(entry.ino))
                else:
                    tree[child] = ("f", entry.ino)
                    opened = await filesystem.open(entry.ino, 0, ME)
                    parts = await filesystem.read(entry.ino, opened.handle, 0, 1 << 20)
                    contents[child] = b"".join(bytes(part) for part in parts)
                    await filesystem.release(entry.ino, opened.handle, None)
    return tree, contents


def shape(tree: dict[bytes, tuple[Any, ...]]) -> dict[bytes, Any]:
    """The tree with files named by the first path that leads to them, so that inode numbers do not matter."""
    first: dict[Any, bytes] = {}
    out: dict[bytes, Any] = {}
    for path in sorted(tree):
        entry = tree[path]
        if entry[0] == "f":
            out[path] = ("f", first.setdefault(entry[1], path))
        else:
            out[path] = entry
    return out


def compare(recording: Recording, cut: int, tree: dict[bytes, tuple[Any, ...]], contents: dict[bytes, bytes]) -> int:
    """Which step the image shows. Raises ViolationError when none fits."""
    least = max((step for at, step in recording.durable if at <= cut), default=0)
    for file, fsyncs in recording.exact.items():
        for at, index, data_only in fsyncs:
            if at <= cut and not data_only:  # the operation that last changed the file, and so all before it
                least = max(least, recording.contents[file][index][0])
    most = next((number for number, one in enumerate(recording.steps) if one.log_at > cut), len(recording.steps) - 1)
    shown = shape(tree)
    sizes = {path: len(content) for path, content in contents.items()}
    named = {}
    best = ""
    for number in range(min(most + 2, len(recording.steps) - 1), least - 1, -1):
        step = recording.steps[number]
        if shape(step.tree) != shown:
            continue
        named = {path: entry[1] for path, entry in step.tree.items() if entry[0] == "f"}
        wrong = [path for path, file in sorted(named.items()) if sizes[path] != step.sizes[file]]
        if wrong:
            best = f"step {number} fits but for the size of {wrong[0]!r}: {sizes[wrong[0]]}"
            continue
        check_contents(recording, cut, number, named, contents)
        return number
    raise ViolationError(f"CRASH-PREFIX cut {cut}: the tree is no state between step {least} and {most}; {best}")


def check_contents(
    recording: Recording, cut: int, step: int, named: dict[bytes, int], contents: dict[bytes, bytes]
) -> None:
    for path, file in sorted(named.items()):
        content = contents[path]
        mine = file % 251 + 1
        foreign = content.translate(None, bytes([0, mine]))
        if foreign:
            raise ViolationError(f"CRASH-FOREIGN cut {cut}: {path!r} has bytes {sorted(set(foreign))[:5]} of others")
        versions = [data for at, data in recording.contents[file] if at <= step]
        synced = max((index for at, index, _ in recording.exact.get(file, ()) if at <= cut), default=-1)
        candidates = recording.contents[file][max(0, synced) :]
        if synced >= 0 and len(versions) - 1 == synced and len(candidates) == 1 and content != versions[-1]:
            raise ViolationError(f"CRASH-FSYNC cut {cut}: {path!r} differs from what was synced")
        # Zero bytes may show only where some version since the last sync had zeros.
        if synced >= 0:
            check_zeros(path, cut, content, [data for _, data in candidates])


def check_zeros(path: bytes, cut: int, content: bytes, versions: list[bytes]) -> None:
    at = content.find(0)
    while at >= 0:
        if all(at < len(version) and version[at] for version in versions):
            raise ViolationError(f"CRASH-FSYNC cut {cut}: {path!r} has lost synced bytes at {at}")
        following = content.find(0, at + 1)
        at = following if following < 0 or following > at + 64 else content.find(0, at + 64)


# --- one run ------------------------------------------------------------------------------------------------------


def record(seed: int, operations: int) -> Recording:
    rng = Random(seed)
    world = World(Random(seed + 1))
    disk = MemoryDisk(world, BLOCKS)
    world.run(
        mkfs.format(
            world,
            disk,
            cluster="test",
            name="crash",
            journals=2,
            journal_blocks=rng.choice([160, 256, 512]),
            rgrp_blocks=1024,
        )
    )
    disk.log = []
    options = Options(commit_ns=rng.choice([1, 50, 10_000]))
    filesystem = world.run(mount(world, disk, None, slot=0, options=options))
    world.run(filesystem.start(None))
    filesystem.finish(None)
    world.run(filesystem.go_live())
    workload = Workload(world, filesystem, disk, rng)
    world.run(workload.run(operations))
    world.run(filesystem.sync())
    workload._durable()
    return workload.recording


def examine(recording: Recording, cut: int, rng: Random) -> int:
    """One crash. Returns the step it shows; raises ViolationError."""
    world = World()
    disk = MemoryDisk(world, BLOCKS, crash_image(recording, cut, rng))
    slot = rng.randrange(2)  # by its own next mount, or by another as first mounter
    filesystem = world.run(mount(world, disk, None, slot=slot))
    world.run(filesystem.start(None))
    filesystem.finish(None)
    world.run(filesystem.go_live())
    world.settle()
    tree, contents = world.run(read_tree(filesystem))
    world.run(filesystem.destroy())
    if filesystem.damaged:
        raise ViolationError(f"CRASH-FSCK cut {cut}: {filesystem.damaged}")
    report = world.run(fsck.check(world, disk))
    if not report.clean:
        raise ViolationError(f"CRASH-FSCK cut {cut}: {[finding.message for finding in report.findings[:5]]}")
    return compare(recording, cut, tree, contents)


def run(seed: int, operations: int = 120, cuts: int = CUTS) -> dict[str, int]:
    """Raises ViolationError with the seed and the cut; the summary counts what was tried."""
    recording = record(seed, operations)
    rng = Random(seed + 2)
    writes = len(recording.log)
    chosen = sorted({writes, *(rng.randrange(writes + 1) for _ in range(cuts))})
    lost = 0
    for cut in chosen:
        try:
            step = examine(recording, cut, rng)
        except ViolationError as error:
            raise ViolationError(f"{error} (seed {seed})") from error
        lost += len(recording.steps) - 1 - step
    return {"seed": seed, "writes": writes, "cuts": len(chosen), "operations": operations, "steps_lost": lost}


if __name__ == "__main__":
    import sys

    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        print(run(number))
