"""A filesystem mounted on a disk in memory, with calls that read like a shell."""

from typing import Any

from tests.unit.gfs.world import MemoryDisk, World

from corral.api.gfs import ROOT, Caller, Changes
from corral.gfs import fsck, mkfs
from corral.gfs.filesystem import GfsFilesystem
from corral.gfs.mount import mount
from corral.gfs.volume import Options

ME = Caller(1000, 100, 1)
O_RDONLY, O_WRONLY, O_RDWR = 0, 1, 2


class Mounted:
    def __init__(self, blocks: int = 8192, *, journal_blocks: int = 256, options: Options | None = None) -> None:
        self.world = World()
        self.disk = MemoryDisk(self.world, blocks)
        self.run(
            mkfs.format(
                self.world,  # type: ignore[arg-type]
                self.disk,
                cluster="c",
                name="n",
                journals=2,
                journal_blocks=journal_blocks,
                rgrp_blocks=1024,
            )
        )
        self.fs = self.mount(options=options)

    def run(self, coroutine: Any) -> Any:
        return self.world.run(coroutine)

    def mount(self, slot: int = 0, options: Options | None = None) -> GfsFilesystem:
        self.fs = self.run(mount(self.world, self.disk, None, slot=slot, options=options))  # type: ignore[arg-type]
        self.run(self.fs.start(None))
        self.fs.finish(None)
        self.run(self.fs.go_live())
        self.world.settle()
        return self.fs

    def remount(self) -> GfsFilesystem:
        self.run(self.fs.destroy())
        return self.mount()

    def crash(self) -> GfsFilesystem:
        """The process is gone; what reached the disk is there."""
        self.world.abandon()
        return self.mount()

    def check(self, *, repair: bool = False) -> fsck.Report:
        return self.run(fsck.check(self.world, self.disk, repair=repair))  # type: ignore[arg-type,no-any-return]

    def unmount_clean(self) -> None:
        self.run(self.fs.destroy())
        assert self.check().findings == []

    # --- as a shell says it -------------------------------------------------------------------------------------------

    def ino(self, path: str) -> int:
        ino = ROOT
        for name in path.strip("/").split("/"):
            if name:
                entry = self.run(self.fs.lookup(ino, name.encode(), ME))
                self.fs.forget(entry.ino, 0)
                ino = entry.ino
        return ino

    def parent(self, path: str) -> tuple[int, bytes]:
        above, _, name = path.strip("/").rpartition("/")
        return self.ino(above), name.encode()

    def touch(self, path: str) -> int:
        parent, name = self.parent(path)
        return int(self.run(self.fs.mknod(parent, name, 0o100644, 0, ME)).ino)

    def mkdir(self, path: str) -> int:
        parent, name = self.parent(path)
        return int(self.run(self.fs.mkdir(parent, name, 0o755, ME)).ino)

    def symlink(self, target: str, path: str) -> None:
        parent, name = self.parent(path)
        self.run(self.fs.symlink(parent, name, target.encode(), ME))

    def link(self, old: str, new: str) -> None:
        parent, name = self.parent(new)
        self.run(self.fs.link(self.ino(old), parent, name, ME))

    def rm(self, path: str) -> None:
        parent, name = self.parent(path)
        self.run(self.fs.unlink(parent, name, ME))

    def rmdir(self, path: str) -> None:
        parent, name = self.parent(path)
        self.run(self.fs.rmdir(parent, name, ME))

    def mv(self, old: str, new: str, flags: int = 0) -> None:
        self.run(self.fs.rename(*self.parent(old), *self.parent(new), flags, ME))

    def stat(self, path: str) -> Any:
        return self.run(self.fs.getattr(self.ino(path), None))[0]

    def truncate(self, path: str, size: int) -> None:
        self.run(self.fs.setattr(self.ino(path), Changes(size=size), None, ME))

    def open(self, path: str, flags: int = O_RDWR) -> tuple[int, int]:
        ino = self.ino(path)
        return ino, self.run(self.fs.open(ino, flags, ME)).handle

    def close(self, handle: int) -> None:
        self.run(self.fs.release(0, handle, None))

    def put(self, handle: int, offset: int, data: bytes, *, append: bool = False) -> int:
        return int(
            self.run(self.fs.write(0, handle, offset, data, append=append, from_cache=False, kill_suidgid=False))
        )

    def get(self, handle: int, offset: int = 0, size: int = 1 << 24) -> bytes:
        return b"".join(bytes(part) for part in self.run(self.fs.read(0, handle, offset, size)))

    def write(self, path: str, data: bytes, offset: int = 0) -> None:
        try:
            self.ino(path)
        except FileNotFoundError:
            self.touch(path)
        _, handle = self.open(path)
        assert self.put(handle, offset, data) == len(data)
        self.close(handle)

    def read(self, path: str) -> bytes:
        _, handle = self.open(path, O_RDONLY)
        content = self.get(handle)
        self.close(handle)
        return content

    def sync(self) -> None:
        self.run(self.fs.sync())

    def ls(self, path: str, size: int = 1000) -> list[str]:
        ino = self.ino(path)
        out: list[str] = []
        offset = 0
        while True:
            entries = self.run(self.fs.readdir(ino, 0, offset, size, plus=False))
            if not entries:
                return out
            out.extend(entry.name.decode() for entry in entries if entry.name not in (b".", b".."))
            offset = entries[-1].cookie
