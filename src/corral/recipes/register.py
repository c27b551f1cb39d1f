"""A small value that all members see alike, changed atomically, that lives as long as one member does.

A value block alone is not enough: when the node that may be writing it dies, or the one that masters it while nobody
else holds more than NL, it is not valid any more. So the value is kept twice, in the blocks of `name/a` and `name/b`,
and every member (an open Register) holds both in PR. What a lock of PR has read survives every death but its own.

Writing, by whoever holds `name/w` in EX: EX on a, which the members let go when asked, the new value, back to PR; then
the same with b. A member lets one of the two go only while it holds the other, valid and not older. So

  1. at every moment each member holds a current copy of the last acknowledged value;
  2. when b is granted to the writer, every member has the new value, and only then is the change acknowledged;
  3. what a writer left undone is seen by the next (a and b differ, or one is not valid) and finished: a new value that
     is whole in a is carried on to b, one that is not is gone. It had not been acknowledged.

A member may read its own copies without a message while both say the same; else it takes `name/w` first. Reads and
changes together are linearizable. When the last member is gone so is the value: the next to open it begins anew.
The price: each change asks every member twice. A member that hangs (not: that dies) delays changes until their
timeouts.

======= ==== ==================================================
offset  size of a block (little-endian)
======= ==== ==================================================
0       8    version: 1 for the first value, one more with each change; 0: never written
8       2    length of the value
10      n    the value
======= ==== ==================================================
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, final

from corral.api.dlm import EX, NL, PR, QUECVT, Lock, Lockspace
from corral.base.errors import ClusterError, LockLost, TimedOut
from corral.base.time import Seconds
from corral.recipes.waiting import Bell, Deadline, check_name

HEADER: Final = 10


class ValueLost(ClusterError):
    """Both copies of a value are not valid although somebody has it open: it cannot be told what it was."""


class Value(NamedTuple):
    version: int
    data: bytes

    def encode(self) -> bytes:
        return self.version.to_bytes(8, "little") + len(self.data).to_bytes(2, "little") + self.data


BLANK: Final = Value(0, b"")


@final
class Copy:
    """One of the two blocks, as this member holds it."""

    def __init__(self, name: str, bell: Bell) -> None:
        self.name: Final = name
        self.lock: Lock
        self.wanted = False  # somebody wants to write it
        self.settled = False  # held in PR, and no conversion is under way
        self._bell = bell

    def asked_for(self, _mode: int) -> None:
        self.wanted = True
        self._bell.ring()

    @property
    def valid(self) -> bool:
        """Whether it can be trusted."""
        return self.lock.value_valid and self.value.version > 0

    @property
    def value(self) -> Value:
        block = self.lock.value
        length = int.from_bytes(block[8:HEADER], "little")
        return Value(int.from_bytes(block[:8], "little"), bytes(block[HEADER : HEADER + length]))

    async def give_way(self) -> None:
        self.wanted = False
        self.settled = False
        await self.lock.convert(NL)
        # Behind the writer: without QUECVT it would be granted at once, and the writer wait until all let go together.
        await self.lock.convert(PR, flags=QUECVT)
        self.settled = True
        self._bell.ring()

    async def write(self, value: Value, deadline: Deadline) -> None:
        """Only under `name/w`. After TimedOut nothing has been written."""
        what = f"{self.name}: waits for every member to let go of its copy"
        try:
            await self.lock.convert(EX, timeout=deadline.left(what))
        except TimedOut as error:
            raise TimedOut(f"{what}: it took longer than its timeout") from error
        self.settled = False
        await self.lock.convert(PR, value=value.encode())
        self.settled = True
        self._bell.ring()


class Opened(ABC):
    """`async with` for what is opened and closed."""

    @abstractmethod
    async def open(self, *, timeout: Seconds | None = None) -> None: ...
    @abstractmethod
    async def close(self) -> None: ...

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


@final
class Register(Opened):
    """`async with Register(space, "name") as register`, or `open` and `close`. One per process and name is enough: all
    its methods may be called from many tasks."""

    def __init__(self, space: Lockspace, name: str, initial: bytes = b"") -> None:
        self.name: Final = check_name(name)
        self.capacity = 0  # bytes a value may have, once it is open
        self._space = space
        self._initial = initial
        self._bell = Bell()
        self._a: Final = Copy(f"{name}/a", self._bell)
        self._b: Final = Copy(f"{name}/b", self._bell)
        self._writing = False
        self._lost: ClusterError | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._writers: set[asyncio.Task[Value]] = set()

    # --- life --------------------------------------------------------------------------------------------------------

    async def open(self, *, timeout: Seconds | None = None) -> None:
        """Becomes a member. The first one writes the initial value. Raises TimedOut, ValueLost, LockLost."""
        if self._keeper is not None:
            raise ValueError(f"{self.name} is open already")
        deadline = Deadline(timeout)
        writer = await self._writer(deadline)
        try:
            await self._join(deadline)
            if not (self._a.valid or self._b.valid or self._a.value == self._b.value == BLANK):
                # Somebody who died while we waited left it so. Once we let go it is blank, unless others hold it.
                await self.close()
                await self._join(deadline)
        except BaseException:
            writer.unlock_nowait()
            await self.close()
            raise
        try:
            await self._shielded(writer, self._change(lambda value: value.data, deadline, opening=True))
        except BaseException:
            await self.close()
            raise
        self.capacity = len(self._a.lock.value) - HEADER

    async def close(self) -> None:
        """Stops being a member. A change that was under way is finished by others, or was never acknowledged."""
        keeper, self._keeper = self._keeper, None
        for writer in [*self._writers]:
            writer.cancel()
        if keeper is not None:
            keeper.cancel()
            with suppress(asyncio.CancelledError, ClusterError):
                await keeper

    # --- use ---------------------------------------------------------------------------------------------------------

    async def read(self, *, timeout: Seconds | None = None) -> bytes:
        """The value as of some moment of this call. Raises TimedOut, ValueLost, LockLost."""
        return (await self.read_value(Deadline(timeout))).data

    async def update(self, change: Callable[[bytes], bytes], *, timeout: Seconds | None = None) -> bytes:
        """Sets the value to what `change` makes of the present one; returns the new one. What `change` raises is
        passed on, and nothing has changed. After TimedOut, or when the task is cancelled, the change may have
        happened or may still happen: read to know. Raises ValueError when the value is too long, ValueLost, LockLost.
        """
        return (await self.update_value(lambda value: change(value.data), Deadline(timeout))).data

    # --- for recipes -------------------------------------------------------------------------------------------------

    async def read_value(self, deadline: Deadline) -> Value:
        if self._current():
            return self._a.value
        return await self.update_value(lambda value: value.data, deadline)

    async def update_value(self, change: Callable[[Value], bytes], deadline: Deadline) -> Value:
        self._check()
        writer = await self._writer(deadline)
        return await self._shielded(writer, self._change(change, deadline))

    async def changed(self, version: int) -> None:
        """Waits until this member has heard of a newer version. Raises LockLost."""
        while True:
            self._check()
            if max(copy.value.version for copy in (self._a, self._b)) > version:
                return
            await self._bell.wait()

    # --- the member --------------------------------------------------------------------------------------------------

    async def _join(self, deadline: Deadline) -> None:
        """Returns when both copies are held."""
        held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keeper = keeper = asyncio.create_task(self._keep(held), name=f"keep {self.name}")
        keeper.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        either: set[asyncio.Future[None]] = {keeper, held}
        await deadline.wait(
            asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED), f"{self.name}: waits for its copies"
        )
        if not held.done():
            await keeper  # raises

    async def _keep(self, held: "asyncio.Future[None]") -> None:
        """Holds both copies until it is cancelled, and gives them way to writers."""
        try:
            async with (
                self._space.lock(self._a.name, PR, on_block=self._a.asked_for) as self._a.lock,
                self._space.lock(self._b.name, PR, on_block=self._b.asked_for) as self._b.lock,
            ):
                self._a.settled = self._b.settled = True
                if not held.done():
                    held.set_result(None)
                while True:
                    copy = self._to_give_way()
                    if copy is not None:
                        await copy.give_way()
                    else:
                        await self._bell.wait()
        except ClusterError as error:
            self._lost = error
            raise
        finally:
            self._a.settled = self._b.settled = False
            self._bell.ring()

    def _to_give_way(self) -> Copy | None:
        """The copy that is wanted, if the other is as good: one of them must be kept."""
        if self._writing:
            return None
        for copy, other in ((self._a, self._b), (self._b, self._a)):
            if copy.wanted and (
                not copy.valid or (other.settled and other.valid and other.value.version >= copy.value.version)
            ):
                return copy
        return None

    def _current(self) -> bool:
        """Whether the copies here are the value now: nobody can have changed it since, and nothing is half done."""
        return (
            self._a.settled
            and self._b.settled
            and self._a.valid
            and self._b.valid
            and self._a.value == self._b.value
            and self._a.lock.valid
            and self._b.lock.valid
        )

    def _check(self) -> None:
        if self._lost is not None:
            raise LockLost(f"{self.name}: {self._lost}") from self._lost
        if self._keeper is None:
            raise ValueError(f"{self.name} is not open")

    # --- the writer --------------------------------------------------------------------------------------------------

    async def _writer(self, deadline: Deadline) -> Lock:
        what = f"{self.name}: waits for others to finish their changes"
        return await deadline.lock(self._space, f"{self.name}/w", what)

    async def _shielded(self, writer: Lock, changing: Coroutine[Any, Any, Value]) -> Value:
        """A change goes on when the task that asked for it is cancelled: it ends in a good state by itself, and gives
        `name/w` back."""
        task = asyncio.create_task(changing, name=f"change {self.name}")
        self._writers.add(task)

        def ended(done: asyncio.Task[Value]) -> None:
            self._writers.discard(done)
            self._writing = False
            self._bell.ring()
            writer.unlock_nowait()
            if not done.cancelled():
                done.exception()  # it has been looked at, also when nobody waits any more

        task.add_done_callback(ended)
        return await asyncio.shield(task)

    async def _change(self, change: Callable[[Value], bytes], deadline: Deadline, *, opening: bool = False) -> Value:
        """Under `name/w`."""
        what = f"{self.name}: waits for its copies"
        self._writing = True
        while not (self._a.settled and self._b.settled):
            self._check()
            await deadline.wait(self._bell.wait(), what)
        before = self._best(opening=opening)
        for copy in (self._a, self._b):  # what the last writer left undone
            if not copy.valid or copy.value != before:
                await copy.write(before, deadline)
        data = change(before)
        if data == before.data:
            return before
        if len(data) > len(self._a.lock.value) - HEADER:
            raise ValueError(f"{self.name}: {len(data)} bytes are too many for a value block of this lockspace")
        after = Value(before.version + 1, data)
        for copy in (self._a, self._b):
            await copy.write(after, deadline)
        return after

    def _best(self, *, opening: bool) -> Value:
        """What counts: the newest copy that is valid."""
        valid = [copy.value for copy in (self._a, self._b) if copy.valid]
        if valid:
            return max(valid)
        if opening and self._a.value == self._b.value == BLANK:
            return Value(1, self._initial)
        raise ValueLost(
            f"{self.name}: neither copy of its value is valid; close it everywhere: the next to open it begins anew"
        )


class OnRegister(Opened):
    """A recipe that keeps its state in a register, and lives as long."""

    def __init__(self, register: Register) -> None:
        self._register = register

    @property
    def name(self) -> str:
        return self._register.name

    async def open(self, *, timeout: Seconds | None = None) -> None:
        await self._register.open(timeout=timeout)

    async def close(self) -> None:
        await self._register.close()
