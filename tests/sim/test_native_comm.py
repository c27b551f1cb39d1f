"""NativeComm over the simulated world: the provider's own promises (what comm's engines promise is in test_comm.py)."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from corral.api.comm import PeerDown, PeerUp
from corral.base.ids import MemberId
from corral.base.time import MILLISECOND, SECOND
from corral.base.world import World
from corral.comm.actions import Rejected
from corral.providers.native_comm import Limits, NativeComm
from corral.sim.links import Delay, Loss, Repeat
from corral.sim.process import Process
from corral.sim.simulation import Simulation

PORT = 64
UUID = bytes(range(16))
DETECT = 500 * MILLISECOND


class Member:
    """A process with a NativeComm, and all it was told, in order."""

    def __init__(self, process: Process, incarnation: int, **options: Any) -> None:
        self.process = process
        self.world: World = process.world
        self.me = MemberId(process.node, incarnation, options.pop("serial", 0))
        self.told: list[Any] = []
        self.beats: list[tuple[MemberId, bytes]] = []
        self.comm = NativeComm(
            self.world,
            self.me,
            cluster=options.pop("cluster", "testers"),
            cluster_uuid=UUID,
            limits=options.pop("limits", Limits.for_detect(DETECT)),
            rejected=self.told.append,
            **options,
        )
        self.comm.watch(self.told.append)
        self.comm.listen(PORT, lambda peer, round_id, payloads: self.told.append((peer, round_id, payloads)))
        self.comm.listen_datagrams(lambda peer, payload: self.beats.append((peer, payload)))

    async def call(self, do: Callable[[], Any]) -> Any:
        async def inside() -> Any:
            return do()

        return await self.process.call(inside())

    async def send(self, peer: "Member", *payloads: bytes) -> None:
        await self.call(lambda: [self.comm.send(peer.me, PORT, 1, payload) for payload in payloads])

    def payloads(self) -> list[bytes]:
        return [payload for event in self.told if type(event) is tuple for payload in event[2]]

    def changes(self) -> list[PeerUp | PeerDown]:
        return [event for event in self.told if isinstance(event, PeerUp | PeerDown)]


async def idle(_: World) -> int:
    await asyncio.sleep(10_000)
    return 0


async def member(sim: Simulation, node: int, peers: list[int], incarnation: int = 1, **options: Any) -> Member:
    """Corrald of the node, started, expecting those nodes."""
    made = Member(sim.machines[f"n{node}"].start("corrald", idle), incarnation, **options)

    async def begin() -> None:
        await made.comm.start(f"10.0.0.{node}:7000")
        for peer in peers:
            made.comm.add_node(peer, f"10.0.0.{peer}:7000")

    await made.process.call(begin())
    return made


def two(body: Callable[[Simulation, Member, Member], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Runs the body with two members that hear each other."""

    async def whole(sim: Simulation) -> None:
        one, other = await member(sim, 1, [2], **options), await member(sim, 2, [1], **options)
        await asyncio.sleep(2)
        assert [type(event) for event in one.told + other.told] == [PeerUp, PeerUp]
        await body(sim, one, other)

    with Simulation(1) as sim:
        sim.machine(1)
        sim.machine(2)
        sim.run(whole(sim))


def test_a_turns_messages_arrive_in_one_delivery() -> None:
    async def body(_: Simulation, one: Member, other: Member) -> None:
        await one.send(other, b"a", b"b", b"c")
        await asyncio.sleep(1)
        assert other.told[1:] == [(one.me, 1, [b"a", b"b", b"c"])]

    two(body)


def test_messages_to_oneself_come_in_the_next_turn_in_order_between_everything_else() -> None:
    async def body(_: Simulation, one: Member, other: Member) -> None:
        def send() -> None:
            one.comm.send(one.me, PORT, 7, b"1")
            one.comm.send(one.me, PORT, 7, b"2")
            one.comm.send(one.me, PORT, 8, b"3")
            assert one.payloads() == []

        await one.call(send)
        await asyncio.sleep(0.001)
        assert one.told[1:] == [(one.me, 7, [b"1", b"2"]), (one.me, 8, [b"3"])]

    two(body)


