"""POSIX record locks of one node (`fcntl`), by interval: for a mount that no other node can share.

Ranges of one owner are merged and split as fcntl(2) says; waiting owners are checked for a circle (EDEADLK).
"""

from errno import EAGAIN, EDEADLK
from typing import Any, Final, final

from corral.api.gfs import LockRange
from corral.base.world import World

F_RDLCK: Final = 0
F_WRLCK: Final = 1
F_UNLCK: Final = 2


@final
class PosixLocks:
    """Locks by file number. `any` is false while nobody ever locked."""

    __slots__ = ("_files", "_waiting", "any", "world")

    def __init__(self, world: World) -> None:
        self.world = world
        self.any = False
        self._files: dict[int, list[tuple[int, LockRange]]] = {}  # (owner, range), disjoint for each owner
        self._waiting: list[tuple[int, int, LockRange, Any]] = []  # (file, owner, range, future)

    def conflict(self, file: int, owner: int, lock: LockRange) -> LockRange | None:
        found = self._conflicting(file, owner, lock)
        return found[1] if found else None

    def _conflicting(self, file: int, owner: int, lock: LockRange) -> tuple[int, LockRange] | None:
        for other, held in self._files.get(file, ()):
            if (
                other != owner
                and held.start <= lock.end
                and lock.start <= held.end
                and F_WRLCK in (held.type, lock.type)
            ):
                return other, held
        return None

    async def set(self, file: int, owner: int, lock: LockRange, *, wait: bool) -> None:
        """Raises EAGAIN (`wait` false) or EDEADLK."""
        self.any = True
        while lock.type != F_UNLCK and (found := self._conflicting(file, owner, lock)):
            if not wait:
                raise OSError(EAGAIN, "locked")
            if self._circle(owner, found[0]):
                raise OSError(EDEADLK, "waiting would never end")
            future = self.world.future()
            entry = (file, owner, lock, future)
            self._waiting.append(entry)
            try:
                await future
            finally:
                self._waiting.remove(entry)
        self._replace(file, owner, lock)

    def _circle(self, owner: int, blocker: int) -> bool:
        seen = {blocker}
        frontier = [blocker]
        while frontier:
            current = frontier.pop()
            if current == owner:
                return True
            for file, waiter, lock, _ in self._waiting:
                found = self._conflicting(file, waiter, lock) if waiter == current else None
                if found and found[0] not in seen:
                    seen.add(found[0])
                    frontier.append(found[0])
        return False

    def _replace(self, file: int, owner: int, lock: LockRange) -> None:
        kept: list[tuple[int, LockRange]] = []
        start, end = lock.start, lock.end
        for other, held in self._files.get(file, ()):
            if other != owner or held.end + 1 < start or end + 1 < held.start:
                kept.append((other, held))
            elif held.type == lock.type:
                start, end = min(start, held.start), max(end, held.end)
            else:
                if held.start < lock.start:
                    kept.append((other, LockRange(held.start, min(held.end, lock.start - 1), held.type, held.pid)))
                if held.end > lock.end:
                    kept.append((other, LockRange(max(held.start, lock.end + 1), held.end, held.type, held.pid)))
        if lock.type != F_UNLCK:
            kept.append((owner, LockRange(start, end, lock.type, lock.pid)))
        if kept:
            self._files[file] = kept
        else:
            self._files.pop(file, None)
        self._wake(file)

    def drop_owner(self, file: int, owner: int) -> None:
        """A descriptor was closed."""
        if file in self._files:
            self._replace(file, owner, LockRange(0, (1 << 63) - 1, F_UNLCK))

    def _wake(self, file: int) -> None:
        for waiting, _, _, future in self._waiting:
            if waiting == file and not future.done():
                future.set_result(None)
