"""Replays recorded runs of the Linux kernel's DLM against this engine (docs/design/dlm-oracle.md tells the format).

The runs were recorded through libdlm, so what happens between a program and the kernel's lock manager is modelled here,
in `_Caller`, and not in the engine:
- a lock has a value block in the kernel only after a request or conversion with VALBLK; before that VALBLK at unlock is
  without effect;
- a conversion without VALBLK hands the kernel a block of zeros, an unlock without it a block that nobody has set;
- an unlock takes the value flags of the lock's last request as its own besides (the kernel ORs them);
- the program's block changes with a grant unless the grant writes the resource's value.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, final

from corral.api.dlm import ECANCEL, EUNLOCK, IV, IVVALBLK, MODE_NAMES, NL, VALBLK, Completion, Request
from corral.dlm.engine import LockspaceEngine
from corral.dlm.events import Blocked, Done, Submit
from corral.dlm.modes import EAGAIN, EDEADLK, EINVAL, ETIMEDOUT, VALUE_TRANSFER, WRITE
from corral.dlm.solo import solo

UNDEFINED: Final = "<undefined>"
CLIENT: Final = 1

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


class Mismatch(NamedTuple):
    seed: int
    step: int
    operation: Any
    expected: Any
    got: Any

    def __str__(self) -> str:
        return f"run {self.seed} step {self.step} {self.operation}: expected {self.expected}, got {self.got}"


@final
class _Caller:
    """One lock as the recording program and libdlm hold it."""

    def __init__(self, flags: int) -> None:
        self.flags = flags  # of the last request or conversion the kernel accepted
        self.has_block = bool(flags & VALBLK)
        self.text = ""
        self.mode = IV

    def completed(self, completion: Completion) -> str:
        """The text in the program's block after this completion."""
        if completion.status == 0:
            if self.has_block and VALUE_TRANSFER[self.mode + 1][completion.mode] != WRITE:
                self.text = _text(completion.value) if self.flags & VALBLK else ""
            self.mode = completion.mode
        return self.text


@final
class _Run:
    def __init__(self, engine: LockspaceEngine) -> None:
        self.engine = engine
        self.callers: dict[int, _Caller] = {}

    def step(self, number: int, operation: Sequence[Any]) -> list[Any]:
        """One call and what followed, in the form of the recording."""
        request = self._request(operation)
        if request is None:
            return [EINVAL]
        handle = operation[1] + 1
        self.engine.step(0, Submit(CLIENT, ((handle, number, request),)))
        result = 0
        events: list[Any] = []
        for event in self.engine.ready().emit:
            if isinstance(event, Blocked):
                events.append([event.handle - 1, "bast"])
            elif isinstance(event, Done) and event.cookie == number and event.completion.status not in _STATUS:
                result = event.completion.status
            elif isinstance(event, Done) and not (event.cookie == number and operation[0] == "cancel"):
                completion = event.completion
                text = self.callers[event.handle - 1].completed(completion)
                events.append([event.handle - 1, "ast", _STATUS[completion.status], completion.flags, text])
        if result and operation[0] == "lock":
            del self.callers[operation[1]]
        return [result, *events]

    def _request(self, operation: Sequence[Any]) -> Request | None:
        """None: libdlm refuses the call, because that lock never came to be."""
        kind, number = operation[0], operation[1]
        if kind == "lock":
            _, _, resource, mode, flags = operation
            self.callers[number] = _Caller(flags)
            return Request("lock", b"resource %d" % resource, _MODES[mode], flags)
        caller = self.callers.get(number)
        if caller is None:
            return None
        if kind == "cancel":
            return Request("cancel")
        if kind == "convert":
            _, _, mode, flags, value = operation
            caller.text = caller.text if value is None else value
            caller.has_block = caller.has_block or bool(flags & VALBLK)
            caller.flags = flags
            return Request("convert", mode=_MODES[mode], flags=flags, value=_block(value or ""))
        _, _, flags, value = operation
        caller.text = caller.text if value is None else value
        flags |= caller.flags & (VALBLK | IVVALBLK)
        if not caller.has_block:
            flags &= ~VALBLK
        return Request("unlock", mode=NL, flags=flags, value=_block(UNDEFINED if value is None else value))


def _block(text: str) -> bytes:
    return text.encode()


def _text(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode(errors="replace")


def _equal(expected: Sequence[Any], got: Sequence[Any]) -> bool:
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


def replay(run: dict[str, Any], engine: LockspaceEngine | None = None) -> Iterator[Mismatch]:
    """One run of a recording, against a fresh lockspace. Goes on after a mismatch; the first one is the telling one."""
    player = _Run(engine or solo(0, "replay"))
    for number, (operation, expected) in enumerate(run["steps"]):
        got = player.step(number, operation)
        if not _equal(expected, got):
            yield Mismatch(run["seed"], number, operation, expected, got)
