"""Who holds and who waits: the query of 2004, of one's own lock or of any name, answered by the master.

With `warn_ns` set, an operation that has waited that long is told to its client, once, with who is in its way: that is
a query of our own.

The bits (`api.dlm.QUERY_*`) choose queues, and locks by a comparison with a mode. What they mean for the asking lock
is settled on its holder's side; so the master's answer is a pure function of the resource, the bits and a mode.

A query goes to the member that is thought to master the name, else to the directory node, which answers itself or
says who does; a few such steps at most. Like every other question it is asked again in a new round until answered.
Source: features 1.5; cman `dlm-kernel/src/query.c`. Deviations: any name may be asked for, not only that of a lock one
has; modes are compared as the holder knows them.
"""

from typing import Final, final

from corral.api.dlm import (
    IV,
    QUERY_ALL,
    QUERY_BLOCKING,
    QUERY_EQUAL,
    QUERY_HIGHER,
    QUERY_KIND,
    QUERY_LOCAL,
    QUERY_LOWER,
    QUERY_MODE,
    QUERY_NOT_BLOCKING,
    QUERY_QUEUES,
    QUERY_REQUESTED,
    QUEUE_CONVERT,
    QUEUE_GRANT,
    QUEUE_WAIT,
    THIS_LOCK,
    Completion,
    LockInfo,
    LockWaits,
    ResourceInfo,
)
from corral.api.dlm import Request as Asked
from corral.base.ids import NAME_MAX, MemberId
from corral.base.time import Instant, Nanoseconds
from corral.dlm.events import Done, Waiting
from corral.dlm.extent import Extent, overlap
from corral.dlm.modes import COMPATIBLE, EINVAL, ENOENT, ENOMEM
from corral.dlm.operations import HANDLE_MAX
from corral.dlm.orphans import Orphans
from corral.dlm.recovery import CONVERT, REQUEST
from corral.dlm.resource import Lock, Resource
from corral.dlm.wire import Queried, Query

E2BIG: Final = -7

QUERY_MAX: Final = 4096  # locks in one answer
QUESTIONS_MAX: Final = 65_536  # queries under way
STEPS_MAX: Final = 4  # members asked for one query, in one round
LOOKED_AT: Final = 256  # locks of a resource that are looked through for who is in the way
BLOCKERS_MAX: Final = 16  # of which so many are told

_BITS: Final = QUERY_MODE | QUERY_QUEUES | QUERY_LOCAL | QUERY_KIND | QUERY_REQUESTED
_KINDS: Final = (QUERY_HIGHER, QUERY_LOWER, QUERY_EQUAL, QUERY_BLOCKING, QUERY_NOT_BLOCKING, QUERY_ALL)


def illegal(bits: int) -> bool:
    kind = bits & QUERY_KIND
    if bits & ~_BITS or kind not in _KINDS:
        return True
    return not bits & QUERY_QUEUES and kind not in (QUERY_BLOCKING, QUERY_NOT_BLOCKING)


def report(resource: Resource, me: MemberId, bits: int, mode: int, limit: int) -> tuple[int, ResourceInfo]:
    """The answer of a master: 0, or -E2BIG with the first `limit` locks."""
    info = ResourceInfo(
        resource.name,
        resource.master,
        len(resource.granted),
        len(resource.converting),
        len(resource.waiting),
        resource.value or b"",
        resource.value_valid,
        resource.value_sequence,
        [],
    )
    found = [
        describe(lock, queue, me)
        for queue, locks in (
            (QUEUE_GRANT, resource.granted),
            (QUEUE_CONVERT, resource.converting),
            (QUEUE_WAIT, resource.waiting),
        )
        for lock in locks
        if _chosen(lock, queue, bits, mode)
    ]
    info.locks = found[:limit]
    return (0 if len(found) <= limit else E2BIG), info


def _chosen(lock: Lock, queue: int, bits: int, mode: int) -> bool:
    kind = bits & QUERY_KIND
    if kind in (QUERY_BLOCKING, QUERY_NOT_BLOCKING):
        blocks = mode != IV and not COMPATIBLE[mode][lock.granted]
        return queue == QUEUE_GRANT and blocks == (kind == QUERY_BLOCKING)
    if not bits & queue:
        return False
    theirs = lock.requested if bits & QUERY_REQUESTED else lock.granted
    return (
        kind == QUERY_ALL
        or (kind == QUERY_HIGHER and theirs > mode)
        or (kind == QUERY_EQUAL and theirs == mode)
        or (kind == QUERY_LOWER and theirs < mode)
    )