def test_what_a_delivery_sends_to_oneself_is_delivered_too() -> None:
    async def body(_: Simulation, one: Member, other: Member) -> None:
        def again(peer: MemberId, round_id: int, payloads: list[bytes]) -> None:
            one.told.append((peer, round_id, payloads))
            if round_id < 5:
                one.comm.send(one.me, PORT + 1, round_id + 1, b"x")

        await one.call(lambda: one.comm.listen(PORT + 1, again))
        await one.call(lambda: one.comm.send(one.me, PORT + 1, 0, b"x"))
        await asyncio.sleep(0.001)
        assert [event[1] for event in one.told[1:]] == [0, 1, 2, 3, 4, 5]

    two(body)


def test_bad_weather_loses_and_doubles_datagrams_but_no_message() -> None:
    async def body(sim: Simulation, one: Member, other: Member) -> None:
        weather = sim.network.lay(Loss(0.2), ["n1"], ["n2"], both=True)
        weather += sim.network.lay(Repeat(0.5), ["n1"], ["n2"], both=True)
        weather += sim.network.lay(Delay(0, 20 * MILLISECOND), ["n1"], ["n2"], both=True)
        for number in range(200):
            await one.send(other, b"%d" % number)
            await one.call(lambda n=number: one.comm.datagram(other.me, b"%d" % n))
            await asyncio.sleep(0.005)
        sim.network.heal(weather)
        await asyncio.sleep(10)
        assert other.payloads() == [b"%d" % number for number in range(200)]
        beats = [payload for _, payload in other.beats]
        assert len(beats) == len(set(beats))
        assert 120 < len(beats) < 200

    two(body, limits=Limits.for_detect(60 * SECOND))


def test_a_partition_ends_the_session_and_its_healing_begins_another() -> None:
    async def body(sim: Simulation, one: Member, other: Member) -> None:
        cut = sim.network.partition(["n1"], ["n2"])
        await one.send(other, b"never")
        await other.send(one, b"never")
        await asyncio.sleep(30)
        for side in (one, other):
            down = side.changes()[1]
            assert isinstance(down, PeerDown)
            assert not down.refused
        sim.network.heal(cut)
        await asyncio.sleep(30)
        assert [type(change) for change in one.changes()] == [PeerUp, PeerDown, PeerUp]
        assert one.changes()[-1].session == other.changes()[-1].session
        await one.send(other, b"heard")
        await asyncio.sleep(1)
        assert other.payloads() == [b"heard"]

    two(body)


def test_a_killed_process_is_refused_and_its_successor_is_another_member() -> None:
    for victim, survivor in ((1, 0), (0, 1)):

        async def body(sim: Simulation, *members: Member, victim: int = victim, survivor: int = survivor) -> None:
            dead, living = members[victim], members[survivor]
            dead.process.kill()
            await dead.process.wait_gone()
            await asyncio.sleep(0.2)
            down = living.changes()[1]
            assert isinstance(down, PeerDown)
            assert down.refused
            again = await member(sim, dead.me.node, [living.me.node], incarnation=2)
            await asyncio.sleep(2)
            assert living.changes()[2].peer == again.me
            await living.call(lambda: living.comm.send(dead.me, PORT, 1, b"to the dead"))
            await living.send(again, b"to the living")
            await asyncio.sleep(1)
            assert again.payloads() == [b"to the living"]

        two(body)


def test_callbacks_may_send_break_and_forget() -> None:
    """Everything is allowed inside a callback, and nothing is delivered behind the PeerDown it causes."""

    async def body(_: Simulation, one: Member, other: Member) -> None:
        def heard(peer: MemberId, round_id: int, payloads: list[bytes]) -> None:
            other.told.append((peer, round_id, payloads))
            other.comm.send(peer, PORT, 2, b"reply")
            if payloads == [b"stop"]:
                other.comm.drop_peer(peer)
                other.comm.send(peer, PORT, 2, b"too late")

        def replace() -> None:
            other.comm.unlisten(PORT)
            other.comm.listen(PORT, heard)

        await other.call(replace)
        await one.call(lambda: [one.comm.send(other.me, PORT, round_id, b"stop") for round_id in (1, 2, 3)])
        await asyncio.sleep(1)
        kinds = [type(event).__name__ for event in other.told]
        assert kinds == ["PeerUp", "tuple", "tuple", "tuple", "PeerDown"]
        assert one.payloads() == [b"reply"]
        assert isinstance(one.changes()[1], PeerDown)

    two(body)


