"""The one shape of a protocol core: decide, then act (DESIGN 3).

An engine is stepped with events and a clock reading and collects what is to be done in a `Ready`. It never awaits,
sends, sleeps, reads a clock or draws a random number. The order inside `Ready` is the contract the driver keeps.
"""

from typing import Any, Final, Generic, Protocol, TypeVar, final

from corral.base.ids import MemberId
from corral.base.time import Instant

E_contra = TypeVar("E_contra", contravariant=True)


@final
class Tick:
    """The event that means: your deadline has come."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "TICK"


TICK: Final = Tick()


@final
class Ready:
    """Everything an engine decided since it was last asked.

    1. `send` leaves at once; nothing in it depends on `persist`. 2. `persist` is made durable, in order. 3. `then_send`
    leaves: promises and acceptances. 4. `emit` goes to whoever runs the engine. `send` never waits for a disk.
    Within each list order is kept; per peer, `send` of a Ready leaves before `then_send` of the same Ready.
    """

    __slots__ = ("emit", "persist", "send", "then_send")

    def __init__(self) -> None:
        self.send: list[tuple[MemberId, Any]] = []
        self.persist: list[Any] = []
        self.then_send: list[tuple[MemberId, Any]] = []
        self.emit: list[Any] = []

    def __bool__(self) -> bool:
        return bool(self.send or self.persist or self.then_send or self.emit)


class Engine(Protocol[E_contra]):
    """`deadline`: step(now, TICK) no later than this; FOREVER when idle. It may change with every step."""

    @property
    def deadline(self) -> Instant: ...

    def step(self, now: Instant, event: E_contra) -> None: ...

    def ready(self) -> Ready: ...


class Received(Generic[E_contra]):
    """A decoded message from a peer, as engines get it."""

    __slots__ = ("message", "peer")

    def __init__(self, peer: MemberId, message: E_contra) -> None:
        self.peer = peer
        self.message = message

    def __repr__(self) -> str:
        return f"Received({self.peer}, {self.message})"
