"""One leader at a time, with a fencing token, and a way to know who it is.

    election = Election(space, "primary", b"host-7")
    async with election.lead(timeout=60) as leadership:     # waits until it is the leader
        write_elsewhere(data, leadership.token)             # elsewhere refuses smaller tokens than it has seen

The leader holds `name` in EX; candidates wait in the order they came. It announces itself in the value block of
`name/l`, under EX there, and then keeps that in PR: token (8 bytes, little-endian) and identity, as long as it says
(1 byte before it).

A leader knows when it is none any more: `valid` is False from the moment its lease has lapsed, and when the leadership
is lost for good its body is cancelled and LockLost raised. Between a look at `valid` and what is done then any time may
pass; for effects outside the cluster there is the token.

Observers ask the lock manager who holds the lock, and hold none themselves, so that none of them can be in the way.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, NamedTuple, final

from corral.api.dlm import EX, PR, QUERY_ALL, QUEUE_GRANT, Completion, Lock, Lockspace, Request, ResourceInfo
from corral.base.errors import ClusterError, TimedOut
from corral.base.time import Seconds
from corral.recipes.waiting import Deadline, check_name

_NOBODY: Final = -2  # ENOENT: no lock of that name
LOOK_AGAIN_SECONDS: Final = 0.02  # between looks while a leader has not announced itself yet


class Leader(NamedTuple):
    token: int
    identity: bytes


@final
class Leadership:
    def __init__(self, seat: Lock, announcement: Lock, identity: bytes) -> None:
        self.identity: Final = identity
        self.token: Final = seat.token
        self._seat = seat
        self._announcement = announcement

    @property
    def valid(self) -> bool:
        """False once the lease has lapsed: somebody else may lead."""
        return self._seat.valid

    async def resign(self) -> None:
        """Ends what `stand` began. Raises LockLost when it was lost before."""
        self._announcement.unlock_nowait()
        await self._seat.unlock()


@final
class Election:
    """`identity`: up to value_size - 9 bytes, for observers."""

    def __init__(self, space: Lockspace, name: str, identity: bytes = b"") -> None:
        if len(identity) > 255:
            raise ValueError("an identity is at most 255 bytes")
        self.name: Final = check_name(name)
        self.identity: Final = identity
        self._space = space

    @asynccontextmanager
    async def lead(self, *, timeout: Seconds | None = None) -> AsyncIterator[Leadership]:
        """The body runs as the leader; leaving it resigns. Raises TimedOut when it is not elected in time, LockLost
        when it is lost in the body, ValueError when the identity is too long for a value block."""
        deadline = Deadline(timeout)
        async with self._space.lock(self.name, EX, timeout=deadline.left(self._waits)) as seat:
            announcement = await self._announce(seat, deadline)
            try:
                yield Leadership(seat, announcement, self.identity)
            finally:
                announcement.unlock_nowait()

    async def stand(self, *, timeout: Seconds | None = None) -> Leadership:
        """As `lead`, without a body: it leads until it calls `resign`, and nothing but `valid` tells it of a loss."""
        deadline = Deadline(timeout)
        seat = await deadline.lock(self._space, self.name, self._waits)
        try:
            return Leadership(seat, await self._announce(seat, deadline), self.identity)
        except BaseException:
            seat.unlock_nowait()
            raise

    async def leader(self, *, timeout: Seconds | None = None) -> Leader | None:
        """Who leads now; None when nobody does. One who is leader but has not said so yet is waited for."""
        deadline = Deadline(timeout)
        what = f"election {self.name}: waits for the leader to announce itself"
        while True:
            seat = await deadline.wait(self._query(self.name), what)
            holders = [lock for lock in seat.locks if lock.granted == EX] if seat is not None else []
            if not holders:
                return None
            said = await deadline.wait(self._query(f"{self.name}/l"), what)
            if said is not None and said.value_valid:
                token = int.from_bytes(said.value[:8], "little")
                if token == holders[0].token:
                    return Leader(token, bytes(said.value[9 : 9 + said.value[8]]))
            await deadline.wait(asyncio.sleep(LOOK_AGAIN_SECONDS), what)

    async def observe(self, *, every: Seconds = 1.0) -> AsyncIterator[Leader | None]:
        """Who leads, now and then at each change, looking every so many seconds: a leader that was one for less may
        be missed."""
        last: Leader | None = None
        first = True
        while True:
            try:
                now = await self.leader(timeout=every)
            except TimedOut:  # elected, and has not said who it is
                continue
            if first or now != last:
                yield now
            first, last = False, now
            await asyncio.sleep(every)

    # --- leaves ------------------------------------------------------------------------------------------------------

    @property
    def _waits(self) -> str:
        return f"election {self.name}: waits for those before it to resign"

    async def _announce(self, seat: Lock, deadline: Deadline) -> Lock:
        what = f"election {self.name}: waits to announce itself"
        value = seat.token.to_bytes(8, "little") + bytes([len(self.identity)]) + self.identity
        announcement = await deadline.lock(self._space, f"{self.name}/l", what)
        try:
            await announcement.convert(PR, value=value)
        except BaseException:
            announcement.unlock_nowait()
            raise
        return announcement

    async def _query(self, resource: str) -> ResourceInfo | None:
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()

        def completed(_handle: int, completion: Completion) -> None:
            if not answer.done():
                answer.set_result(completion)

        request = Request("query", resource.encode(), flags=QUERY_ALL | QUEUE_GRANT)
        self._space.submit([request], completed)
        completion = await answer
        if completion.status == _NOBODY:
            return None
        if completion.status != 0:
            raise ClusterError(f"election {self.name}: asking for {resource} failed with status {completion.status}")
        return completion.report
