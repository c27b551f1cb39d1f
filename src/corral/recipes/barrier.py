"""A double barrier: all enter together, and all leave together.

    async with DoubleBarrier(space, "step-1", parties=3) as barrier:
        await barrier.enter(timeout=60)     # returns when three are in
        ...
        await barrier.leave(timeout=60)     # returns when all of them have left, or died

It can be used again and again. Who comes while the others are still inside waits for the next turn. One that dies
before the last has entered is not counted; one that dies inside has left.

Who is in is the value of a `Register`; each of them holds `name/p/<number>` in EX while it is, so that the others can
tell the dead from the slow. Each takes 8 bytes, so open the lockspace with value blocks large enough.

======= ==== ==================================================
offset  size of the value (little-endian)
======= ==== ==================================================
0       1    0: entering, 1: leaving
1       4    turns that are over
5       8 n  the numbers of who is in, sorted
======= ==== ==================================================
"""

from typing import Final, NamedTuple, final

from corral.api.dlm import EX, Lock, Lockspace
from corral.base.errors import WouldBlock
from corral.base.time import Seconds
from corral.recipes.register import OnRegister, Register, Value
from corral.recipes.waiting import Deadline, first_of, unique

HEADER: Final = 5


class State(NamedTuple):
    leaving: bool
    turn: int
    inside: tuple[int, ...]

    def encode(self) -> bytes:
        numbers = b"".join(number.to_bytes(8, "little") for number in sorted(self.inside))
        return bytes([self.leaving]) + self.turn.to_bytes(4, "little") + numbers

    def without(self, number: int) -> "State":
        """The last one out ends the turn."""
        left = tuple(other for other in self.inside if other != number)
        if self.leaving and not left:
            return State(False, (self.turn + 1) % (1 << 32), ())
        return self._replace(inside=left)


def decode(data: bytes) -> State:
    numbers = tuple(int.from_bytes(data[at : at + 8], "little") for at in range(HEADER, len(data), 8))
    return State(bool(data[0]), int.from_bytes(data[1:HEADER], "little"), numbers)


EMPTY: Final = State(False, 0, ())


@final
class DoubleBarrier(OnRegister):
    """`async with`, or `open` and `close`. One object is one party: enter and leave by turns."""

    def __init__(self, space: Lockspace, name: str, parties: int) -> None:
        if parties < 1:
            raise ValueError("a barrier is for one party or more")
        self.parties: Final = parties
        super().__init__(Register(space, name, EMPTY.encode()))
        self._space = space
        self._number = 0
        self._turn = 0
        self._presence: Lock | None = None

    async def open(self, *, timeout: Seconds | None = None) -> None:
        """Raises ValueError when a value block has no room for so many parties."""
        await super().open(timeout=timeout)
        if HEADER + 8 * self.parties > self._register.capacity:
            await self.close()
            raise ValueError(
                f"barrier {self.name}: {self.parties} parties need value blocks of "
                f"{HEADER + 8 * self.parties + 10} bytes: open the lockspace with a larger value_size"
            )

    async def close(self) -> None:
        """Who is inside has left."""
        self._drop_presence()
        await super().close()

    async def enter(self, *, timeout: Seconds | None = None) -> None:
        """Returns when all parties are in. Raises TimedOut, and LockLost; then it is not in, though if the others were
        complete in that very moment they go on."""
        if self._presence is not None:
            raise ValueError(f"barrier {self.name}: this party is in already; `leave` first")
        deadline = Deadline(timeout)
        what = f"barrier {self.name}: waits for {self.parties} parties to enter"
        self._number = await unique(self._space, f"{self.name}/i", deadline, what)
        self._presence = await deadline.lock(self._space, self._present(self._number), what)
        try:
            while True:
                value = await self._register.update_value(self._come_in, deadline)
                state = decode(value.data)
                if self._number in state.inside:
                    if state.leaving:
                        self._turn = state.turn
                        return
                    if len(state.inside) == self.parties:
                        await self._begin(state, deadline)
                        continue
                await self._wait(value, state, deadline, what)
        except BaseException:
            self._drop_presence()
            raise

    async def leave(self, *, timeout: Seconds | None = None) -> None:
        """Returns when all have left. Raises TimedOut and LockLost; it has left then too, or counts as dead."""
        if self._presence is None:
            raise ValueError(f"barrier {self.name}: this party is not in; `enter` first")
        deadline = Deadline(timeout)
        what = f"barrier {self.name}: waits for the others to leave"
        try:
            while True:
                value = await self._register.update_value(
                    lambda value: decode(value.data).without(self._number).encode(), deadline
                )
                state = decode(value.data)
                if state.turn != self._turn:
                    return
                await self._wait(value, state, deadline, what)
        finally:
            self._drop_presence()

    # --- leaves ------------------------------------------------------------------------------------------------------

    def _come_in(self, value: Value) -> bytes:
        state = decode(value.data)
        if state.leaving or self._number in state.inside or len(state.inside) >= self.parties:
            return value.data
        return state._replace(inside=(*state.inside, self._number)).encode()

    async def _begin(self, state: State, deadline: Deadline) -> None:
        """All have come: all go in, if all live."""
        for number in state.inside:
            if number != self._number:
                try:
                    presence = await self._space.lock(self._present(number), EX, wait=False)
                except WouldBlock:
                    continue
                await self._bury(number, presence, deadline)
                return

        def begin(value: Value) -> bytes:
            now = decode(value.data)
            return (now._replace(leaving=True) if now == state else now).encode()

        await self._register.update_value(begin, deadline)

    async def _bury(self, number: int, presence: Lock, deadline: Deadline) -> None:
        try:
            await self._register.update_value(lambda value: decode(value.data).without(number).encode(), deadline)
        finally:
            presence.unlock_nowait()

    async def _wait(self, value: Value, state: State, deadline: Deadline, what: str) -> None:
        """Until something has changed; the dead are taken out."""
        others = {self._present(number): number for number in state.inside if number != self._number}
        changed = self._register.changed(value.version)
        won = await first_of(self._space, others, deadline, what, unless=changed)
        if won is not None:
            await self._bury(others[won[0]], won[1], deadline)

    def _present(self, number: int) -> str:
        return f"{self.name}/p/{number:x}"

    def _drop_presence(self) -> None:
        presence, self._presence = self._presence, None
        if presence is not None:
            presence.unlock_nowait()
