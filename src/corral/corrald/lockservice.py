"""The lock service: a participant that runs lockspaces for light clients (DESIGN 4).

A process of its own, so that a lock storm cannot delay a heartbeat. Clients connect to its Unix socket; each lockspace
a client opens is joined here once and shared by all of them. A client that goes away loses its locks at once, without
a round.
"""

import argparse
import asyncio
import logging
import sys
from functools import partial
from typing import Final, final

from corral.api.dlm import Completion, LockWaits, Request
from corral.base.errors import ClusterError, ConfigurationError, PeerError
from corral.base.ids import NAME_MAX
from corral.base.world import Connection, World
from corral.dlm.events import UNAWAITED
from corral.providers.endpoint import native_endpoint
from corral.providers.ipc_wire import (
    FROM_LOCK_SERVICE,
    TO_LOCK_SERVICE,
    BlockingBatch,
    CloseSpace,
    CompletedBatch,
    FromLockService,
    Opened,
    OpenSpace,
    Released,
    ReleaseSpace,
    SpaceGone,
    SpaceSuspended,
    SubmitBatch,
    WaitingTold,
    in_messages,
)
from corral.providers.native_dlm import NativeLockspace
from corral.providers.participant import Participant
from corral.real import pki
from corral.real.run import run
from corral.real.world import RealWorld

CLIENTS_MAX: Final = 1024
SPACES_MAX: Final = 256  # lockspaces of this node
SPACES_PER_CLIENT: Final = 64
BATCH_MAX: Final = 4096  # requests in one message
UNREAD_MAX: Final = 16 << 20  # bytes a client may leave unread

log = logging.getLogger("corral.locks")


@final
class Space:
    """One lockspace of this node and who uses it."""

    def __init__(self, service: "LockService", name: str, value_size: int) -> None:
        self.value_size: Final = value_size
        self.native: Final = NativeLockspace(service.world, service.participant, name, value_size=value_size)
        self.native.completed = self._completed
        self.native.blocked = self._blocked
        self.native.waiting = self._waits
        self.native.changed = self._changed
        self.native.lost = self._lost
        self.opening: Final = service.world.spawn(self._open(), f"join lockspace {name}")
        self.users: dict[int, tuple[Client, int]] = {}  # dlm client number -> (connection, its number for the space)

    async def _open(self) -> str:
        """The reason why not; empty when it is open."""
        try:
            await self.native.open()
        except ClusterError as error:
            return str(error)
        return ""

    def _completed(self, user: int, handle: int, cookie: int, completion: Completion) -> None:
        found = self.users.get(user)
        if found is not None:
            client, number = found
            client.complete(number, handle, cookie, completion)

    def _blocked(self, user: int, handle: int, mode: int) -> None:
        found = self.users.get(user)
        if found is not None:
            client, number = found
            client.block(number, handle, mode)

    def _waits(self, user: int, waits: LockWaits) -> None:
        found = self.users.get(user)
        if found is not None:
            client, number = found
            client.tell(WaitingTold(number, waits))

    def _changed(self) -> None:
        if self.opening.done():
            for _, (client, number) in sorted(self.users.items()):
                client.tell(SpaceSuspended(number, self.native.suspended))

    def _lost(self, reason: str) -> None:
        for _, (client, number) in sorted(self.users.items()):
            client.tell(SpaceGone(number, reason))


