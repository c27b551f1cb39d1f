"""The master's side: operations that other members ask of resources mastered here.

A copy of the holder's lock sits on the resource's queues. It remembers the number of the last operation and what
became of it, so an operation that is sent again (every unanswered one is, in each new round) is answered from there
and not done twice. Input is a peer's: what no correct member sends is counted and dropped, or refused when an answer is
owed.
"""

from typing import final

from corral.api.dlm import ECANCEL, EUNLOCK, IV, PR, VALBLK
from corral.base.ids import NAME_MAX, MemberId
from corral.base.time import Instant
from corral.dlm.extent import Extent, illegal
from corral.dlm.modes import EBUSY, EINVAL, ENOENT, ENOMEM, check_convert, check_request, check_unlock
from corral.dlm.resource import GRANTED, QUEUED, Effects, Lock, Resource
from corral.dlm.space import LOCKS_MAX, Space
from corral.dlm.wire import Blocking, Cancel, Completed, Convert, Master, NotMaster, Request, Unlock

LOCK_ID_MAX = (1 << 63) - 1


@final
class Mastering:
    def __init__(self, space: Space) -> None:
        self._space = space

    # --- operations of peers ---------------------------------------------------------------------------------------

    def request(self, now: Instant, peer: MemberId, message: Request, effects: Effects) -> None:
        space = self._space
        name = message.name
        if not self._sane(message.lock, message.operation, message.value) or not 0 < len(name) <= NAME_MAX:
            space.counters.hostile += 1
            return
        if message.lookup:
            if space.directory_of(name) != space.me:
                space.counters.hostile += 1
                return
            space.counters.lookups += 1
            master = space.assign(name, peer)
            space.send.append((peer, Master(name, master, space.floor if master == peer else 0)))
            if master != space.me:
                return
        resource = space.resources.get(name)
        if resource is None or not resource.complete:
            if message.lookup:
                space.become_master(space.resource(name), space.floor)  # our own Master answer is still on its way
            else:
                space.send.append((peer, NotMaster(message.lock, message.operation)))
                return
        self._request(now, peer, message, effects)

    def _request(self, now: Instant, peer: MemberId, message: Request, effects: Effects) -> None:
        space = self._space
        copies = space.copies.get(peer)
        copy = None if copies is None else copies.get(message.lock)
        if copy is not None:
            if copy.operation == message.operation and copy.answer != QUEUED:
                self.answer(copy, copy.answer)
            return
        error = EINVAL if illegal(message.range) else check_request(message.name, message.mode, message.flags)
        if not error and copies is not None and len(copies) >= LOCKS_MAX:
            error = ENOMEM
        if error:
            self._refuse(peer, message.lock, message.operation, error, IV)
            return
        resource = space.resource(message.name)
        copy = Lock(message.lock, resource, peer, message.owner)
        copy.operation = message.operation
        copy.requested = message.mode
        copy.wanted = message.range
        copy.flags = message.flags
        copy.value = self._block(message.flags, message.value, None)
        self.adopt(copy)
        status = resource.request(copy, effects)
        copy.answer = status
        if status != QUEUED:
            self.answer(copy, status)
            if status:
                space.drop_copy(now, copy)

    def convert(self, now: Instant, peer: MemberId, message: Convert, effects: Effects) -> None:
        if not self._sane(message.lock, message.operation, message.value):
            self._space.counters.hostile += 1
            return
        copy = self._copy(peer, message.lock)
        if copy is None:
            self._refuse(peer, message.lock, message.operation, ENOENT, IV)
            return
        if message.operation <= copy.operation:
            if message.operation == copy.operation and copy.answer != QUEUED:
                self.answer(copy, copy.answer)
            return
        error = EINVAL if illegal(message.range) else check_convert(copy.granted, message.mode, message.flags)
        if not error and copy.status != GRANTED:
            error = EBUSY
        if error:
            self._refuse(peer, message.lock, message.operation, error, copy.granted, copy.extent)
            return
        copy.operation = message.operation
        copy.requested = message.mode
        copy.wanted = message.range
        copy.flags = message.flags
        copy.result_flags = 0
        copy.value = self._block(message.flags, message.value, copy.value)
        status = copy.resource.convert(copy, effects)
        copy.answer = status
        if status != QUEUED:
            self.answer(copy, status)

    def unlock(self, now: Instant, peer: MemberId, message: Unlock, effects: Effects) -> None:
        if not self._sane(message.lock, message.operation, message.value) or check_unlock(message.flags):
            self._space.counters.hostile += 1
            return
        copy = self._copy(peer, message.lock)
        if copy is None:  # done in an earlier round, or it never came to be
            self._refuse(peer, message.lock, message.operation, EUNLOCK, IV)
            return
        if message.operation < copy.operation:
            self._space.counters.stale += 1
            return
        copy.operation = message.operation
        copy.value = self._block(message.flags, message.value, copy.value)
        resource = copy.resource
        self.answer(copy, resource.unlock(copy, message.flags, effects))
        self._space.drop_copy(now, copy)

    def cancel(self, now: Instant, peer: MemberId, message: Cancel, effects: Effects) -> None:
        copy = self._copy(peer, message.lock)
        if copy is None or message.operation != copy.operation:
            self._space.counters.stale += 1
            return
        if copy.answer != QUEUED:
            return  # its answer is on the way
        status = copy.resource.cancel(copy, effects)
        assert status == ECANCEL, "DLM-3"
        self.answer(copy, status)
        if copy.granted == IV:
            self._space.drop_copy(now, copy)

    # --- answers ---------------------------------------------------------------------------------------------------

    def completed(self, copy: Lock, status: int) -> None:
        """An effect: the operation of `copy` that waited has been granted (or failed)."""
        self.answer(copy, status)

    def answer(self, copy: Lock, status: int) -> None:
        assert copy.holder is not None, "DLM-3"
        copy.answer = status
        value = copy.value if copy.flags & VALBLK else None
        self._space.send.append(
            (
                copy.holder,
                Completed(
                    copy.id,
                    copy.operation,
                    status,
                    copy.result_flags,
                    copy.granted,
                    copy.token,
                    value,
                    copy.value_sequence,
                    copy.current,
                    copy.extent,
                ),
            )
        )

    def blocking(self, copy: Lock, mode: int) -> None:
        assert copy.holder is not None, "DLM-3"
        self._space.send.append((copy.holder, Blocking(copy.id, mode)))

    def adopt(self, copy: Lock) -> None:
        """Enters a copy into the tables."""
        assert copy.holder is not None, "DLM-3"
        self._space.copies.setdefault(copy.holder, {})[copy.id] = copy
        copy.resource.copies += 1

    def _refuse(self, peer: MemberId, lock: int, operation: int, status: int, mode: int, extent: Extent = None) -> None:
        self._space.send.append((peer, Completed(lock, operation, status, 0, mode, 0, None, 0, False, extent)))

    # --- leaves ----------------------------------------------------------------------------------------------------

    def _copy(self, peer: MemberId, lock: int) -> Lock | None:
        copies = self._space.copies.get(peer)
        return None if copies is None else copies.get(lock)

    def _sane(self, lock: int, operation: int, value: bytes | None) -> bool:
        return (
            0 <= lock <= LOCK_ID_MAX
            and 0 < operation <= LOCK_ID_MAX
            and (value is None or len(value) == self._space.value_size)
        )

    def _block(self, flags: int, given: bytes | None, kept: bytes | None) -> bytes | None:
        """The lock's value block for an operation: the caller's, else what it was, else zeros once it is used."""
        if given is not None:
            return given
        if kept is None and flags & VALBLK:
            return bytes(self._space.value_size)
        return kept


def purge(space: Space, now: Instant, peer: MemberId) -> list[Resource]:
    """All locks of a departed member go, nobody is granted anything yet. Whatever it held in PW or EX it may have been
    about to write, so the value is no longer sure. Returns the resources touched."""
    touched = []
    for _, copy in sorted(space.copies.get(peer, {}).items()):
        resource = copy.resource
        if copy.granted > PR:
            resource.value_valid = False
            space.counters.invalidated += 1
        resource.remove(copy)
        space.counters.purged += 1
        touched.append(resource)
        space.drop_copy(now, copy)
    return touched
