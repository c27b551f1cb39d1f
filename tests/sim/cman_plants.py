"""Bugs planted into cman's engines, each with the invariants that must catch it within 50 seeds.

A plant is a function that patches and is undone by pytest's monkeypatch; `test_cman.py` runs the seeds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from corral.base.ids import NO_VIEW
from corral.cman import agreement, wire
from corral.cman.heartbeat import HeartbeatEngine, Link
from corral.cman.membership import MembershipEngine
from corral.cman.state import State

Patch = Callable[[Any, str, Any], None]


def echo_outsiders(patch: Patch) -> None:
    """Echoes everybody it hears instead of the members of the newest accepted view; the guard stays short."""

    def echo(self: HeartbeatEngine, now: int, link: Link) -> int:
        return link.counter if not self._silent() else 0

    patch(HeartbeatEngine, "_echo", echo)


def skip_guard(patch: Patch) -> None:
    """Services of a new view start without waiting for the lease of those left out."""
    patch(HeartbeatEngine, "guard_until", lambda self, members: 0)


def skip_quiet(patch: Patch) -> None:
    """A node votes and echoes at once after a crash, having forgotten whom it echoed."""
    patch(State, "quiet", property(lambda self: False))


def lease_from_receipt(patch: Patch) -> None:
    """The lease is counted from the arrival of the echo, not from the sending of what was echoed."""
    right = HeartbeatEngine._lease

    def lease(self: HeartbeatEngine, now: int, until: int) -> None:
        assert self.record is not None
        right(self, now, now + self.record.lease_ns)

    patch(HeartbeatEngine, "_lease", lease)


def lease_without_echo(patch: Patch) -> None:
    """A heartbeat sent is enough for a lease, echoed or not."""

    def extend(self: HeartbeatEngine, now: int) -> None:
        if self.record is not None:
            self._lease(now, now + self.record.lease_ns)

    patch(HeartbeatEngine, "_extend_lease", extend)


def forget_promise(patch: Patch) -> None:
    """A promise leaves without having been written."""

    def persist(self: MembershipEngine, record: wire.Record) -> None:
        self.state.apply(record)
        if not isinstance(record, wire.Promised):
            self._out.persist.append(record)

    patch(MembershipEngine, "_persist", persist)


def reuse_epochs(patch: Patch) -> None:
    """After a restart epochs begin again at the installed view."""
    right = State.apply

    def apply(self: State, record: wire.Record) -> None:
        right(self, record)
        if isinstance(record, wire.Started):
            self.promised = NO_VIEW

    patch(State, "apply", apply)


def accept_anything(patch: Patch) -> None:
    """Accepts a proposal over a promise given to another coordinator."""

    def proposed(self: MembershipEngine, now: int, peer: Any, proposal: wire.Propose) -> None:
        if self.me in proposal.view.members and proposal.view.id > self.state.accepted_id:
            self._accept(proposal)
            self._tell(peer.node, wire.Accept(proposal.view.id))

    patch(MembershipEngine, "_proposed", proposed)


def install_early(patch: Patch) -> None:
    """Installs when most members have accepted."""
    right = MembershipEngine._accepts

    def accepts(self: MembershipEngine, now: int, peer: Any, message: wire.Accept) -> None:
        attempt = self._attempt
        if attempt is not None and attempt.proposal is not None and 2 * len(attempt.accepts) > len(attempt.members):
            attempt.accepts.update(member.node for member in attempt.members)
        right(self, now, peer, message)

    patch(MembershipEngine, "_accepts", accepts)


def readmit_the_lost(patch: Patch) -> None:
    """A node that a quorate view went on without comes back in the same incarnation."""
    patch(agreement, "outsiders", lambda attempt, newest: [])
    patch(agreement, "entered", lambda promise, member: False)
    patch(MembershipEngine, "_entered", lambda self: False)


def count_the_forgetful(patch: Patch) -> None:
    """Nodes without memory vote."""

    def voters(flags: dict[int, int]) -> frozenset[int]:
        return frozenset(node for node in flags if not flags[node] & wire.QUIET)

    patch(agreement, "voters", voters)


def forget_the_active_view(patch: Patch) -> None:
    """A promise tells of the newest accepted view only."""
    right = MembershipEngine._own_promise

    def own_promise(self: MembershipEngine, epoch: int) -> wire.Promise:
        promise = right(self, epoch)
        return msgspec.structs.replace(promise, accepted=promise.accepted[-1:], active=NO_VIEW)

    patch(MembershipEngine, "_own_promise", own_promise)


def mix_attachments(patch: Patch) -> None:
    """A member installs with its own attachment of now instead of the one everybody was told."""
    right = MembershipEngine._install

    def install(self: MembershipEngine, now: int, proposal: wire.Propose) -> None:
        carried = tuple(
            wire.Carried(entry.member, entry.flags, b"now") if entry.member == self.me else entry
            for entry in proposal.carried
        )
        right(self, now, msgspec.structs.replace(proposal, carried=carried))

    patch(MembershipEngine, "_install", install)


def never_retry(patch: Patch) -> None:
    """A coordinator whose attempt failed waits for somebody else."""
    right = MembershipEngine._abandon

    def abandon(self: MembershipEngine, now: int, *, at_once: bool) -> None:
        right(self, now, at_once=at_once)
        self._retry_at = now + (1 << 50)

    patch(MembershipEngine, "_abandon", abandon)


class Plant(NamedTuple):
    """A bug, the number of the invariant that names it, and the faults that bring it out (all, when empty)."""

    plant: Callable[[Patch], None]
    caught_by: str
    kinds: tuple[str, ...] = ()


PLANTS = (
    Plant(echo_outsiders, "CMAN-10"),
    Plant(skip_guard, "CMAN-10"),
    Plant(skip_quiet, "CMAN-10"),
    Plant(lease_from_receipt, "CMAN-10"),
    Plant(lease_without_echo, "CMAN-10"),
    Plant(forget_promise, "CMAN-3"),
    Plant(reuse_epochs, "CMAN-4"),
    Plant(accept_anything, "CMAN-3", ("fault_hung_disk", "fault_crash")),
    Plant(install_early, "CMAN-2"),
    Plant(readmit_the_lost, "CMAN-5"),
    Plant(count_the_forgetful, "CMAN-9", ("fault_state_loss", "fault_partition", "fault_crash")),
    Plant(never_retry, "CMAN-11"),
    Plant(mix_attachments, "CMAN-12"),
    Plant(forget_the_active_view, "CMAN-13", ("fault_crash", "fault_partition", "fault_ambush")),
)
