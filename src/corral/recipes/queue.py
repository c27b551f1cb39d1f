"""A bounded queue, first in first out. An element is taken by one taker, and again only if that one dies before it is
done.

The elements are kept in the value of a `Register`: with every member, as long as there is one, and nowhere else. All of
them together have room in one value block, so open the lockspace with a large one (`value_size=4096`). Who takes an
element holds `name/e/<number>` in EX and leaves it in the value; `done` takes it out there, then lets go of the lock. A
taker that dies, or gives it back, lets go of the lock only, and the element is the next one's, in its old place.

======= ==== ==================================================
offset  size of an element in the value, the oldest first (little-endian)
======= ==== ==================================================
0       8    number, rising
8       2    length
10      n    the element
======= ==== ==================================================
"""

from types import TracebackType
from typing import Final, NamedTuple, Self, final

from corral.api.dlm import EX, Lock, Lockspace
from corral.base.errors import WouldBlock
from corral.base.time import Seconds
from corral.recipes.register import OnRegister, Register, Value
from corral.recipes.waiting import Deadline, first_of

HEADER: Final = 10


class Entry(NamedTuple):
    number: int
    data: bytes


class _Full(Exception):
    """There is no room now."""

    def __init__(self, version: int) -> None:
        self.version = version


@final
class Element:
    """One that was taken. `async with` it: leaving the body is `done`, an exception gives it back."""

    def __init__(self, queue: "Queue", entry: Entry, lock: Lock) -> None:
        self.number: Final = entry.number  # in the order of the queue, and unique while it has a member
        self.data: Final = entry.data
        self._queue = queue
        self._lock = lock

    @property
    def token(self) -> int:
        """For effects outside the cluster: rises with each taker of the same element."""
        return self._lock.token

    @property
    def valid(self) -> bool:
        """False once the lease has lapsed: from then on somebody else may have taken it."""
        return self._lock.valid

    async def done(self, *, timeout: Seconds | None = None) -> None:
        """Nobody will see it again. After TimedOut, or if cancelled, it may be done or not; try again. Raises LockLost
        when it is somebody else's."""
        await self._queue._remove(self.number, Deadline(timeout))
        await self._lock.unlock()

    async def give_back(self) -> None:
        """Into its old place. Raises LockLost."""
        await self._lock.unlock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.done()
        else:
            self._lock.unlock_nowait()


@final
class Queue(OnRegister):
    """`async with Queue(space, "name") as queue`, or `open` and `close`. Each open one is a member and keeps all."""

    def __init__(self, space: Lockspace, name: str) -> None:
        super().__init__(Register(space, name))
        self._space = space

    async def put(self, data: bytes, *, timeout: Seconds | None = None) -> int:
        """Waits for room. Returns its number. After TimedOut or a cancelled task it may be there or not, unless the
        error says that there was no room. Raises ValueError when it has no room in an empty queue."""
        deadline = Deadline(timeout)
        what = f"queue {self.name}: waits for room for {len(data)} bytes"
        if HEADER + len(data) > self._register.capacity:
            raise ValueError(
                f"queue {self.name}: an element of {len(data)} bytes is too long; the lockspace's value_size leaves "
                f"room for {self._register.capacity - HEADER}"
            )

        def append(value: Value) -> bytes:
            entry = Entry(value.version + 1, data)
            if len(value.data) + HEADER + len(data) > self._register.capacity:
                raise _Full(value.version)
            return value.data + _encode(entry)

        while True:
            try:
                return (await self._register.update_value(append, deadline)).version
            except _Full as full:
                await deadline.wait(self._register.changed(full.version), what)

    async def take(self, *, timeout: Seconds | None = None) -> Element:
        """The oldest that nobody has taken. Waits for one; raises TimedOut, LockLost."""
        deadline = Deadline(timeout)
        what = f"queue {self.name}: waits for an element"
        while True:
            value = await self._register.read_value(deadline)
            entries = _decode(value.data)
            for entry in entries:
                try:
                    lock = await self._space.lock(self._claim(entry), EX, wait=False)
                except WouldBlock:
                    continue
                if (taken := await self._taken(entry, lock, deadline)) is not None:
                    return taken
                break  # it was done before we had it: others may be too
            else:
                claims = {self._claim(entry): entry for entry in entries}
                changed = self._register.changed(value.version)
                won = await first_of(self._space, claims, deadline, what, unless=changed)
                if won is not None and (taken := await self._taken(claims[won[0]], won[1], deadline)) is not None:
                    return taken

    async def try_take(self) -> Element | None:
        """None when there is nothing to take."""
        deadline = Deadline(None)
        for entry in _decode((await self._register.read_value(deadline)).data):
            try:
                lock = await self._space.lock(self._claim(entry), EX, wait=False)
            except WouldBlock:
                continue
            if (taken := await self._taken(entry, lock, deadline)) is not None:
                return taken
        return None

    async def length(self, *, timeout: Seconds | None = None) -> int:
        """Elements that are not done, taken ones too."""
        return len(_decode((await self._register.read_value(Deadline(timeout))).data))

    # --- leaves ------------------------------------------------------------------------------------------------------

    def _claim(self, entry: Entry) -> str:
        return f"{self.name}/e/{entry.number:x}"

    async def _taken(self, entry: Entry, lock: Lock, deadline: Deadline) -> Element | None:
        """With its lock in hand: is it still there? None, and the lock is given back, when it is done."""
        try:
            if entry in _decode((await self._register.read_value(deadline)).data):
                return Element(self, entry, lock)
        except BaseException:
            lock.unlock_nowait()
            raise
        lock.unlock_nowait()
        return None

    async def _remove(self, number: int, deadline: Deadline) -> None:
        def remove(value: Value) -> bytes:
            return b"".join(_encode(entry) for entry in _decode(value.data) if entry.number != number)

        await self._register.update_value(remove, deadline)


def _encode(entry: Entry) -> bytes:
    return entry.number.to_bytes(8, "little") + len(entry.data).to_bytes(2, "little") + entry.data


def _decode(data: bytes) -> list[Entry]:
    entries: list[Entry] = []
    offset = 0
    while offset < len(data):
        start = offset + HEADER
        length = int.from_bytes(data[offset + 8 : start], "little")
        entries.append(Entry(int.from_bytes(data[offset : offset + 8], "little"), data[start : start + length]))
        offset = start + length
    return entries
