"""Replays recorded runs of the Linux kernel's DLM against this engine (docs/design/dlm-oracle.md tells the format).

The runs were recorded through libdlm, so what happens between a program and the kernel's lock manager is modelled here,
in `_Caller`, and not in the engine:
- a lock has a value block in the kernel only after a request or conversion with VALBLK, and the lock manager knows it
  only after one that it did not refuse; before that VALBLK at unlock is without effect;
- a conversion without VALBLK hands the kernel a block of zeros, an unlock without it a block that nobody has set; the
  kernel copies what it is handed before it checks the call, so a refused call changes the block as well;
- an unlock takes the value flags of the lock's last request as its own besides (the kernel ORs them);
- a plain unlock ends a lock that still waits, where the kernel masters the resource itself;
- the program's block changes with a grant unless the grant writes the resource's value.

Linux forgets what a lock holds that is granted from the convert queue in the mode it already had (that page tells why
we do not). A run in which that happens is compared up to there: it *parts*.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol, final

from corral.api.dlm import (
    ALTMODE,
    DEMOTED,
    ECANCEL,
    EUNLOCK,
    FORCEUNLOCK,
    IV,
    IVVALBLK,
    MODE_NAMES,
    NL,
    VALBLK,
    Completion,
    Request,
)
from corral.dlm.events import Blocked, Done, Submit
from corral.dlm.modes import EAGAIN, EDEADLK, EINVAL, ENOENT, ETIMEDOUT, UNLOCK_FLAGS, VALUE_TRANSFER, WRITE
from corral.dlm.resource import Lock
from corral.dlm.solo import solo

UNDEFINED: Final = "<undefined>"
CLIENT: Final = 1

_KINDS: Final = ("lock", "convert", "unlock", "cancel")
_MODES: Final = {name: mode for mode, name in enumerate(MODE_NAMES)}
# Statuses that come with the completion; any other is the result of the call.
_STATUS: Final[dict[int, int | str]] = {
    0: 0,
    ECANCEL: 65537,
    EUNLOCK: 65538,
    EAGAIN: "EAGAIN",
    EDEADLK: "EDEADLK",
    ETIMEDOUT: "ETIMEDOUT",
}


class Malformed(ValueError):
    """A recording that is not in the format; the message says where."""


class Mismatch(NamedTuple):
    seed: int
    step: int
    operation: Any
    expected: Any
    got: Any

    def __str__(self) -> str:
        operation, expected, got = (json.dumps(part) for part in self[2:])
        return f"run {self.seed} step {self.step} {operation}: expected {expected}, got {got}"


class Parting(NamedTuple):
    seed: int
    step: int

    def __str__(self) -> str:
        return f"run {self.seed} step {self.step}: from here Linux has forgotten what a lock holds; not compared"


class Replayed(NamedTuple):
    mismatches: list[Mismatch]  # the first one is the telling one
    parting: Parting | None


class Locks(Protocol):
    """Where a run is played: a lockspace, or all members of one. Locks go by their handles."""

    value_size: int

    def submit(self, handle: int, cookie: int, request: Request) -> Sequence[object]:
        """What is emitted until nothing more happens."""

    def find(self, handle: int) -> Lock | None: ...


@final
class _Alone:
    def __init__(self) -> None:
        self.engine = solo(0, "replay")
        self.value_size = self.engine.value_size

    def submit(self, handle: int, cookie: int, request: Request) -> Sequence[object]:
        self.engine.step(0, Submit(CLIENT, ((handle, cookie, request),)))
        return self.engine.ready().emit

    def find(self, handle: int) -> Lock | None:
        return self.engine.space.find(CLIENT << 32 | handle)


@final
class _Caller:
    """One lock as the recording program, libdlm and the kernel's device hold it."""

    def __init__(self, flags: int) -> None:
        self.flags = flags  # of the last request or conversion the kernel accepted
        self.block: str | None = "" if flags & VALBLK else None  # the kernel's copy of the program's block
        self.known = self.block is not None  # to the kernel's lock manager
        self.text = ""  # the program's block
        self.mode = IV  # as of the last completion

    def hand_over(self, flags: int, value: str | None, otherwise: str) -> None:
        """A call with the program's block, or with `otherwise` in its place when it has no VALBLK."""
        if value is not None:
            self.text = value
        if self.block is not None:
            self.block = self.text if flags & VALBLK else otherwise

    def completed(self, completion: Completion) -> str:
        """The text in the program's block after this completion."""
        if completion.status == 0:
            if self.flags & VALBLK:
                self.block = _text(completion.value)
            if self.block is not None and VALUE_TRANSFER[self.mode + 1][completion.mode] != WRITE:
                self.text = self.block
        if completion.mode != IV:
            self.mode = completion.mode
        return self.text