@final
class Client:
    """One connection. Implements `ConnectionHandler`."""

    def __init__(self, service: "LockService", connection: Connection) -> None:
        self.connection: Final = connection
        credentials = connection.credentials
        self._process = None if credentials is None else service.world.process.identify(credentials.pid)
        self._service = service
        self._spaces: dict[int, tuple[Space, int]] = {}  # its number -> (space, dlm client number)
        self._completions: dict[int, list[tuple[int, int, Completion]]] = {}
        self._blocked: dict[int, list[tuple[int, int]]] = {}
        self._flushing = False  # a flush follows
        self._closed = False

    # -- ConnectionHandler

    def received(self, messages: list[bytes]) -> None:
        self._flushing = True
        self._receive(messages)
        self._flush()

    def _receive(self, messages: list[bytes]) -> None:
        for payload in messages:
            if self._closed:
                return
            try:
                message = TO_LOCK_SERVICE.decode(payload)
            except PeerError as error:
                self._service.rejected += 1
                self._expel(f"spoke nonsense ({error})")
                return
            if isinstance(message, SubmitBatch):
                self._submit(message)
            elif isinstance(message, OpenSpace):
                self._open(message)
            elif isinstance(message, ReleaseSpace):
                self._service.world.spawn(self._release(message.space, message.force), "release a lockspace")
            else:
                assert isinstance(message, CloseSpace)
                self._close_space(message.space)

    def broken(self, _reason: str) -> None:
        if not self._closed:
            self._disconnect()
            self._free()

    def _disconnect(self) -> None:
        self._closed = True
        self.connection.close()

    def _free(self) -> None:
        self._service.clients.discard(self)
        for number in sorted(self._spaces):
            self._close_space(number)

    def _expel(self, why: str) -> None:
        """Disconnects it and frees its locks when its process is gone: while that one is too busy to hear of it, it
        counts on them, since the lease it sees on the page is ours."""
        log.warning("a client of the lock service %s; it is disconnected", why)
        self._disconnect()
        self._service.world.spawn(self._bury(), "free the locks of a client when it has ended")

    async def _bury(self) -> None:
        if self._process is not None:
            await self._service.world.process.wait_gone(self._process)
        self._free()

    # -- what it asks

    def _open(self, message: OpenSpace) -> None:
        service = self._service
        legal = 0 < len(message.name.encode()) <= NAME_MAX and message.name.isprintable()
        if message.space in self._spaces or not 0 <= message.space < 1 << 31:
            self.tell(Opened(message.space, "this number already stands for a lockspace of this connection"))
        elif not legal:
            self.tell(Opened(message.space, f"a lockspace needs a printable name of 1 to {NAME_MAX} bytes"))
        elif not 8 <= message.value_size <= 4096 or message.value_size % 8:
            self.tell(Opened(message.space, "the length of a value block is a multiple of 8 from 8 to 4096"))
        elif len(self._spaces) >= SPACES_PER_CLIENT:
            self.tell(Opened(message.space, f"one connection opens at most {SPACES_PER_CLIENT} lockspaces"))
        else:
            space = service.space(message.name, message.value_size, message.exclusive)
            if isinstance(space, str):
                self.tell(Opened(message.space, space))
            else:
                user = service.next_user()
                self._spaces[message.space] = (space, user)
                space.users[user] = (self, message.space)
                service.world.spawn(self._await_open(message.space, space), "open a lockspace for a client")

    async def _await_open(self, number: int, space: Space) -> None:
        error = await asyncio.shield(space.opening)
        if error:
            self._service.forget(space)
            self._spaces.pop(number, None)
        identity = self._service.participant.identity
        self.tell(Opened(number, error, identity.page_slot, identity.me.serial))
        if not error and space.native.suspended:
            self.tell(SpaceSuspended(number, True))

    def _submit(self, message: SubmitBatch) -> None:
        found = self._spaces.get(message.space)
        if found is None or not found[0].opening.done() or len(message.requests) > BATCH_MAX:
            self._service.rejected += 1
            self._expel("asked for more than it may, or of a lockspace that it has not open")
            return
        space, user = found
        native, number = space.native, message.space
        waiting: list[tuple[int, int, Request]] = []  # from the first that does not complete at once: order is kept
        try:
            for operation in message.requests:
                handle, cookie, request = operation
                completion = None if waiting else native.complete_now(user, handle, request)
                if completion is None:
                    waiting.append(operation)
                elif cookie != UNAWAITED:
                    self.complete(number, handle, cookie, completion)
            if waiting:
                native.submit(user, waiting)
        except ClusterError as error:
            self.tell(SpaceGone(number, str(error)))

    def _close_space(self, number: int) -> None:
        found = self._spaces.pop(number, None)
        if found is not None:
            space, user = found
            space.users.pop(user, None)
            if space.opening.done():
                space.native.client_gone(user)

    async def _release(self, number: int, force: int) -> None:
        found = self._spaces.get(number)
        if found is None or not found[0].opening.done():
            self.tell(Released(number, "this connection has no such lockspace open"))
            return
        space = found[0]
        if space.native.engine.busy(force):
            what = "locks of clients of this node" if space.native.engine.busy(1) else "locks of other nodes"
            self.tell(Released(number, f"lockspace {space.native.name} has {what}; end them, or release it by force"))
            return
        for user, (client, its_number) in sorted(space.users.items()):
            client.forget(its_number)
            space.native.client_gone(user)
            if (client, its_number) != (self, number):
                client.tell(SpaceGone(its_number, f"lockspace {space.native.name} was released on this node"))
        space.users.clear()
        try:
            await space.native.close()
        except ClusterError as error:
            self.tell(Released(number, str(error)))
            return
        self._service.forget(space)
        self.tell(Released(number, ""))

    def forget(self, number: int) -> None:
        """The lockspace of this number is gone."""
        self._spaces.pop(number, None)

    # -- what it is told: all that its own requests caused, and everything of one loop turn, in one message

    def complete(self, number: int, handle: int, cookie: int, completion: Completion) -> None:
        self._completions.setdefault(number, []).append((handle, cookie, completion))
        self._flush_soon()

    def block(self, number: int, handle: int, mode: int) -> None:
        self._blocked.setdefault(number, []).append((handle, mode))
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._service.world.at_turn_end(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        completions, self._completions = self._completions, {}
        blocked, self._blocked = self._blocked, {}
        for number, batch in completions.items():
            self._send(in_messages(FROM_LOCK_SERVICE, partial(CompletedBatch, number), batch))
        for number, callbacks in blocked.items():
            self._send(in_messages(FROM_LOCK_SERVICE, partial(BlockingBatch, number), callbacks))

    def tell(self, message: FromLockService) -> None:
        self._send([FROM_LOCK_SERVICE.encode(message)])

    def _send(self, messages: list[bytes]) -> None:
        if self._closed:
            return
        if self.connection.pending > UNREAD_MAX:
            self._expel("does not read its answers")
            return
        self.connection.send(messages)


@final
class LockService:
    def __init__(self, world: World, participant: Participant) -> None:
        self.world: Final = world
        self.participant: Final = participant
        self.clients: set[Client] = set()
        self.spaces: dict[str, Space] = {}
        self.rejected = 0
        self._user = 0

    def accept(self, connection: Connection) -> Client:
        client = Client(self, connection)
        if len(self.clients) >= CLIENTS_MAX:
            log.warning("the lock service serves at most %d connections; one more was refused", CLIENTS_MAX)
            connection.close()
        else:
            self.clients.add(client)
        return client

    def next_user(self) -> int:
        self._user += 1
        return self._user

    def space(self, name: str, value_size: int, exclusive: bool) -> Space | str:
        """The lockspace of that name, joined on first use; or the reason why not."""
        space = self.spaces.get(name)
        if space is None:
            if len(self.spaces) >= SPACES_MAX:
                return f"this node has {SPACES_MAX} lockspaces open; close one first"
            space = self.spaces[name] = Space(self, name, value_size)
        elif exclusive:
            return f"lockspace {name} exists on this node already; open it without `exclusive`, or release it first"
        elif space.value_size != value_size:
            return f"lockspace {name} has value blocks of {space.value_size} bytes here, not {value_size}"
        return space

    def forget(self, space: Space) -> None:
        if self.spaces.get(space.native.name) is space:
            del self.spaces[space.native.name]


async def serve(world: World, socket: str, listen: str, enlist: str) -> str:
    """Until this participant may not act any more; returns why."""
    participant = Participant(world, socket, enlist, native_endpoint, purpose="lock service")
    await participant.open()
    service = LockService(world, participant)
    listener = await world.local.listen(listen, service.accept)
    try:
        return await participant.lost
    finally:
        listener.close()
        for client in list(service.clients):
            client.connection.close()
        participant.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="corral-locks", description="The lock service of one node (run by corrald).")
    for option in ("--socket", "--listen", "--enlist", "--state", "--certificates"):
        parser.add_argument(option, required=True)
    parser.add_argument("--node", required=True, type=int)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    try:
        credentials = pki.load(arguments.certificates, arguments.node)

        async def body(world: RealWorld) -> str:
            return await serve(world, arguments.socket, arguments.listen, arguments.enlist)

        reason = run(body, state_directory=arguments.state, credentials=credentials)
    except (ClusterError, ConfigurationError, OSError) as error:
        sys.exit(f"lock service: {error}")
    except asyncio.CancelledError:
        sys.exit("lock service: stopped")
    log.info("the lock service ends: %s", reason)


if __name__ == "__main__":
    main()