def test_a_send_from_a_callback_never_overtakes_a_handshake() -> None:
    """A watcher that talks to everybody while sessions come and go breaks no session."""

    async def whole(sim: Simulation) -> None:
        members = [await member(sim, node, [n for n in (1, 2, 3) if n != node]) for node in (1, 2, 3)]
        for one in members:

            def shout(_: Any, one: Member = one) -> None:
                for other in members:
                    one.comm.send(other.me, PORT, 1, b"shout")

            await one.call(lambda one=one, shout=shout: one.comm.watch(shout))
        for _ in range(30):
            for one in members:
                for connection in list(one.process.connections)[:1]:
                    connection.break_at(sim.now, "reset by the test")
                await one.call(lambda one=one: one.comm.end_session(members[one.me.node % 3].me, "by the test"))
            await asyncio.sleep(0.3)
        await asyncio.sleep(3)
        for one in members:
            assert not [event for event in one.told if isinstance(event, Rejected)]
            assert all("protocol" not in event.reason for event in one.changes() if isinstance(event, PeerDown))
            assert len(one.comm.statistics().peers) == 2
            assert all(peer.alive for peer in one.comm.statistics().peers)

    with Simulation(3) as sim:
        for node in (1, 2, 3):
            sim.machine(node)
        sim.run(whole(sim))


def test_another_cluster_is_refused_and_told_once() -> None:
    async def whole(sim: Simulation) -> None:
        one = await member(sim, 1, [2])
        other = await member(sim, 2, [1], cluster="strangers")
        await asyncio.sleep(5)
        assert one.changes() == other.changes() == []
        for side in (one, other):  # either of them calls or summons, and is called or summoned
            told = sorted(event.kind for event in side.told)
            assert told == ["hello refused: another cluster", "hello with another cluster"]
        assert dict(other.comm.statistics().rejects)["hello with another cluster"] > 3

    with Simulation(1) as sim:
        sim.machine(1)
        sim.machine(2)
        sim.run(whole(sim))


def test_close_tells_the_peers_and_nothing_is_heard_after_it() -> None:
    async def body(_: Simulation, one: Member, other: Member) -> None:
        await one.send(other, b"last")
        await one.call(one.comm.close)
        told = len(one.told)
        await other.send(one, b"unheard")
        await asyncio.sleep(2)
        assert len(one.told) == told
        assert other.payloads() == [b"last"]
        down = other.changes()[1]
        assert isinstance(down, PeerDown)
        assert "leaves" in down.reason

    two(body)


def test_close_from_within_a_callback_says_goodbye_properly() -> None:
    async def body(_: Simulation, one: Member, other: Member) -> None:
        one.comm.watch(lambda change: one.comm.close())
        await one.call(lambda: one.comm.end_session(other.me, "for a test"))
        await asyncio.sleep(2)
        assert [type(event).__name__ for event in one.told] == ["PeerUp", "PeerDown"]
        assert [type(event).__name__ for event in other.told] == ["PeerUp", "PeerDown"]
        await asyncio.sleep(2)
        assert not any(peer.connected for peer in other.comm.statistics().peers)

    two(body)


def test_participants_meet_by_announcement() -> None:
    async def whole(sim: Simulation) -> None:
        a = Member(sim.machines["n1"].start("mount", idle), 1, serial=4, ticket=b"A")
        b = Member(sim.machines["n1"].start("mount2", idle), 1, serial=5, ticket=b"B")
        for participant in (a, b):
            await participant.process.call(participant.comm.start("10.0.0.1:0", datagrams=False))
        await a.call(lambda: a.comm.set_peer(b.me, b.comm.address, b"B"))
        await asyncio.sleep(1)
        assert a.changes() == []
        await b.call(lambda: b.comm.set_peer(a.me, a.comm.address, b"A"))
        await asyncio.sleep(1)
        assert [change.peer for change in a.changes() + b.changes()] == [b.me, a.me]
        assert a.told[1:] == b.told[1:] == []

    with Simulation(1) as sim:
        sim.machine(1)
        sim.run(whole(sim))
