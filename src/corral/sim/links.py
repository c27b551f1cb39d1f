"""The wires between hosts: one `Link` for each direction of each pair, and the rules that disturb them.

A rule answers for one packet: pass, drop, or pass late. Rules are asked in the order they were laid; one that drops
decides, delays add up. A partition is a `Cut` on some links; one that lies on one direction only is one-way.
"""

from collections.abc import Iterable
from random import Random
from typing import Final, Protocol

from corral.sim.knobs import Knobs, skewed

DROP: Final = -1


class Rule(Protocol):
    def judge(self, rng: Random, size: int) -> int:
        """Extra delay in nanoseconds, or DROP."""

    def copies(self, rng: Random) -> int:
        """How many times too often a datagram arrives."""


class Cut:
    """Nothing passes."""

    def judge(self, rng: Random, size: int) -> int:
        return DROP

    def copies(self, rng: Random) -> int:
        return 0


class Loss:
    """Each packet is lost with this probability; a connection sends it again a little later."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def judge(self, rng: Random, size: int) -> int:
        return DROP if rng.random() < self.probability else 0

    def copies(self, rng: Random) -> int:
        return 0


class Delay:
    """Each packet takes between `low` and `high` nanoseconds longer, so datagrams overtake each other."""

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    def judge(self, rng: Random, size: int) -> int:
        return rng.randrange(self.low, self.high + 1)

    def copies(self, rng: Random) -> int:
        return 0


class Repeat:
    """Each datagram arrives twice with this probability."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def judge(self, rng: Random, size: int) -> int:
        return 0

    def copies(self, rng: Random) -> int:
        return 1 if rng.random() < self.probability else 0


class Link:
    """One direction between two hosts, or within one machine."""

    __slots__ = ("_rng", "high", "loss", "low", "repeat", "rules", "source", "target")

    def __init__(self, rng: Random, knobs: Knobs, source: str, target: str, *, inside: bool) -> None:
        self._rng = rng
        self.source = source
        self.target = target
        self.low = knobs.loopback_low if inside else knobs.latency_low
        self.high = knobs.loopback_high if inside else knobs.latency_high
        self.loss = 0.0 if inside else knobs.datagram_loss
        self.repeat = 0.0 if inside else knobs.datagram_repeat
        self.rules: tuple[Rule, ...] = ()

    def latency(self) -> int:
        return skewed(self._rng, self.low, self.high)

    def judge(self, size: int) -> int:
        """How long this packet takes, or DROP."""
        delay = skewed(self._rng, self.low, self.high)
        for rule in self.rules:
            extra = rule.judge(self._rng, size)
            if extra < 0:
                return DROP
            delay += extra
        return delay

    def datagram_delays(self, size: int) -> Iterable[int]:
        """One delay for each copy of a datagram that arrives: usually one, none when it is lost."""
        rng = self._rng
        if self.loss and rng.random() < self.loss:
            return ()
        delay = self.judge(size)
        if delay < 0:
            return ()
        if not self.repeat and not self.rules:
            return (delay,)
        copies = 1 if self.repeat and rng.random() < self.repeat else 0
        copies += sum(rule.copies(rng) for rule in self.rules)
        return (delay, *(delay + self.latency() for _ in range(copies)))


class LaidRule:
    """A rule in force on every link from `sources` to `targets` (hosts) until `heal` is called."""

    def __init__(self, fabric: "Relinkable", rule: Rule, sources: frozenset[str], targets: frozenset[str]) -> None:
        self._fabric = fabric
        self.rule = rule
        self.sources = sources
        self.targets = targets

    def heal(self) -> None:
        """No error when it is healed already."""
        if self in self._fabric.laid:
            self._fabric.laid.remove(self)
            self._fabric.relink()


class Relinkable(Protocol):
    laid: list[LaidRule]

    def relink(self) -> None: ...
