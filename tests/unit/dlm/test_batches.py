"""Several messages in one body, and what a lockspace makes of requests submitted together."""

import asyncio

import msgspec
import pytest

from corral.api.dlm import EUNLOCK, EX, FORCEUNLOCK, Request
from corral.base.errors import PeerError
from corral.base.ids import MemberId
from corral.base.time import FOREVER
from corral.base.view import Round, Slotted
from corral.dlm.wire import BATCHES, CODEC, Blocking, Completed, Names, Unlock
from corral.dlm.wire import Request as Asking
from corral.providers.backends import NativeBackend
from corral.providers.locks import LockSpace
from corral.providers.native_dlm import NativeLockspace
from corral.sim.simulation import Simulation
from corral.wire.codec import BATCH_BYTES, BATCH_MAX


def test_what_is_said_together_comes_back_in_order():
    messages = [Blocking(1, 5), Unlock(1, 2, 0, None), Asking(2, 1, b"n", 5, 0, 1, None, True)]
    (payload,) = BATCHES.encode(messages)
    assert payload == b"\x93" + b"".join(CODEC.encode(message) for message in messages)
    assert BATCHES.decode(payload) == messages


def test_a_body_holds_a_bounded_number_of_messages():
    messages = [Blocking(number, 5) for number in range(2 * BATCH_MAX + 3)]
    bodies = [BATCHES.decode(payload) for payload in BATCHES.encode(messages)]
    assert [len(body) for body in bodies] == [BATCH_MAX, BATCH_MAX, 3]
    assert [message for body in bodies for message in body] == messages


def test_long_messages_travel_alone():
    long = Names([b"x" * 64] * (BATCH_BYTES // 128))
    bodies = BATCHES.encode([long, Blocking(1, 5), long])
    assert [BATCHES.decode(body) for body in bodies] == [[long], [Blocking(1, 5)], [long]]
    assert len(BATCHES.encode([long, Blocking(1, 5)])) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x90",  # nothing said
        CODEC.encode(Blocking(1, 5)),  # no array of messages
        b"\x92" + CODEC.encode(Blocking(1, 5)) + b"\x93\x63\x01\x02",  # the second has an unknown number
        b"\x92" + CODEC.encode(Blocking(1, 5)) + b"\x93\x06\x01\xa1x",  # ... or a wrong field
        b"\x92" + CODEC.encode(Blocking(1, 5)),  # cut off
        b"\x91" + CODEC.encode(Blocking(1, 5)) + b"\x00",  # something behind it
        b"\xdd\xff\xff\xff\xff" + CODEC.encode(Blocking(1, 5)),  # claims four billion
        b"\xdc\x00\x41" + CODEC.encode(Blocking(1, 5)) * (BATCH_MAX + 1),
        b"\x91" * 5000,
    ],
)
def test_a_hostile_body_is_refused_whole(body):
    with pytest.raises(PeerError):
        BATCHES.decode(body)


# --- two lockspaces over real bodies ---------------------------------------------------------------------------------


class Hub:
    """Participants of one group; `hold` keeps bodies back, `lose` drops those."""

    def __init__(self, world):
        self.world = world
        self.members = {}
        self.bodies = []  # (sender, receiver, body) of all time
        self.held = None

    def join(self, node):
        member = Member(self, MemberId(node, 1, 1))
        self.members[member.me] = member
        return member

    async def round(self, number):
        slots = tuple(Slotted(me, me.node) for me in sorted(self.members))
        round = Round(number, "dlm:work", slots, (), (), ())
        for member in self.members.values():
            member.service.stop()
            member.round_id = number
        starts = [self.world.spawn(member.service.start(round), "start") for member in self.members.values()]
        for start in starts:
            await start
        for member in self.members.values():
            member.service.finish(round)

    def send(self, sender, receiver, body):
        self.bodies.append((sender.node, receiver.node, BATCHES.decode(body)))
        if self.held is None:
            asyncio.get_running_loop().call_soon(self.members[receiver].service.deliver, sender, [body])
        else:
            self.held.append((sender, receiver, body))


class Member:
    def __init__(self, hub, me):
        self.hub = hub
        self.me = me
        self.round_id = 0
        self.lost = hub.world.future()
        self.identity = msgspec.defstruct("Identity", [("detect_ns", int)])(10**9)
        self.service = NativeLockspace(hub.world, self, "work")
        self.service._open = True
        self.backend = NativeBackend(hub.world, self.service)
        self.space = LockSpace(hub.world, self.backend)

    def lease_until(self):
        return FOREVER

    def round_begun(self, group, round_id):
        pass

    def send(self, group, peer, body):
        self.hub.send(self.me, peer, body)


