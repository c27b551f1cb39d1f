"""What a target is, and how its cases are run."""

import time
import traceback
from collections.abc import Callable
from random import Random
from typing import NamedTuple

SLOW_SECONDS = 2.0  # of CPU for one case: a finding of its own

Case = Callable[[Random], str]


class Finding(AssertionError):
    """A case that went wrong; the message says how."""


class Target(NamedTuple):
    """`case` runs one and returns in a word what became of it ("taken", "refused", ...). `expected` are words that must
    turn up in a few hundred cases, or the target tests nothing. `canary` is a context manager that plants a bug."""

    name: str
    case: Case
    canary: Case
    expected: tuple[str, ...]


def run_case(target: Target, number: int, *, canary: bool = False) -> str:
    """Raises Finding with what happened and how to see it again."""
    random = Random(f"{target.name}:{number}")
    began = time.process_time()
    try:
        word = (target.canary if canary else target.case)(random)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename.rpartition('/src/')[2]}:{last.lineno}"
        raise Finding(
            f"{target.name} case {number}: {type(error).__name__}: {str(error)[:300]} ({where})\n"
            f"  again: python -m tests.fuzz --target {target.name} --case {number}"
        ) from error
    spent = time.process_time() - began
    if spent > SLOW_SECONDS:
        raise Finding(f"{target.name} case {number}: took {spent:.1f} s of CPU")
    return word
