"""NativeComm over real TLS and UDP on the loopback: two nodes, broken connections, a stopped listener, an enemy."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from corral.api.comm import PeerDown, PeerUp
from corral.base.ids import MemberId
from corral.base.time import SECOND
from corral.base.world import Connection
from corral.comm.actions import Rejected
from corral.providers.native_comm import Limits, NativeComm
from corral.real.world import RealWorld
from tests.unit.comm.rig import hello
from tests.unit.real.support import Bench, Recorder, eventually, on_loop

PORT = 64
UUID = bytes(range(16))
ANY = "127.0.0.1:0"


class Member:
    """One node's comm, and all it was told, in order."""

    def __init__(self, bench: Bench, node: int, incarnation: int = 1) -> None:
        self.world: RealWorld = bench.world(node)
        self.me = MemberId(node, incarnation, 0)
        self.told: list[Any] = []
        self.beats: list[tuple[MemberId, bytes]] = []
        self.comm = NativeComm(
            self.world,
            self.me,
            cluster="testers",
            cluster_uuid=UUID,
            limits=Limits.for_detect(2 * SECOND),
            rejected=self.told.append,
        )
        self.comm.watch(self.told.append)
        self.comm.listen(PORT, lambda peer, round_id, payloads: self.told.append((peer, round_id, payloads)))
        self.comm.listen_datagrams(lambda peer, payload: self.beats.append((peer, payload)))

    def payloads(self) -> list[bytes]:
        return [payload for event in self.told if type(event) is tuple for payload in event[2]]

    def changes(self) -> list[PeerUp | PeerDown]:
        return [event for event in self.told if isinstance(event, PeerUp | PeerDown)]


async def together(one: Member, other: Member) -> None:
    for member in (one, other):
        await member.comm.start(ANY)
    one.comm.add_node(other.me.node, other.comm.address)
    other.comm.add_node(one.me.node, one.comm.address)
    await eventually(lambda: len(one.changes()) == len(other.changes()) == 1)


def two(tmp_path: Path, body: Callable[[Bench, Member, Member], Coroutine[Any, Any, None]]) -> None:
    async def whole(bench: Bench) -> None:
        one, other = Member(bench, 1), Member(bench, 2)
        await together(one, other)
        try:
            await body(bench, one, other)
        finally:
            one.comm.close()
            other.comm.close()

    on_loop(tmp_path, whole)


def reset(member: Member) -> None:
    """Breaks the member's connections under it, as a network would."""
    for stream in list(member.world.network.open_streams):
        stream._transport.abort()  # type: ignore[union-attr]


def test_messages_of_all_sizes_and_datagrams_arrive_both_ways(tmp_path: Path) -> None:
    async def body(_: Bench, one: Member, other: Member) -> None:
        sent = [bytes([n]) * size for n, size in enumerate((0, 1, 100, 5_000, 70_000, 1_000_000, 4 << 20, 2))]
        for payload in sent:
            one.comm.send(other.me, PORT, 3, payload)
            other.comm.send(one.me, PORT, 4, payload)
        one.comm.datagram(other.me, b"beat")
        await eventually(lambda: len(one.payloads()) == len(other.payloads()) == len(sent))
        assert one.payloads() == other.payloads() == sent
        await eventually(lambda: other.beats == [(one.me, b"beat")])
        await eventually(lambda: one.comm.statistics().peers[0].queued_frames == 0)

    two(tmp_path, body)


def test_broken_connections_lose_and_double_nothing(tmp_path: Path) -> None:
    async def body(_: Bench, one: Member, other: Member) -> None:
        for number in range(300):
            one.comm.send(other.me, PORT, 1, b"%d" % number)
            other.comm.send(one.me, PORT, 1, b"%d" % number)
            if number % 30 == 15:
                reset(one if number % 60 == 15 else other)
            if number % 10 == 0:
                await asyncio.sleep(0.01)
        expected = [b"%d" % number for number in range(300)]
        await eventually(lambda: len(one.payloads()) >= 300 and len(other.payloads()) >= 300)
        assert one.payloads() == other.payloads() == expected
        assert len(one.changes()) == len(other.changes()) == 1

    two(tmp_path, body)


def test_whoever_stops_listening_is_down_at_once_and_its_successor_comes_up(tmp_path: Path) -> None:
    async def body(bench: Bench, one: Member, other: Member) -> None:
        address = other.comm.address
        assert other.comm._listener is not None
        other.comm._listener.close()  # what a dying process's kernel does
        reset(other)
        await eventually(lambda: len(one.changes()) == 2)
        down = one.changes()[1]
        assert isinstance(down, PeerDown)
        assert down.refused
        other.comm.close()
        again = Member(bench, 2, incarnation=2)
        await again.comm.start(address)
        again.comm.add_node(1, one.comm.address)
        await eventually(lambda: len(one.changes()) == 3)
        assert one.changes()[2].peer == again.me
        again.comm.close()

    two(tmp_path, body)


def test_a_neighbour_with_a_certificate_of_its_own_gets_nowhere(tmp_path: Path) -> None:
    async def body(bench: Bench, one: Member, other: Member) -> None:
        enemy = bench.world(3)
        handlers: list[Recorder] = []

        async def say(message: bytes) -> Connection:
            handlers.append(Recorder())
            connection = await enemy.network.connect(one.comm.address, 1, handlers[-1])
            connection.send([message])
            await handlers[-1].wait_broken()
            return connection

        await say(b"nonsense")
        await say(hello(MemberId(3, 1, 0), one.me))
        await say(hello(other.me._replace(incarnation=99), one.me))  # names a node that is not its certificate's
        await say(hello(MemberId(3, 1, 0), one.me, cluster="elsewhere"))
        sock = await enemy.network.datagrams(ANY, lambda address, payload: None)
        sealed = other.comm._engine.seal(one.me, b"beat")
        assert sealed is not None
        forged = sealed[1][:-1] + bytes([sealed[1][-1] ^ 1])
        for datagram in (b"", b"nonsense", bytes(40), bytes(60_000), forged):
            sock.send(one.comm.address, datagram)
        await eventually(lambda: sum(isinstance(event, Rejected) for event in one.told) >= 5)
        assert one.changes() == [PeerUp(other.me, one.changes()[0].session)]
        assert one.beats == []
        rejects = dict(one.comm.statistics().rejects)
        assert rejects["malformed hello"] == 1
        assert rejects["hello with member id does not fit the certificate"] == 1
        assert rejects["hello with another cluster"] == 1
        assert rejects["datagram forged"] == 1
        assert one.comm.statistics().guests == 0
        one.comm.send(other.me, PORT, 1, b"undisturbed")
        await eventually(lambda: other.payloads() == [b"undisturbed"])

    two(tmp_path, body)