def describe(lock: Lock, queue: int, me: MemberId) -> LockInfo:
    return LockInfo(
        me if lock.holder is None else lock.holder,
        lock.address >> 32,
        lock.address & HANDLE_MAX,
        lock.owner,
        queue,
        lock.granted,
        lock.requested,
        lock.token,
        lock.extent,
        lock.wanted if lock.requested != IV else None,
    )


def in_the_way(info: ResourceInfo, member: MemberId, lock_id: int, mode: int, extent: Extent = None) -> list[LockInfo]:
    """Whom a lock that wants `mode` waits for: those whose granted modes exclude it, else those before it."""
    blockers: list[LockInfo] = []
    before: list[LockInfo] = []
    found = False
    for lock in info.locks:
        if lock.member == member and lock.client << 32 | lock.lock == lock_id:
            found = True
        elif lock.state != QUEUE_WAIT and not COMPATIBLE[mode][lock.granted] and overlap(extent, lock.range):
            blockers.append(lock)
        elif lock.state != QUEUE_GRANT and not found and overlap(extent, lock.requested_range):
            before.append(lock)
    return (blockers or before)[:BLOCKERS_MAX]


@final
class QueryAsked:
    """A query of a client here. `asked`: who shall answer; None before it is asked in a round.

    `waiting`: not the client asks but we do, for who is in the way of this lock; `operation` has waited since `since`.
    """

    __slots__ = (
        "asked",
        "bits",
        "client",
        "cookie",
        "handle",
        "limit",
        "mode",
        "name",
        "operation",
        "since",
        "steps",
        "waiting",
    )

    def __init__(self, client: int, handle: int, cookie: int, name: bytes, bits: int, mode: int, limit: int) -> None:
        self.client = client
        self.handle = handle
        self.cookie = cookie
        self.name = name
        self.bits = bits
        self.mode = mode
        self.limit = limit
        self.asked: MemberId | None = None
        self.steps = 0
        self.waiting: Lock | None = None
        self.operation = 0
        self.since: Instant = 0


