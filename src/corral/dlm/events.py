"""What goes into a LockspaceEngine and what comes out, besides messages. Small final records, made on hot paths."""

from collections.abc import Sequence
from typing import Final, final

from corral.api.dlm import Completion, LockWaits, Request
from corral.base.ids import MemberId
from corral.base.time import Instant
from corral.base.view import Round


@final
class Start:
    """Recover for this round. Abandons whatever round was running."""

    __slots__ = ("round",)

    def __init__(self, round: Round) -> None:
        self.round = round

    def __repr__(self) -> str:
        return f"Start({self.round.id})"


@final
class Stop:
    """Grant nothing from now on."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Stop()"


@final
class Finish:
    """All members have recovered for this round: resume."""

    __slots__ = ("round_id",)

    def __init__(self, round_id: int) -> None:
        self.round_id = round_id

    def __repr__(self) -> str:
        return f"Finish({self.round_id})"


UNAWAITED: Final = 0  # the cookie of a request whose completion nobody wants to hear of


@final
class Submit:
    """Requests of one client, each with the handle it is for and a cookie that comes back with its completion.

    A "lock" brings a fresh handle, the others name one that a lock brought; `Request.lock` is not looked at.
    """

    __slots__ = ("client", "operations")

    def __init__(self, client: int, operations: Sequence[tuple[int, int, Request]]) -> None:
        self.client = client
        self.operations = operations

    def __repr__(self) -> str:
        return f"Submit({self.client}, {list(self.operations)})"


@final
class ClientGone:
    """A client died: its locks go at once, without a round. Its number never comes back."""

    __slots__ = ("client",)

    def __init__(self, client: int) -> None:
        self.client = client

    def __repr__(self) -> str:
        return f"ClientGone({self.client})"


@final
class Lease:
    """Until when grants and completions may be emitted."""

    __slots__ = ("until",)

    def __init__(self, until: Instant) -> None:
        self.until = until

    def __repr__(self) -> str:
        return f"Lease({self.until})"


@final
class Lost:
    """The guarantee is gone for good (evicted, fenced off): nothing is held any more, everything fails."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Lost()"


# --- emitted ---------------------------------------------------------------------------------------------------------


@final
class Done:
    """The one completion of a request."""

    __slots__ = ("client", "completion", "cookie", "handle")

    def __init__(self, client: int, handle: int, cookie: int, completion: Completion) -> None:
        self.client = client
        self.handle = handle
        self.cookie = cookie
        self.completion = completion

    def __repr__(self) -> str:
        return f"Done({self.client}, {self.handle}, {self.cookie}, {self.completion})"


@final
class Blocked:
    """Somebody wants `mode` and this lock is in the way."""

    __slots__ = ("client", "handle", "mode")

    def __init__(self, client: int, handle: int, mode: int) -> None:
        self.client = client
        self.handle = handle
        self.mode = mode

    def __repr__(self) -> str:
        return f"Blocked({self.client}, {self.handle}, {self.mode})"


@final
class Waiting:
    """The request with this cookie has waited for longer than the lockspace finds normal; told once, it waits on."""

    __slots__ = ("client", "cookie", "waits")

    def __init__(self, client: int, cookie: int, waits: LockWaits) -> None:
        self.client = client
        self.cookie = cookie
        self.waits = waits

    def __repr__(self) -> str:
        return f"Waiting({self.client}, {self.cookie}, {self.waits})"


@final
class RoundDone:
    """This member's recovery work for the round is done (start_done)."""

    __slots__ = ("round_id",)

    def __init__(self, round_id: int) -> None:
        self.round_id = round_id

    def __repr__(self) -> str:
        return f"RoundDone({self.round_id})"


@final
class Misfit:
    """This member cannot be in the lockspace: `peer`, who was here before, has value blocks of `value_size` bytes.
    The round will not get done here; SpaceLost follows."""

    __slots__ = ("peer", "value_size")

    def __init__(self, peer: MemberId, value_size: int) -> None:
        self.peer = peer
        self.value_size = value_size

    def __repr__(self) -> str:
        return f"Misfit({self.peer}, {self.value_size})"


@final
class SpaceLost:
    """Every lock of every client here is lost."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "SpaceLost()"
