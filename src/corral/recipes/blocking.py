"""The recipes for `corral.sync`: the same names, the same promises, methods that block.

    with corral.sync.connect() as cluster:
        space = cluster.lockspace("orders")
        with recipes.blocking.Mutex(space, "invoices").hold(timeout=5) as held:
            held.token

A body in a plain thread cannot be cancelled from outside: losing a lock for good raises LockLost when the body is left,
and `valid` tells it at once. For the same reason a mutex is not reentrant here, and does not notice when its own thread
asks again: that waits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Final, Generic, Protocol, Self, TypeVar, final

from corral import recipes
from corral.api.dlm import EX, PR
from corral.base.time import Seconds
from corral.recipes.election import Leader, Leadership

if TYPE_CHECKING:
    from corral.sync import Held, Space


class Opened(Protocol):
    async def open(self, *, timeout: Seconds | None = None) -> None: ...
    async def close(self) -> None: ...


R = TypeVar("R", bound=Opened)


@final
class Mutex:
    def __init__(self, space: "Space", name: str) -> None:
        self.name: Final = name
        self._space = space

    def hold(self, *, timeout: Seconds | None = None) -> "Held":
        """Held when this returns: use it in a `with`, or `unlock()` it. Raises TimedOut, LockLost."""
        return self._space.lock(self.name, EX, timeout=timeout)

    def try_hold(self) -> "Held":
        """Raises WouldBlock when somebody has it."""
        return self._space.lock(self.name, EX, wait=False)


@final
class ReadWriteLock:
    def __init__(self, space: "Space", name: str) -> None:
        self.name: Final = name
        self._space = space

    def read(self, *, timeout: Seconds | None = None, wait: bool = True) -> "Held":
        return self._space.lock(self.name, PR, timeout=timeout, wait=wait)

    def write(self, *, timeout: Seconds | None = None, wait: bool = True) -> "Held":
        return self._space.lock(self.name, EX, timeout=timeout, wait=wait)


@final
class Permit:
    def __init__(self, space: "Space", permit: recipes.Permit) -> None:
        self.number: Final = permit.number
        self.token: Final = permit.token
        self._space = space
        self._permit = permit

    @property
    def valid(self) -> bool:
        return self._permit.valid

    def release(self) -> None:
        self._space.call(self._permit.release())


@final
class Semaphore:
    def __init__(self, space: "Space", name: str, permits: int) -> None:
        self._space = space
        self._semaphore = recipes.Semaphore(space.asynchronous, name, permits)

    def acquire(self, *, timeout: Seconds | None = None) -> Permit:
        return Permit(self._space, self._space.call(self._semaphore.acquire(timeout=timeout)))

    def try_acquire(self) -> Permit:
        """Raises WouldBlock."""
        return Permit(self._space, self._space.call(self._semaphore.try_acquire()))

    @contextmanager
    def hold(self, *, timeout: Seconds | None = None) -> Iterator[Permit]:
        permit = self.acquire(timeout=timeout)
        try:
            yield permit
        finally:
            permit.release()


class _Member(Generic[R]):
    """What has to be opened and closed."""

    def __init__(self, space: "Space", recipe: R) -> None:
        self._space = space
        self._recipe = recipe

    def open(self, *, timeout: Seconds | None = None) -> None:
        self._space.call(self._recipe.open(timeout=timeout))

    def close(self) -> None:
        self._space.call(self._recipe.close())

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@final
class Register(_Member[recipes.Register]):
    def __init__(self, space: "Space", name: str, initial: bytes = b"") -> None:
        super().__init__(space, recipes.Register(space.asynchronous, name, initial))

    def read(self, *, timeout: Seconds | None = None) -> bytes:
        return self._space.call(self._recipe.read(timeout=timeout))

    def update(self, change: Callable[[bytes], bytes], *, timeout: Seconds | None = None) -> bytes:
        """`change` is called in another thread, and must not block."""
        return self._space.call(self._recipe.update(change, timeout=timeout))


@final
class Counter(_Member[recipes.Counter]):
    def __init__(self, space: "Space", name: str, initial: int = 0) -> None:
        super().__init__(space, recipes.Counter(space.asynchronous, name, initial))

    def read(self, *, timeout: Seconds | None = None) -> int:
        return self._space.call(self._recipe.read(timeout=timeout))

    def add(self, number: int = 1, *, timeout: Seconds | None = None) -> int:
        return self._space.call(self._recipe.add(number, timeout=timeout))

    def set(self, number: int, *, timeout: Seconds | None = None) -> None:
        self._space.call(self._recipe.set(number, timeout=timeout))


@final
class Election:
    def __init__(self, space: "Space", name: str, identity: bytes = b"") -> None:
        self._space = space
        self._election = recipes.Election(space.asynchronous, name, identity)

    @contextmanager
    def lead(self, *, timeout: Seconds | None = None) -> Iterator[Leadership]:
        """Raises LockLost at the end of a body during which the leadership was lost."""
        leadership = self._space.call(self._election.stand(timeout=timeout))
        try:
            yield leadership
        finally:
            self._space.call(leadership.resign())

    def leader(self, *, timeout: Seconds | None = None) -> Leader | None:
        return self._space.call(self._election.leader(timeout=timeout))


@final
class DoubleBarrier(_Member[recipes.DoubleBarrier]):
    def __init__(self, space: "Space", name: str, parties: int) -> None:
        super().__init__(space, recipes.DoubleBarrier(space.asynchronous, name, parties))

    def enter(self, *, timeout: Seconds | None = None) -> None:
        self._space.call(self._recipe.enter(timeout=timeout))

    def leave(self, *, timeout: Seconds | None = None) -> None:
        self._space.call(self._recipe.leave(timeout=timeout))


@final
class Element:
    """One that was taken: in a `with`, leaving the body is `done`, an exception gives it back."""

    def __init__(self, space: "Space", element: recipes.Element) -> None:
        self.number: Final = element.number
        self.data: Final = element.data
        self.token: Final = element.token
        self._space = space
        self._element = element

    @property
    def valid(self) -> bool:
        return self._element.valid

    def done(self, *, timeout: Seconds | None = None) -> None:
        self._space.call(self._element.done(timeout=timeout))

    def give_back(self) -> None:
        self._space.call(self._element.give_back())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.done()
        else:
            self.give_back()


@final
class Queue(_Member[recipes.Queue]):
    def __init__(self, space: "Space", name: str) -> None:
        super().__init__(space, recipes.Queue(space.asynchronous, name))

    def put(self, data: bytes, *, timeout: Seconds | None = None) -> int:
        return self._space.call(self._recipe.put(data, timeout=timeout))

    def take(self, *, timeout: Seconds | None = None) -> Element:
        return Element(self._space, self._space.call(self._recipe.take(timeout=timeout)))

    def try_take(self) -> Element | None:
        element = self._space.call(self._recipe.try_take())
        return None if element is None else Element(self._space, element)

    def length(self, *, timeout: Seconds | None = None) -> int:
        return self._space.call(self._recipe.length(timeout=timeout))