@final
class _Run:
    def __init__(self, locks: Locks) -> None:
        self.locks = locks
        self.callers: dict[int, _Caller] = {}
        self.parted = False

    def step(self, cookie: int, operation: Sequence[Any]) -> list[Any]:
        """One call and what followed, in the form of the recording."""
        kind, name = operation[0], operation[1]
        handle = name + 1
        if kind not in _KINDS:
            raise ValueError(f"{kind!r} is no operation")
        if kind == "lock":
            _, _, resource, mode, flags = operation
            self.callers[name] = _Caller(flags)
            request = Request("lock", b"resource %d" % resource, _MODES[mode], flags)
        elif name not in self.callers:
            return [ENOENT if kind == "convert" else EINVAL]  # it never came to be; only the unlock libdlm sees to
        elif kind == "convert":
            request = self._convert(operation)
        elif kind == "unlock":
            request = self._unlock(operation)
        else:
            request = Request("cancel")
        known = ((name + 1, self._lock(name)) for name in self.callers)
        converting = {at: lock.granted for at, lock in known if lock is not None and lock.pending}
        done = self.locks.submit(handle, cookie, request)
        self.parted = any(_keeps_its_mode(event, converting) for event in done)
        result = self._result(cookie, done)
        if kind == "convert" and result == 0:
            self.callers[name].flags = operation[3]
            self.callers[name].known = self.callers[name].block is not None
        events = [event for event in (self._event(cookie, operation, event) for event in done) if event is not None]
        if result and kind == "lock":
            del self.callers[name]
        return [result, *events]

    def _result(self, cookie: int, done: Sequence[object]) -> int:
        """What the call returns: statuses of its own that no completion brings."""
        for event in done:
            if isinstance(event, Done) and event.cookie == cookie and event.completion.status not in _STATUS:
                return event.completion.status
        return 0

    def _event(self, cookie: int, operation: Sequence[Any], event: object) -> list[Any] | None:
        if isinstance(event, Blocked):
            return [event.handle - 1, "bast"]
        if not isinstance(event, Done) or event.completion.status not in _STATUS:
            return None
        own = event.cookie == cookie
        if own and operation[0] == "cancel":
            return None  # that the cancel is under way; the cancelled operation has its own
        completion = event.completion
        if not own and operation[0] == "unlock" and event.handle == operation[1] + 1:
            return None  # the operation that the unlock overtook: the kernel does not speak of it any more
        text = self.callers[event.handle - 1].completed(completion)
        return [event.handle - 1, "ast", _STATUS[completion.status], completion.flags, text]

    def _convert(self, operation: Sequence[Any]) -> Request:
        _, name, mode, flags, value = operation
        caller = self.callers[name]
        if caller.block is None and flags & VALBLK:
            caller.block = ""
        caller.hand_over(flags, value, "")
        self._share(name, caller)
        return Request("convert", mode=_MODES[mode], flags=flags, value=_block(caller.block or ""))

    def _unlock(self, operation: Sequence[Any]) -> Request:
        _, name, flags, value = operation
        caller = self.callers[name]
        caller.hand_over(flags, value, UNDEFINED)
        self._share(name, caller)
        if not flags & ~UNLOCK_FLAGS:
            flags |= caller.flags & (VALBLK | IVVALBLK)
            if not caller.known:
                flags &= ~VALBLK
            lock = self._lock(name)
            if lock is not None and lock.pending:
                flags |= FORCEUNLOCK
        return Request("unlock", mode=NL, flags=flags, value=_block(caller.block or ""))

    def _share(self, name: int, caller: _Caller) -> None:
        """An operation that waits will write what is in the block then."""
        lock = self._lock(name)
        if lock is not None and lock.pending and lock.flags & VALBLK and caller.block is not None:
            lock.value = _block(caller.block).ljust(self.locks.value_size, b"\0")

    def _lock(self, name: int) -> Lock | None:
        return self.locks.find(name + 1)


def _keeps_its_mode(event: object, converting: dict[int, int]) -> bool:
    """Is this a grant from the convert queue in the mode that the lock had? `converting`: modes by handle."""
    if not isinstance(event, Done) or event.completion.status:
        return False
    flags, mode = event.completion.flags, event.completion.mode
    return bool(flags & ALTMODE) and not flags & DEMOTED and converting.get(event.handle) == mode


def _block(text: str) -> bytes:
    return text.encode()


def _text(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode(errors="replace")


def equal(expected: Sequence[Any], got: Sequence[Any]) -> bool:
    """Results equal and events equal as multisets; an undefined value equals any."""
    if expected[0] != got[0] or len(expected) != len(got):
        return False
    for left, right in zip(sorted(expected[1:], key=_key), sorted(got[1:], key=_key), strict=True):
        if left[:4] != right[:4]:
            return False
        if len(left) > 4 and left[4] != right[4] and UNDEFINED not in (left[4], right[4]):
            return False
    return True


def _key(event: Sequence[Any]) -> str:
    return repr(list(event[:4]))


def replay(run: dict[str, Any], locks: Locks | None = None) -> Replayed:
    """One run of a recording, against a fresh lockspace or `locks`. Goes on after a mismatch, ends where it parts.

    Raises Malformed.
    """
    try:
        seed, steps = run["seed"], run["steps"]
    except (KeyError, TypeError):
        raise Malformed("a run is an object with seed and steps") from None
    player = _Run(locks or _Alone())
    mismatches: list[Mismatch] = []
    for number, step in enumerate(steps):
        try:
            operation, expected = step
            got = player.step(number + 1, operation)  # nobody would hear of one with the cookie 0
            same = equal(expected, got)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise Malformed(f"run {seed} step {number}: {type(error).__name__} {error}") from None
        if player.parted:
            return Replayed(mismatches, Parting(seed, number))
        if not same:
            mismatches.append(Mismatch(seed, number, operation, expected, got))
    return Replayed(mismatches, None)


def runs(text: str) -> Iterator[dict[str, Any]]:
    """The runs of a recording, one a line. Raises Malformed."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise Malformed(f"line {number} is not JSON: {error}") from None
