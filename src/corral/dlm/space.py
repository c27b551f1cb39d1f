"""The tables of one lockspace on one member: resources, locks of local clients, copies mastered for others, directory.

Resources are in one table whether mastered here or not. Locks of this process are kept per client, so that a client's
death needs no search; master copies are kept per holder, so that a member's death needs none. A resource nobody uses
stays for the toss time, because the next user is probably the last one, and once more if it was used meanwhile; then
its master tells the directory, which remembers only the highest token of all removed names (the floor) and starts each
new mastery above it (DLM-2).

The directory node of a name is a pure function of the name and the sorted members, the same on every member. It lists
the names that others master; those mastered by itself are in the table of resources.
"""

from collections import deque
from typing import Final, final
from zlib import crc32

from corral.base.ids import MemberId
from corral.base.time import FOREVER, SECOND, Instant, Nanoseconds
from corral.dlm.resource import NOT_TOSSED, TOSSED, USED_SINCE, Lock, Resource
from corral.dlm.tables import Addresses, Names
from corral.dlm.wire import Remove

LOCKS_MAX: Final = 4_000_000  # of this process, and again for each peer's copies
FROZEN_MAX: Final = 1 << 20  # messages held while suspended
TOSSED_MAX: Final = 100_000  # unused resources kept for their next user
TOSS_NS: Final = 10 * SECOND

TOKEN_SHIFT: Final = 32


@final
class Counters:
    """What happened, for status and metrics. Only ever rising."""

    __slots__ = (
        "blocked",
        "cancelled",
        "conflicts",
        "deadlocks",
        "granted",
        "hostile",
        "invalidated",
        "lookups",
        "not_queued",
        "orphaned",
        "purged",
        "received",
        "recovered",
        "remastered",
        "rounds",
        "sent",
        "stale",
        "timed_out",
        "warned",
    )

    def __init__(self) -> None:
        self.granted = 0
        self.not_queued = 0
        self.blocked = 0
        self.cancelled = 0
        self.deadlocks = 0
        self.timed_out = 0
        self.warned = 0  # operations that waited longer than the lockspace finds normal
        self.orphaned = 0
        self.lookups = 0
        self.sent = 0
        self.received = 0
        self.stale = 0  # answers to operations that are over: harmless
        self.hostile = 0  # messages no correct member sends: dropped
        self.rounds = 0
        self.purged = 0
        self.remastered = 0
        self.recovered = 0
        self.invalidated = 0
        self.conflicts = 0  # recovered locks that exclude each other: somebody is wrong

    def items(self) -> list[tuple[str, int]]:
        return [(name, getattr(self, name)) for name in self.__slots__]


