"""What the tests of the simulated world share: a handler that remembers, and a run of a body in a fresh world."""

from collections.abc import Callable, Coroutine
from typing import Any

from corral.base.world import Connection
from corral.sim.knobs import Knobs
from corral.sim.simulation import Simulation


class Recorder:
    """A connection handler that keeps all it was told."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.breaks: list[str] = []
        self.connection: Connection | None = None
        self.wakeups = 0

    def received(self, messages: list[bytes]) -> None:
        assert not self.breaks, "delivered after the break"
        self.wakeups += 1
        self.messages.extend(messages)

    def broken(self, reason: str) -> None:
        self.breaks.append(reason)


class Accepting:
    """An `accept` that gives every connection a Recorder."""

    def __init__(self) -> None:
        self.handlers: list[Recorder] = []

    def __call__(self, connection: Connection) -> Recorder:
        handler = Recorder()
        handler.connection = connection
        self.handlers.append(handler)
        return handler


def simulate(
    body: Callable[[Simulation], Coroutine[Any, Any, Any]], *, machines: int = 2, seed: int = 1, **knobs: Any
) -> Any:
    """Runs the body in a world of so many machines (n1, n2, ...), with these knobs turned."""
    chosen = Knobs()
    for name, value in knobs.items():
        assert hasattr(chosen, name)
        setattr(chosen, name, value)
    with Simulation(seed, chosen) as sim:
        for node in range(1, machines + 1):
            sim.machine(node)
        return sim.run(body(sim))
