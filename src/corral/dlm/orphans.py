"""Clients that die, and what they leave: orphans, their adoption and their purge.

When a client dies its locks go at once. One whose last request or conversion had PERSISTENT stays as an *orphan*: in
the way of others as before, but nobody's; what it waited for is cancelled. It stays on the member where its client
was and shares that member's fate. There another client may adopt it, by name and mode (ORPHAN), wherever the resource
is mastered, and anybody anywhere may purge it, by node and dead client.

A purge is one message to each member of the node, answered when the unlocks have begun there; like every other
operation it is asked again in each new round until it is answered. A member that has gone took its orphans along.
Source: features 1.5; Linux `fs/dlm/user.c`. Deviations: an adopter is told of whom the orphan blocks meanwhile.
"""

from typing import Final, final

from corral.api.dlm import IV, NL, ORPHAN, PERSISTENT, Completion
from corral.api.dlm import Request as Asked
from corral.base.ids import MemberId
from corral.base.time import Instant, Nanoseconds
from corral.dlm.events import Done
from corral.dlm.modes import EAGAIN, EEXIST, EINVAL, ENOENT
from corral.dlm.operations import CANCELLED, HANDLE_MAX, Operations
from corral.dlm.recovery import UNLOCK
from corral.dlm.resource import Lock
from corral.dlm.wire import Purge, Purged

CLIENT_MAX: Final = 0x7FFFFFFE


@final
class PurgeAsked:
    """A purge of a client here. `waits_for`: the members that have not answered; None before it is asked in a round."""

    __slots__ = ("client", "cookie", "handle", "node", "waits_for", "whose")

    def __init__(self, client: int, handle: int, cookie: int, node: int, whose: int) -> None:
        self.client = client
        self.handle = handle
        self.cookie = cookie
        self.node = node
        self.whose = whose
        self.waits_for: set[MemberId] | None = None


class Orphans(Operations):
    def __init__(
        self,
        me: MemberId,
        name: str,
        value_size: int,
        lease_until: Instant,
        toss_ns: Nanoseconds,
        warn_ns: Nanoseconds,
    ) -> None:
        super().__init__(me, name, value_size, lease_until, toss_ns, warn_ns)
        self._purges: dict[int, PurgeAsked] = {}  # by number, those not answered by all
        self._purge_number = 0

    # --- clients that die --------------------------------------------------------------------------------------------

    def _client_gone(self, now: Instant, client: int) -> None:
        stays: list[Lock] = []
        goes: list[Lock] = []
        for lock in self.space.locks.of(client):
            if lock.abandoned:
                continue  # an orphan, or one that ends already
            lock.abandoned = True  # all of them before the first ends: the dead hear nothing
            busy = lock.pending and lock.pending != UNLOCK and lock.then is None
            if lock.flags & PERSISTENT and not lock.pending:
                self._orphan(lock)
            elif lock.flags & PERSISTENT and busy:
                stays.append(lock)
            else:
                goes.append(lock)
                if busy:
                    lock.then = (0, None, 0)  # should another one's end grant it
        for lock in stays:
            if lock.pending and not lock.overlap:
                self._withdraw(now, lock, CANCELLED)  # and then, if it still is a lock, an orphan
        for lock in goes:
            if self.space.find(lock.id) is lock:
                self._abandon(now, lock)
        for number in [number for number, purge in self._purges.items() if purge.client == client]:
            del self._purges[number]
        self.space.client_gone(client)

    # --- adoption ----------------------------------------------------------------------------------------------------

    def _adopt(self, now: Instant, client: int, handle: int, cookie: int, asked: Asked) -> int:
        """0; -ENOENT: there is no orphan of that name here; -EAGAIN: only in other modes."""
        if not (0 <= client <= CLIENT_MAX and 0 < handle <= HANDLE_MAX):
            return EINVAL
        if self.space.locks.get(client << 32 | handle) is not None:
            return EEXIST
        orphans = self._orphans.get(asked.resource, [])
        for lock in orphans:
            if lock.granted == asked.mode:
                break
        else:
            return EAGAIN if orphans else ENOENT
        self._no_orphan(lock)
        self.space.readdress(lock, client << 32 | handle)
        lock.abandoned = False
        lock.flags = asked.flags & ~ORPHAN
        lock.result_flags = 0
        lock.owner = asked.owner or handle
        self._give(now, Done(client, handle, cookie, self._completion(lock, 0)))
        if lock.blocked:
            mode, lock.blocked = lock.blocked, NL
            self._blocked(now, lock, mode)
        return 0

    def _no_orphan(self, lock: Lock) -> None:
        orphans = self._orphans[lock.resource.name]
        orphans.remove(lock)
        if not orphans:
            del self._orphans[lock.resource.name]

    # --- purge -------------------------------------------------------------------------------------------------------

    def _purge(self, now: Instant, client: int, handle: int, cookie: int, asked: Asked) -> int:
        """`asked.lock`: whose node, 0 this one. `asked.owner`: the dead client, 0 every one."""
        node = asked.lock or self.me.node
        self._purge_number += 1
        self._purges[self._purge_number] = PurgeAsked(client, handle, cookie, node, asked.owner)
        if self._running(now):
            self._ask_purge(now, self._purge_number)
        return 0

    def _purges_again(self) -> None:
        """In a new round what was not answered is asked again, of those who are members now."""
        for purge in self._purges.values():
            purge.waits_for = None

    def _ask_purges(self, now: Instant) -> None:
        for number, purge in list(self._purges.items()):
            if purge.waits_for is None:
                self._ask_purge(now, number)

    def _ask_purge(self, now: Instant, number: int) -> None:
        purge = self._purges[number]
        purge.waits_for = set()
        for member in self.space.members:
            if member == self.me and member.node == purge.node:
                self._purge_here(now, purge.whose)
            elif member.node == purge.node:
                purge.waits_for.add(member)
                self.space.send.append((member, Purge(number, purge.whose)))
        self._purge_answered(now, number)

    def _purged(self, now: Instant, peer: MemberId, message: Purged) -> None:
        found = self._purges.get(message.number)
        if found is None or found.waits_for is None or peer not in found.waits_for:
            self.space.counters.stale += 1
            return
        found.waits_for.discard(peer)
        self._purge_answered(now, message.number)

    def _purge_answered(self, now: Instant, number: int) -> None:
        purge = self._purges[number]
        if not purge.waits_for:
            del self._purges[number]
            done = Completion(0, 0, IV, b"", False, 0)
            self._give(now, Done(purge.client, purge.handle, purge.cookie, done))

    def _purge_asked(self, now: Instant, peer: MemberId, message: Purge) -> None:
        self._purge_here(now, message.client)
        self.space.send.append((peer, Purged(message.number)))

    def _purge_here(self, now: Instant, whose: int) -> None:
        for _, orphans in sorted(self._orphans.items()):
            for lock in tuple(orphans):
                if not whose or lock.address >> 32 == whose:
                    self._no_orphan(lock)
                    self._end(now, lock, 0, None, 0)
        for client in sorted(self.space.gone):
            if whose in (0, client):
                for lock in self.space.locks.of(client):
                    if lock.pending != UNLOCK and lock.then is None:
                        self._end(now, lock, 0, None, 0)  # would be an orphan once its operation is cancelled
