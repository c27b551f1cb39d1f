"""What people build from locks, built once and tested: docs/guide/recipes.md.

    waiting.py      deadlines, and waiting for the first of several locks        (no recipe of its own)
    register.py     Register       a small value that lives as long as one member does, changed atomically
    mutex.py        Mutex          one at a time
    rwlock.py       ReadWriteLock  many readers or one writer, in the order they came
    semaphore.py    Semaphore      n at a time; permits of the dead come back
    counter.py      Counter        exact count of what was acknowledged            (on Register)
    election.py     Election       one leader with a fencing token, and who it is
    barrier.py      DoubleBarrier  all enter together, all leave together          (on Register)
    queue.py        Queue          bounded, first in first out, taken exactly once (on Register)
    blocking.py     the same for `corral.sync`

All of them are built on `api.dlm` alone. Every wait takes a timeout in seconds (None: for ever) and raises TimedOut
that says what it waited for; cancelling a task that waits leaves nothing behind; when the lockspace is lost, LockLost.
"""

from corral.recipes.barrier import DoubleBarrier
from corral.recipes.counter import Counter
from corral.recipes.election import Election, Leadership
from corral.recipes.mutex import Mutex
from corral.recipes.queue import Element, Queue
from corral.recipes.register import Register, ValueLost
from corral.recipes.rwlock import ReadWriteLock
from corral.recipes.semaphore import Permit, Semaphore

from corral.recipes import blocking  # isort: skip  # it is about all of the others

__all__ = [
    "Counter",
    "DoubleBarrier",
    "Election",
    "Element",
    "Leadership",
    "Mutex",
    "Permit",
    "Queue",
    "ReadWriteLock",
    "Register",
    "Semaphore",
    "ValueLost",
    "blocking",
]
