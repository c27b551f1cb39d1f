"""One client of the lock service: what it is told, in how many messages, and when its locks are free."""

import asyncio
from types import SimpleNamespace

import pytest

from corral.api.dlm import EX, Completion, Request
from corral.base.world import Credentials, ProcessId
from corral.corrald.lockservice import UNREAD_MAX, Client
from corral.dlm.events import UNAWAITED
from corral.providers.ipc_wire import FROM_LOCK_SERVICE, TO_LOCK_SERVICE, CloseSpace, SubmitBatch
from corral.wire.codec import MESSAGE_MAX

PROCESS = ProcessId(77, 1, "boot")
USER = 7


class Space:
    """A lockspace: what is named `here` is granted at once, with a value of `size` bytes."""

    def __init__(self, size=0):
        self.native = self
        self.opening = self
        self.users = {}
        self.size = size
        self.submitted = []
        self.gone = []

    def done(self):
        return True

    def complete_now(self, user, handle, request):
        value = bytes(self.size)
        return Completion(0, 0, request.mode, value, True, 1) if request.resource == b"here" else None

    def submit(self, user, operations):
        self.submitted += operations

    def client_gone(self, user):
        self.gone.append(user)


class Connection:
    credentials = Credentials(PROCESS.pid, 0, 0)

    def __init__(self):
        self.pending = 0
        self.sent = []
        self.closed = False

    def send(self, messages):
        assert all(len(message) <= MESSAGE_MAX for message in messages)
        self.sent += [FROM_LOCK_SERVICE.decode(message) for message in messages]

    def close(self):
        self.closed = True


class Rig:
    """A client of a service whose process ends when `ended` is set. Needs a running loop."""

    def __init__(self, size=0):
        self.ended = asyncio.Event()
        self.space, self.connection = Space(size), Connection()
        self.tasks = []
        world = SimpleNamespace(
            process=SimpleNamespace(identify=lambda pid: PROCESS, wait_gone=self.wait_gone),
            spawn=lambda coroutine, name: self.tasks.append(asyncio.ensure_future(coroutine)),
        )
        self.service = SimpleNamespace(world=world, clients=set(), rejected=0)
        self.client = Client(self.service, self.connection)
        self.service.clients.add(self.client)
        self.client._spaces[3] = (self.space, USER)

    async def wait_gone(self, process):
        assert process == PROCESS
        await self.ended.wait()

    def asks(self, *operations):
        self.client.received([TO_LOCK_SERVICE.encode(SubmitBatch(3, list(operations)))])


def test_no_completion_is_told_that_nobody_waits_for():
    async def story():
        rig = Rig()
        here, there = Request("lock", b"here", EX), Request("lock", b"there", EX)
        rig.asks((1, UNAWAITED, here))
        assert rig.connection.sent == []
        rig.asks((2, UNAWAITED, here), (3, 9, here), (4, 0, there))
        ((answer,),) = [message.completions for message in rig.connection.sent]
        assert answer[:2] == (3, 9)
        assert rig.space.submitted == [(4, UNAWAITED, there)]

    asyncio.run(story())


def test_no_message_is_longer_than_a_stream_carries():
    async def story():
        rig = Rig(size=4096)
        rig.asks(*[(handle, handle, Request("lock", b"here", EX)) for handle in range(1, 3001)])
        assert len(rig.connection.sent) > 1
        told = [handle for message in rig.connection.sent for handle, _, _ in message.completions]
        assert told == list(range(1, 3001))

    asyncio.run(story())


def does_not_read(rig):
    rig.connection.pending = UNREAD_MAX + 1
    rig.asks((1, 1, Request("lock", b"here", EX)))


def speaks_nonsense(rig):
    rig.client.received([b"\xc1"])


def asks_too_much(rig):
    rig.asks(*[(handle, 0, Request("lock", b"there", EX)) for handle in range(1, 5000)])


@pytest.mark.parametrize("offence", [does_not_read, speaks_nonsense, asks_too_much])
def test_who_is_disconnected_keeps_its_locks_while_it_may_count_on_them(offence):
    """Its loop may not turn: until its process has ended nobody knows that it has heard of it."""

    async def story():
        rig = Rig()
        offence(rig)
        assert rig.connection.closed
        rig.client.broken("closed by this side")
        rig.asks((9, 9, Request("lock", b"here", EX)))
        await asyncio.sleep(0)
        assert rig.space.gone == []
        assert rig.client in rig.service.clients  # one of those that the service has room for
        rig.ended.set()
        await asyncio.gather(*rig.tasks)
        assert rig.space.gone == [USER]
        assert not rig.service.clients

    asyncio.run(story())


def test_who_goes_away_by_itself_frees_its_locks_at_once():
    async def story():
        rig = Rig()
        rig.client.broken("closed by the peer")
        assert rig.space.gone == [USER]
        rig = Rig()
        rig.client.received([TO_LOCK_SERVICE.encode(CloseSpace(3))])
        assert rig.space.gone == [USER]

    asyncio.run(story())
