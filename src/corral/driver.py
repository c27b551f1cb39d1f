"""Runs one engine over a World: send, persist, then_send, emit (DESIGN 3). The only place where engines meet time.

`feed` steps the engine and acts on what it decided before it returns; a call made while a step is being acted on is
queued behind it, so an engine is never re-entered. Records are written by one task, in order: what must follow them
(`then_send`, `emit`) waits there, what need not (`send`) has already left.

One timer, never moved back: a deadline that left it behind, as most do, costs nothing until it fires and finds that.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from corral.base.engine import TICK, Engine, Ready
from corral.base.ids import MemberId
from corral.base.time import FOREVER, Instant
from corral.base.world import Store, Timer, World

E = TypeVar("E")

Transmit = Callable[[Sequence[tuple[MemberId, Any]]], None]

BATCH = 64  # events stepped before the engine is asked for its decisions


def each(send: Callable[[MemberId, Any], None]) -> Transmit:
    """A `transmit` that sends every message by itself."""

    def transmit(messages: Sequence[tuple[MemberId, Any]]) -> None:
        for peer, message in messages:
            send(peer, message)

    return transmit


class Driver(Generic[E]):
    """`transmit([(peer, message)])` hands what was decided in one go to comm; `encode(record)` makes bytes for the
    store.

    `failed(error)` is called once when a record cannot be made durable: from then on the engine is not stepped any
    more, so nothing that depends on the lost record can leave (DESIGN 5: such a corrald stops).
    """

    def __init__(
        self,
        world: World,
        engine: Engine[E],
        name: str,
        *,
        transmit: Transmit,
        emit: Callable[[Any], None],
        store: Store | None = None,
        encode: Callable[[Any], bytes] | None = None,
        failed: Callable[[OSError], None] | None = None,
    ) -> None:
        self.engine = engine
        self.name = name
        self._world = world
        self._transmit = transmit
        self._emit = emit
        self._store = store
        self._encode = encode
        self._failed = failed
        self._inbox: list[Any] = []
        self.busy = False  # a step is being acted on: what is fed now waits behind it, and no fast path may overtake
        self._stopped = False
        self._timer: Timer | None = None
        self._timer_at: Instant = FOREVER
        self._unwritten: list[Ready] = []
        self._writing = False

    def start(self) -> None:
        """Arms the first deadline."""
        self.arm()

    def stop(self) -> None:
        self._stopped = True
        self._inbox.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def feed(self, *events: E) -> None:
        """Steps the engine with these events, in order."""
        self._inbox.extend(events)
        if not self.busy:
            self._run()

    def _run(self) -> None:
        self.busy = True
        step = self.engine.step
        try:
            while self._inbox and not self._stopped:
                now = self._world.now()
                batch, self._inbox = self._inbox, []
                if len(batch) > BATCH:
                    self._inbox = batch[BATCH:]
                    del batch[BATCH:]
                for event in batch:
                    step(now, event)
                self._act(self.engine.ready())
        finally:
            self.busy = False
        self.arm()

    def _act(self, ready: Ready) -> None:
        if ready.send:
            self._transmit(ready.send)
        if ready.persist or self._unwritten or self._writing:
            if ready.persist or ready.then_send or ready.emit:
                self._unwritten.append(ready)
                if not self._writing:
                    self._writing = True
                    self._world.spawn(self._write(), f"{self.name}: write records")
        elif ready.then_send or ready.emit:
            self._follow(ready)

    def _follow(self, ready: Ready) -> None:
        if ready.then_send:
            self._transmit(ready.then_send)
        for event in ready.emit:
            self._emit(event)

    async def _write(self) -> None:
        assert self._store is not None
        assert self._encode is not None
        try:
            while self._unwritten and not self._stopped:
                batch, self._unwritten = self._unwritten, []
                records = [self._encode(record) for ready in batch for record in ready.persist]
                if records:
                    try:
                        await self._store.append(records)
                    except OSError as error:
                        self.stop()
                        if self._failed is not None:
                            self._failed(error)
                        return
                for ready in batch:
                    if self._stopped:
                        return
                    self._follow(ready)
        finally:
            self._writing = False

    def arm(self) -> None:
        """Makes sure that the engine is woken by its deadline: also for who changed it by a fast path."""
        deadline = self.engine.deadline
        if deadline >= self._timer_at or self._stopped:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self._world.call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._timer_at = FOREVER
        if self._world.now() < self.engine.deadline:
            self.arm()
        elif not self._stopped:
            self.feed(TICK)  # type: ignore[arg-type]
