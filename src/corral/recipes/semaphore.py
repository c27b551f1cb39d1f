"""n permits. Permits of the dead come back by themselves, for a permit is a lock.

Permit i is the resource `name/i` in EX. Who wants one first takes the gate `name/g`, which is first come first served;
in the gate it tries the permits one by one, and if none is free asks for all of them at once and keeps the first that
comes. So there is one waiter at the permits, in its turn, and no count anywhere that could be lost.

All must agree on n. The value block of the gate says what it is, and lives while any permit is held, for a permit comes
with an NL lock on the gate. Who comes with another n meanwhile gets ValueError.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, final

from corral.api.dlm import EX, NL, Lock, Lockspace
from corral.base.errors import WouldBlock
from corral.base.time import Seconds
from corral.recipes.waiting import Deadline, check_name, first_of

PERMITS_MAX: Final = 1024
_MARK: Final = b"sem\0"


@final
class Permit:
    """One of the n, held. `number` is 0 to n - 1 and nobody else's meanwhile; `token` rises with each holder of it."""

    def __init__(self, number: int, lock: Lock, gate: Lock) -> None:
        self.number: Final = number
        self._lock = lock
        self._gate = gate  # in NL: keeps its value block alive

    @property
    def token(self) -> int:
        return self._lock.token

    @property
    def valid(self) -> bool:
        """False once the lease has lapsed."""
        return self._lock.valid

    async def release(self) -> None:
        """Raises LockLost when it is not ours any more."""
        self._gate.unlock_nowait()
        await self._lock.unlock()


@final
class Semaphore:
    def __init__(self, space: Lockspace, name: str, permits: int) -> None:
        if not 1 <= permits <= PERMITS_MAX:
            raise ValueError(f"a semaphore has 1 to {PERMITS_MAX} permits, not {permits}")
        self.name: Final = check_name(name)
        self.permits: Final = permits
        self._space = space
        self._last = 0  # where to look first: with luck the one given back last

    async def acquire(self, *, timeout: Seconds | None = None) -> Permit:
        """Raises TimedOut. In the order in which it was asked for."""
        deadline = Deadline(timeout)
        what = f"semaphore {self.name}"
        gate = await deadline.lock(self._space, self._gate, f"{what}: waits for its turn")
        try:
            self._check(gate)
            found = await self._free()
            if found is None:
                names = [self._permit(number) for number in range(self.permits)]
                won = await first_of(self._space, names, deadline, f"{what}: waits for one of {self.permits} permits")
                assert won is not None
                found = names.index(won[0]), won[1]
        except BaseException:
            gate.unlock_nowait()
            raise
        return await self._taken(found, gate)

    async def try_acquire(self) -> Permit:
        """Raises WouldBlock when there is no free permit, or somebody waits for one."""
        gate = await self._space.lock(self._gate, EX, wait=False)
        try:
            self._check(gate)
            found = await self._free()
            if found is None:
                raise WouldBlock(f"semaphore {self.name}: all {self.permits} permits are taken")
        except BaseException:
            gate.unlock_nowait()
            raise
        return await self._taken(found, gate)

    @asynccontextmanager
    async def hold(self, *, timeout: Seconds | None = None) -> AsyncIterator[Permit]:
        """A permit for a body. Raises TimedOut, and LockLost at its end when the permit was lost; `valid` says it at
        once."""
        permit = await self.acquire(timeout=timeout)
        try:
            yield permit
        finally:
            await permit.release()

    # --- leaves ------------------------------------------------------------------------------------------------------

    @property
    def _gate(self) -> str:
        return f"{self.name}/g"

    def _permit(self, number: int) -> str:
        return f"{self.name}/{number}"

    def _check(self, gate: Lock) -> None:
        others = int.from_bytes(gate.value[4:8], "little")
        if gate.value_valid and gate.value[:4] == _MARK and others != self.permits:
            raise ValueError(f"semaphore {self.name} has {others} permits elsewhere, not {self.permits}")

    async def _free(self) -> tuple[int, Lock] | None:
        for offset in range(self.permits):
            number = (self._last + offset) % self.permits
            try:
                return number, await self._space.lock(self._permit(number), EX, wait=False)
            except WouldBlock:
                continue
        return None

    async def _taken(self, found: tuple[int, Lock], gate: Lock) -> Permit:
        """Lets the next one into the gate."""
        number, lock = found
        self._last = number
        try:
            await gate.convert(NL, value=_MARK + self.permits.to_bytes(4, "little"))
        except BaseException:
            gate.unlock_nowait()
            lock.unlock_nowait()
            raise
        return Permit(number, lock, gate)
