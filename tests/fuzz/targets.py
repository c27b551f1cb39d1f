"""All targets there are."""

from tests.fuzz import decoders, engines
from tests.fuzz.target import Target


def targets() -> list[Target]:
    return [*decoders.targets(), *engines.targets()]