@final
class Space:
    def __init__(self, me: MemberId, value_size: int, toss_ns: Nanoseconds) -> None:
        self.me = me
        self.value_size = value_size
        self.toss_ns = toss_ns
        self.members: tuple[MemberId, ...] = ()
        self.base_token = 0  # round << 32
        self.floor = 0
        self.resources = Names()
        self.locks = Addresses()
        self.gone: set[int] = set()  # dead clients that still have locks
        self.adopted: dict[int, Lock] = {}  # locks whose address is not their id any more, by id
        self.lock_count = 0
        self.copies: dict[MemberId, dict[int, Lock]] = {}
        self.directory: dict[bytes, MemberId] = {}  # names that others master
        self.tossed: deque[tuple[Instant, Resource]] = (
            deque()
        )  # what to look at when; the toss time is the same for all
        self.counters = Counters()
        self.send: list[tuple[MemberId, object]] = []

    # --- names and masters -----------------------------------------------------------------------------------------

    def directory_of(self, name: bytes) -> MemberId:
        return self.members[crc32(name) % len(self.members)]

    def assign(self, name: bytes, asking: MemberId) -> MemberId:
        """As directory: who masters `name`? The first to ask does; if that is this member, it makes it so at once."""
        master = self.master_of(name)
        if master is None:
            master = asking
            if asking != self.me:
                self.directory[name] = asking
        return master

    def master_of(self, name: bytes) -> MemberId | None:
        """As directory: whoever masters `name`."""
        resource = self.resources.get(name)
        return self.me if resource is not None and resource.master == self.me else self.directory.get(name)

    def become_master(self, resource: Resource, floor: int) -> None:
        resource.master = self.me
        resource.complete = True
        resource.confirmed = True
        token = max(self.base_token, floor)
        if resource.token < token:
            resource.token = token

    def resource(self, name: bytes) -> Resource:
        """The one of that name, for use: made, with unknown master, if need be."""
        resource = self.resources.get(name)
        if resource is None:
            return self.resources.make(name)
        if resource.tossed:
            resource.tossed = USED_SINCE
        return resource

    # --- locks -----------------------------------------------------------------------------------------------------

    def find(self, lock_id: int) -> Lock | None:
        """A lock of this process, by the number peers know it by."""
        lock = self.locks.get(lock_id)
        return lock if lock is not None and lock.id == lock_id else self.adopted.get(lock_id)

    def drop_lock(self, now: Instant, lock: Lock) -> None:
        """A lock of this process is over."""
        self.locks.remove(lock.address)
        if self.adopted or self.gone:
            self._moved_or_last(lock)
        self.lock_count -= 1
        resource = lock.resource
        resource.processes -= 1
        if not resource.processes and not resource.copies and not resource.tossed:
            self.toss(now, resource)

    def _moved_or_last(self, lock: Lock) -> None:
        """A lock has left its client: was it adopted, or the last one of a dead client?"""
        address = lock.address
        if lock.id != address:
            del self.adopted[lock.id]
        client = address >> 32
        if client in self.gone and self.locks.forget(client):
            self.gone.discard(client)

    def readdress(self, lock: Lock, address: int) -> None:
        """A dead client's lock becomes another one's. The address is free."""
        self.locks.remove(lock.address)
        self._moved_or_last(lock)
        lock.address = address
        self.locks.page(address)[address] = lock
        if lock.id != address:
            self.adopted[lock.id] = lock

    def client_gone(self, client: int) -> None:
        """Forgets a dead client, now or with its last lock."""
        if self.locks.forget(client):
            self.gone.discard(client)
        else:
            self.gone.add(client)

    def drop_copy(self, now: Instant, copy: Lock) -> None:
        """A lock mastered for another member is over."""
        holder = copy.holder
        assert holder is not None, "DLM-3"
        locks = self.copies[holder]
        del locks[copy.id]
        if not locks:
            del self.copies[holder]
        resource = copy.resource
        resource.copies -= 1
        if not resource.processes and not resource.copies:
            self.toss(now, resource)

    # --- unused resources ------------------------------------------------------------------------------------------

    def toss(self, now: Instant, resource: Resource) -> None:
        """Nobody uses it any more: it will be forgotten, unless it is used again."""
        if resource.tossed or resource.looking is not None:
            return  # it is in the row already; or the answer will find it unused and toss it
        resource.tossed = TOSSED
        self.tossed.append((now + self.toss_ns, resource))
        if len(self.tossed) > TOSSED_MAX:
            self._pass(self.tossed.popleft()[1])

    def toss_deadline(self) -> Instant:
        return self.tossed[0][0] if self.tossed else FOREVER

    def expire(self, now: Instant, limit: int) -> None:
        """Forgets what nobody wanted for the toss time; at most `limit` are looked at."""
        while self.tossed and limit:
            deadline, resource = self.tossed[0]
            if deadline > now:
                return
            self.tossed.popleft()
            limit -= 1
            if resource.tossed == USED_SINCE and resource.unused:
                resource.tossed = TOSSED
                self.tossed.append((now + self.toss_ns, resource))
            else:
                self._pass(resource)

    def _pass(self, resource: Resource) -> None:
        """Out of the row, and forgotten if nobody uses it."""
        resource.tossed = NOT_TOSSED
        if not resource.unused:
            return
        assert resource.idle, "DLM-3"
        name = resource.name
        self.resources.remove(name)
        if not resource.complete:
            return
        node = self.directory_of(name)
        if node == self.me:
            self.removed(self.me, name, resource.token)
        else:
            self.send.append((node, Remove(name, resource.token)))

    def removed(self, master: MemberId, name: bytes, token: int) -> None:
        """As directory: `master` uses `name` no more."""
        if not self.sane_token(token):
            self.counters.hostile += 1
            return
        if self.directory.get(name) == master:
            del self.directory[name]
        self.floor = max(self.floor, token)

    def sane_token(self, token: int) -> bool:
        """No correct member has given one out that is ahead of this round by more than a round's worth."""
        return 0 <= token < self.base_token + (2 << TOKEN_SHIFT)
