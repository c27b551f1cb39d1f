"""Many readers or one writer.

Fair: requests are granted in the order they came. A reader that comes while a writer waits waits behind it, so writers
do not starve, and nobody overtakes a reader either. A task that reads and asks to read again behind a waiting writer
would wait for itself: it is not reentrant.

A writer may go on as a reader without letting another writer in between: `await held.convert(corral.PR)`.
"""

from typing import Final, final

from corral.api.dlm import EX, PR, Lockspace, Pending
from corral.base.time import Seconds


@final
class ReadWriteLock:
    """Readers hold the resource `name` in PR, the writer in EX."""

    def __init__(self, space: Lockspace, name: str) -> None:
        self.name: Final = name
        self._space = space

    def read(self, *, timeout: Seconds | None = None, wait: bool = True) -> Pending:
        """`async with` it. Raises TimedOut, WouldBlock without `wait`, LockLost when it is lost in the body."""
        return self._space.lock(self.name, PR, timeout=timeout, wait=wait)

    def write(self, *, timeout: Seconds | None = None, wait: bool = True) -> Pending:
        """As `read`."""
        return self._space.lock(self.name, EX, timeout=timeout, wait=wait)
