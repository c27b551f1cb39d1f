"""A counter that is exact: what was acknowledged is counted once, whoever dies; `register` tells how, and the price.

An addition that was not acknowledged (TimedOut, cancelled, LockLost) is counted once or not at all. The counter lives
as long as one process has it open, then it begins at `initial` again.
"""

from typing import Final, final

from corral.api.dlm import Lockspace
from corral.base.time import Seconds
from corral.recipes.register import OnRegister, Register

_LEAST: Final = -(1 << 63)
_MOST: Final = (1 << 63) - 1


@final
class Counter(OnRegister):
    """64 bits with a sign. `async with Counter(space, "name") as counter`, or `open` and `close`."""

    def __init__(self, space: Lockspace, name: str, initial: int = 0) -> None:
        super().__init__(Register(space, name, _encode(initial)))

    async def read(self, *, timeout: Seconds | None = None) -> int:
        """Raises TimedOut, ValueLost, LockLost; so do the others."""
        return _decode(await self._register.read(timeout=timeout))

    async def add(self, number: int = 1, *, timeout: Seconds | None = None) -> int:
        """Returns the count after it. Raises ValueError when that needs more than 64 bits."""
        return _decode(await self._register.update(lambda data: _encode(_decode(data) + number), timeout=timeout))

    async def set(self, number: int, *, timeout: Seconds | None = None) -> None:
        await self._register.update(lambda _: _encode(number), timeout=timeout)


def _encode(number: int) -> bytes:
    if not _LEAST <= number <= _MOST:
        raise ValueError(f"a counter has 64 bits, which {number} does not fit into")
    return number.to_bytes(8, "little", signed=True)


def _decode(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)