class Queries(Orphans):
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
        self._queries: dict[int, QueryAsked] = {}
        self._query_number = 0

    def _query(self, now: Instant, client: int, handle: int, cookie: int, asked: Asked) -> int:
        """`asked.resource`, or that of the lock `handle`; `asked.flags`: the bits; `asked.owner`: how many locks."""
        bits, name = asked.flags, asked.resource
        mode = bits & QUERY_MODE
        if illegal(bits) or len(name) > NAME_MAX or asked.owner < 0:
            return EINVAL
        if not name:
            lock = self.space.locks.get(client << 32 | handle)
            if lock is None or lock.abandoned:
                return ENOENT
            name = lock.resource.name
            if bits & QUERY_KIND in (QUERY_BLOCKING, QUERY_NOT_BLOCKING):
                mode = lock.requested
            elif mode == THIS_LOCK:
                mode = lock.requested if bits & QUERY_REQUESTED else lock.granted
        elif mode >= len(COMPATIBLE):
            return EINVAL
        query = QueryAsked(client, handle, cookie, name, bits, mode, min(asked.owner or QUERY_MAX, QUERY_MAX))
        if bits & QUERY_LOCAL:
            self._answer_query(now, query, *self._known_here(query))
            return 0
        if len(self._queries) >= QUESTIONS_MAX:
            return ENOMEM
        self._query_number += 1
        self._queries[self._query_number] = query
        if self._running(now):
            self._ask_query(now, self._query_number)
        return 0

    def _known_here(self, query: QueryAsked) -> tuple[int, ResourceInfo | None]:
        """Without asking anybody: all of a resource mastered here, else its master and the locks of this process."""
        resource = self.space.resources.get(query.name)
        if resource is None:
            return ENOENT, None
        if resource.complete:
            return report(resource, self.me, query.bits, query.mode, query.limit)
        known = Resource(query.name, resource.master)
        mine = [lock for lock in self.space.locks.in_order() if lock.resource is resource]
        known.waiting = [lock for lock in mine if lock.granted == IV]
        known.converting = [lock for lock in mine if lock.granted != IV and lock.pending]
        known.granted = [lock for lock in mine if lock.granted != IV and not lock.pending]
        return report(known, self.me, query.bits, query.mode, query.limit)

    def _queries_again(self) -> None:
        for query in self._queries.values():
            query.asked = None
            query.steps = 0

    def _ask_queries(self, now: Instant) -> None:
        for number, query in list(self._queries.items()):
            if query.asked is None:
                self._ask_query(now, number)

    def _ask_query(self, now: Instant, number: int) -> None:
        query = self._queries[number]
        resource = self.space.resources.get(query.name)
        if resource is not None and resource.complete:
            self._end_query(now, number, *report(resource, self.me, query.bits, query.mode, query.limit))
        elif resource is not None and resource.master is not None and query.steps == 0:
            self._send_query(number, resource.master)
        else:
            node: MemberId | None = self.space.directory_of(query.name)
            if node == self.me:
                node = self.space.master_of(query.name)
            if node is None or node == self.me:
                self._end_query(now, number, ENOENT, None)
            else:
                self._send_query(number, node)

    def _send_query(self, number: int, member: MemberId) -> None:
        query = self._queries[number]
        query.asked = member
        query.steps += 1
        self.space.send.append((member, Query(number, query.name, query.bits, query.mode, query.limit)))

    def _query_asked(self, peer: MemberId, message: Query) -> None:
        space = self.space
        name = message.name
        if illegal(message.bits) or not 0 < len(name) <= NAME_MAX or not IV <= message.mode < len(COMPATIBLE):
            space.counters.hostile += 1
            return
        resource = space.resources.get(name)
        status, info, master = ENOENT, None, None
        if resource is not None and resource.complete:
            limit = max(0, min(message.limit, QUERY_MAX))
            status, info = report(resource, self.me, message.bits, message.mode, limit)
        elif space.directory_of(name) == self.me:
            master = space.master_of(name)
        space.send.append((peer, Queried(message.number, status, info, master if master != self.me else None)))

    def _queried(self, now: Instant, peer: MemberId, message: Queried) -> None:
        query = self._queries.get(message.number)
        if query is None or query.asked != peer:
            self.space.counters.stale += 1
        elif message.report is not None or query.steps >= STEPS_MAX:
            self._end_query(now, message.number, message.status, message.report)
        elif message.master in self.space.members and message.master != self.me:
            assert message.master is not None
            self._send_query(message.number, message.master)
        elif peer != self.space.directory_of(query.name):
            self._ask_query(now, message.number)
        else:
            self._end_query(now, message.number, message.status, None)

    def _end_query(self, now: Instant, number: int, status: int, info: ResourceInfo | None) -> None:
        self._answer_query(now, self._queries.pop(number), status, info)

    def _answer_query(self, now: Instant, query: QueryAsked, status: int, info: ResourceInfo | None) -> None:
        if query.waiting is not None:
            self._tell_waiting(now, query, info)
            return
        done = Completion(status, 0, IV, b"", False, 0, info)
        self._give(now, Done(query.client, query.handle, query.cookie, done))

    # --- what waits too long -----------------------------------------------------------------------------------------

    def _warn(self, now: Instant) -> None:
        """The warning time is the same for all, so they are due in the order in which they came."""
        watched = self._watched
        while watched:
            lock_id = next(iter(watched))
            if watched[lock_id] > now:
                return
            since = watched.pop(lock_id) - self.warn_ns
            lock = self.space.find(lock_id)
            if lock is None or lock.pending not in (REQUEST, CONVERT):
                continue
            self.space.counters.warned += 1
            if not lock.abandoned:
                self._ask_who_is_in_the_way(now, lock, since)

    def _ask_who_is_in_the_way(self, now: Instant, lock: Lock, since: Instant) -> None:
        client, handle = lock.address >> 32, lock.address & HANDLE_MAX
        query = QueryAsked(
            client, handle, lock.cookie, lock.resource.name, QUERY_ALL | QUERY_QUEUES, lock.requested, LOOKED_AT
        )
        query.waiting = lock
        query.operation = lock.operation
        query.since = since
        if not self._running(now) or len(self._queries) >= QUESTIONS_MAX:
            self._tell_waiting(now, query, None)
            return
        self._query_number += 1
        self._queries[self._query_number] = query
        self._ask_query(now, self._query_number)

    def _tell_waiting(self, now: Instant, query: QueryAsked, info: ResourceInfo | None) -> None:
        lock = query.waiting
        assert lock is not None, "only asked for one"
        if (
            lock.operation != query.operation
            or lock.pending not in (REQUEST, CONVERT)
            or lock.overlap
            or lock.abandoned
        ):
            return  # it waits no more
        blockers = [] if info is None else in_the_way(info, self.me, lock.id, query.mode, lock.wanted)
        waits = LockWaits(query.handle, query.name, query.mode, now - query.since, blockers)
        self._give(now, Waiting(query.client, query.cookie, waits))

    def _client_gone(self, now: Instant, client: int) -> None:
        for number in [number for number, query in self._queries.items() if query.client == client]:
            del self._queries[number]
        super()._client_gone(now, client)
