"""Cman's contract: who is a member, whether we have quorum, and the order in which services recover."""

from typing import Final, NamedTuple, Protocol

from corral.base.ids import MemberId
from corral.base.view import Round, View

# Levels of service groups (CMAN 2004 `service.h`): lower ones start first, all stop at once from the top.
LEVEL_FENCE: Final = 0
LEVEL_DLM: Final = 1
LEVEL_GFS: Final = 2
LEVEL_USER: Final = 3
LEVEL_NAMES: Final = ("fence", "dlm", "gfs", "user")

FENCE_GROUP: Final = "fence"  # the one global group


class Peer(NamedTuple):
    """Where another member of a service group is reached, and the ticket by which it knows us (DESIGN 4, Identity)."""

    member: MemberId
    address: str
    ticket: bytes


class Recoverable(Protocol):
    """A service under recovery control. Calls come from the loop, in order, never concurrently for one group."""

    def stop(self) -> None:
        """Block new work, now. May come in any state, also twice."""

    async def start(self, round: Round) -> None:
        """Recover. Returning means start_done(round); a newer round cancels the coroutine."""

    def finish(self, round: Round) -> None:
        """All members have recovered: resume. Never comes for a round that was cancelled."""


class ViewChanged(NamedTuple):
    """`view` was installed (`active` False), or its round has passed FENCE (`active` True)."""

    view: View
    active: bool


class Membership(Protocol):
    """At most one active view has a valid lease; active views form one sequence; a member sees a subsequence of it."""

    @property
    def view(self) -> View | None: ...

    @property
    def active(self) -> bool: ...

    async def register(self, group: str, level: int, service: Recoverable, *, slots: int = 4096) -> None:
        """Joins the group as a member; returns when the first round that includes this member has finished.
        `slots`: how many members the group may have at a time; ClusterError when all are taken."""

    async def leave(self, group: str) -> None: ...