def together(body):
    """Runs `body(hub, a, b)`: the names it uses are mastered by b."""

    async def main(world):
        hub = Hub(world)
        one, two = hub.join(1), hub.join(2)
        await hub.round(1)
        for name in ("x", "y"):
            await two.space.lock(name, 0)
        hub.bodies.clear()
        await body(hub, one, two)
        return 0

    with Simulation(1) as sim:
        process = sim.machine(1).start("app", main)

        async def wait():
            while process.alive:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        sim.run(wait())
        assert process.status == 0


def test_an_unlock_and_the_next_request_are_one_body_and_so_are_their_answers():
    async def body(hub, one, two):
        async with one.space.lock("x"):
            pass
        async with one.space.lock("x"):
            pass
        await asyncio.sleep(0.1)
        kinds = [(sender, receiver, [type(message) for message in said]) for sender, receiver, said in hub.bodies]
        assert kinds[-4:] == [
            (1, 2, [Unlock, Asking]),
            (2, 1, [Completed, Completed]),
            (1, 2, [Unlock]),
            (2, 1, [Completed]),
        ]

    together(body)


def test_a_lost_body_is_asked_again_in_the_next_round_whole():
    """The session broke with an unlock and a request in one frame: the unlock counts and the lock is granted."""

    async def body(hub, one, two):
        held = await one.space.lock("x")
        hub.held = []
        granted = hub.world.future()
        one.backend.submit([Request("unlock", flags=FORCEUNLOCK, lock=held._handle)], None)
        (handle,) = one.backend.submit([Request("lock", b"x", EX)], lambda _, done: granted.set_result(done))
        await asyncio.sleep(0.1)
        assert [[type(m) for m in BATCHES.decode(body)] for _, _, body in hub.held] == [[Unlock, Asking]]
        hub.held = None
        assert not granted.done()
        await hub.round(2)
        async with asyncio.timeout(5):
            assert (await granted).token > held.token
        one.backend.submit([Request("unlock", lock=handle)], None)
        await asyncio.sleep(0.1)
        assert one.service.engine.space.lock_count == 0
        assert not two.service.engine.space.copies, "nothing of the lost frame is left at the master"

    together(body)


def test_a_hostile_body_among_good_ones_is_counted_and_harms_nobody():
    async def body(hub, one, two):
        lock = asyncio.ensure_future(one.space.lock("x")._acquire())
        two.service.deliver(one.me, [b"\x92\x01", b"\x91\x90"])
        two.service.deliver(one.me, [b"\xdc\xff\xff" + CODEC.encode(Blocking(1, 5)) * 65535])
        async with asyncio.timeout(5):
            held = await lock
        assert held.mode == EX
        assert two.service.rejected == 3

    together(body)


# --- what the backend gathers ----------------------------------------------------------------------------------------


def test_nothing_overtakes_what_was_submitted_in_this_turn():
    async def body(hub, one, two):
        (handle, granted) = two.backend.submit_now(Request("lock", b"own", EX), None)
        assert granted.status == 0
        heard = []
        two.backend.submit([Request("convert", mode=0, lock=handle)], lambda _, done: heard.append(done.status))
        assert two.backend.submit_now(Request("unlock", lock=handle), None) is None
        two.backend.submit([Request("unlock", lock=handle)], lambda _, done: heard.append(done.status))
        assert heard == [], "never before submit has returned"
        await asyncio.sleep(0)
        assert heard == [0, EUNLOCK]
        assert two.backend.submit_now(Request("lock", b"own", EX), None) is not None

    together(body)


def test_nobody_hears_of_what_nobody_waits_for():
    async def body(hub, one, two):
        heard = []
        one.service.completed = lambda *completed: heard.append(completed)
        (handle,) = one.backend.submit([Request("lock", b"x", EX)], None)
        (other,) = two.backend.submit([Request("lock", b"y", EX)], None)
        one.backend.submit([Request("unlock", lock=99)], None)  # an error, too
        await asyncio.sleep(0.1)
        assert heard == []
        assert one.backend._books._waiting == two.backend._books._waiting == {}
        one.backend.submit([Request("unlock", lock=handle)], None)
        two.backend.submit([Request("unlock", lock=other)], None)
        await asyncio.sleep(0.1)
        assert heard == []
        assert one.service.engine.space.lock_count == 0
        assert two.service.engine.space.lock_count == 2, "the two in NL that make it the master"

    together(body)


def test_what_was_submitted_goes_before_the_end():
    async def body(hub, one, two):
        asked = []
        one.service.submit = lambda client, operations: asked.extend(operations)
        one.service.client_gone = lambda client: asked.append("gone")
        one.service.close = lambda: asyncio.sleep(0)
        one.backend.submit([Request("unlock", lock=7)], None)
        await one.backend.close()
        assert [operation[2].op for operation in asked[:-1]] == ["unlock"]
        assert asked[-1] == "gone"
        await asyncio.sleep(0)
        assert len(asked) == 2

    together(body)
