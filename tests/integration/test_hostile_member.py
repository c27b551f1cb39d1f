"""A member gone bad: it has a node's own key and certificate, greets like any other, and then speaks wrongly.

Two daemons of a real cluster are called at the address of the third, which has left. What answers there is our own comm
over real TLS; once its session is up, frames are written under it that no correct member sends. The daemon ends that
session with a word (DESIGN 5: a gap or an impossible number is a bug or an enemy with a certificate), counts it, tells
it once, and goes on: same view, same session to the other daemon, bounded memory, no traceback.
"""

import asyncio
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from corral.api.comm import PeerDown, PeerUp
from corral.base.ids import MemberId
from corral.base.time import MILLISECOND
from corral.cli.layout import Layout, make
from corral.cli.localcluster import LocalCluster, ask
from corral.comm.actions import Limits
from corral.comm.engine import PeerStatistics, Statistics
from corral.providers.native_comm import NativeComm
from corral.real import pki
from corral.real.stream import MESSAGE_LIMIT, Stream
from corral.real.world import RealWorld
from corral.wire.frame import ACK, CLOSE, DATA, HEADER, HELLO, MAGIC, PORT_CMAN, PORT_LIFT, VERSION, pack_header

RSS_GROWTH_MAX = 32 << 20
PATIENCE = 20.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Nodes 1 and 2 of three; node 3 has left in order."""
    layout = Layout(tmp_path_factory.mktemp("member") / "c")
    made = LocalCluster(layout, make(layout, 3), lambda _: None)
    try:
        made.up()
        made.stop(3)
        yield made
    finally:
        made.abandon()


class Daemon:
    """What a daemon says of itself."""

    def __init__(self, cluster: LocalCluster, node: int) -> None:
        self._files = cluster.files(node)
        process = cluster.corrald(node)
        assert process is not None, "the daemon lives"
        self.pid = process.pid

    async def ask(self, what: str) -> Any:
        return await ask(str(self._files.socket), what)

    async def comm(self) -> dict[str, Any]:
        return dict(zip(Statistics._fields, (await self.ask("statistics"))["comm"], strict=True))

    async def rejects(self) -> int:
        return int(dict((await self.comm())["rejects"]).get("protocol error in a session", 0))

    async def session_with(self, node: int) -> tuple[int, bool]:
        (peer,) = [PeerStatistics(*peer) for peer in (await self.comm())["peers"] if peer[0][0] == node]
        return peer.session, peer.connected

    def told(self) -> int:
        return self._files.log.read_text().count("comm refused node 3: protocol error in a session")

    def rss(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Enemy:
    """Node 3's place, with its true certificate."""

    def __init__(self, cluster: LocalCluster) -> None:
        config = cluster.config
        self.bugs: list[BaseException] = []
        self.changes: list[PeerUp | PeerDown] = []
        self._address = config.node(3).address
        self._world = RealWorld(
            "/nonexistent",
            pki.load(cluster.layout.pki, 3),
            fatal=lambda error, where: self.bugs.append(error),
        )
        self.comm = NativeComm(
            self._world,
            MemberId(3, time.time_ns() // MILLISECOND, 0),  # every enemy a newer life than the one before
            cluster=config.name,
            cluster_uuid=bytes.fromhex(config.uuid.replace("-", "")),
            limits=Limits.for_detect(config.detect_ns),
        )
        self.comm.watch(self.changes.append)
        self._nodes = {node: config.node(node).address for node in (1, 2)}

    async def start(self) -> None:
        await self.comm.start(self._address)
        for node, address in self._nodes.items():
            self.comm.add_node(node, address)
        await self.until(lambda: self.up(1) and self.up(2))

    async def close(self) -> None:
        self.comm.close()
        await self._world.close()
        assert self.bugs == []

    def of(self, node: int) -> list[PeerUp | PeerDown]:
        return [change for change in self.changes if change.peer.node == node]

    def up(self, node: int) -> bool:
        return bool(self.of(node)) and isinstance(self.of(node)[-1], PeerUp)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    def stream(self, node: int) -> Stream:
        connection = self.comm._connections[self._engine(node).connection]
        assert isinstance(connection, Stream)
        return connection

    def _engine(self, node: int) -> Any:
        return next(session for peer, session in self.comm._up.items() if peer.node == node)

    def session(self, node: int) -> int:
        return int(self._engine(node).session)

    def say(self, *frames: bytes) -> None:
        """To node 1, under its session: what comm knows nothing of."""
        self.stream(1).send(frames)

    def in_order(self, port: int = PORT_CMAN, body: bytes = b"\xc1nonsense") -> bytes:
        """The next DATA frame of this session, as it should be but for its body."""
        frame: bytes = self._engine(1).pack(port, 0, body)
        return frame

    def data(self, sequence: int, *, port: int = PORT_CMAN, body: bytes = b"\xc1nonsense", **changes: int) -> bytes:
        """A DATA frame that would be in order after nothing but others of these; `changes` spoil its header."""
        fields = {
            "magic": MAGIC, "version": VERSION, "kind": DATA, "port": port, "reserved": 0, "length": len(body),
            "round": 0, "sequence": sequence, "ack": 0, "session": self.session(1),
        }  # fmt: skip
        return HEADER.pack(*(fields | changes).values()) + body


Attack = Callable[[Enemy], None]


def flood_of_gaps(enemy: Enemy) -> None:
    enemy.say(*(enemy.data(sequence) for sequence in range(2, 20_000, 2)))


ENDING: dict[str, Attack] = {
    "a gap": lambda enemy: enemy.say(enemy.data(2)),
    "out of order": lambda enemy: enemy.say(enemy.data(1), enemy.data(3), enemy.data(2)),
    "a flood of gaps": flood_of_gaps,
    "sequence 0": lambda enemy: enemy.say(enemy.data(0)),
    "the last sequence there is": lambda enemy: enemy.say(enemy.data(2**64 - 1)),
    "an acknowledgement of what was never sent": lambda enemy: enemy.say(enemy.data(1, ack=2**40)),
    "an ACK of what was never sent": lambda enemy: enemy.say(pack_header(ACK, 0, 0, 0, 2**63, enemy.session(1), 0)),
    "an ACK with a body": lambda enemy: enemy.say(pack_header(ACK, 0, 0, 0, 0, enemy.session(1), 3) + b"abc"),
    "another session": lambda enemy: enemy.say(enemy.data(1, session=enemy.session(1) + 1)),
    "no magic": lambda enemy: enemy.say(enemy.data(1, magic=0)),
    "a later version": lambda enemy: enemy.say(enemy.data(1, version=2)),
    "an unknown kind": lambda enemy: enemy.say(enemy.data(1, kind=77)),
    "a second HELLO": lambda enemy: enemy.say(enemy.data(0, kind=HELLO)),
    "a length that is too long": lambda enemy: enemy.say(enemy.data(1, length=2**32 - 1)),
    "a length that is too short": lambda enemy: enemy.say(enemy.data(1, length=0)),
    "no header": lambda enemy: enemy.say(b"short"),
    "nothing": lambda enemy: enemy.say(b""),
    "a CLOSE of nonsense": lambda enemy: enemy.say(pack_header(CLOSE, 0, 0, 0, 0, enemy.session(1), 2) + b"\xdd\xff"),
    "the longest message, not a frame": lambda enemy: enemy.say(bytes(MESSAGE_LIMIT)),
}  # fmt: skip


async def until_equal(expected: int, ask_again: Callable[[], Any], count: Callable[[Any], int]) -> None:
    """Waits for a counter; it may not pass what is expected."""
    async with asyncio.timeout(PATIENCE):
        while (found := count(await ask_again())) < expected:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert found == expected


def against(cluster: LocalCluster, body: Callable[[Enemy, Daemon], Any]) -> None:
    """Runs `body` with an enemy whose sessions are up, and looks at everything that must not have changed."""

    async def main() -> None:
        one, two = Daemon(cluster, 1), Daemon(cluster, 2)
        epoch = (await one.ask("cman.status"))["epoch"]
        undisturbed = await one.session_with(2)
        before = one.rss()
        enemy = Enemy(cluster)
        try:
            await enemy.start()
            await body(enemy, one)
            assert len(enemy.of(2)) == 1, "its session with the other daemon is another matter"
        finally:
            await enemy.close()
        assert (await one.ask("cman.status"))["epoch"] == epoch
        assert await one.session_with(2) == undisturbed
        assert Daemon(cluster, 1).pid == one.pid
        assert Daemon(cluster, 2).pid == two.pid
        assert one.rss() - before < RSS_GROWTH_MAX
        for node in (1, 2):
            assert "Traceback" not in cluster.files(node).log.read_text()

    uvloop.run(main())


@pytest.mark.parametrize("what", ENDING)
def test_what_no_member_says_ends_its_session_once(cluster: LocalCluster, what: str) -> None:
    async def body(enemy: Enemy, daemon: Daemon) -> None:
        counted, told = await daemon.rejects(), daemon.told()
        ENDING[what](enemy)
        await enemy.until(lambda: len(enemy.of(1)) >= 2)
        down = enemy.of(1)[1]
        assert isinstance(down, PeerDown)
        assert "protocol error" in down.reason, "it is told why"
        assert await daemon.rejects() == counted + 1
        assert daemon.told() == told + 1
        await enemy.until(lambda: enemy.up(1))  # a new session: it may have been a bug, mended since
        enemy.say(enemy.in_order())
        await asyncio.sleep(0.1)
        assert len(enemy.of(1)) == 3, "and it lasts"

    against(cluster, body)


def test_replayed_frames_are_dropped_and_counted(cluster: LocalCluster) -> None:
    """A frame that comes again is what an honest member sends after a reconnect: dropped, and the session goes on."""

    async def body(enemy: Enemy, daemon: Daemon) -> None:
        before = await daemon.comm()
        frames = [enemy.in_order() for _ in range(100)]
        enemy.say(*frames)
        for _ in range(100):
            enemy.say(*frames)
        expected = before["duplicates"] + 10_000
        await until_equal(expected, lambda: daemon.comm(), lambda found: found["duplicates"])
        assert enemy.up(1)
        assert len(enemy.of(1)) == 1

    against(cluster, body)


def test_bodies_that_do_not_decode_are_dropped_and_counted(cluster: LocalCluster) -> None:
    async def body(enemy: Enemy, daemon: Daemon) -> None:
        before = (await daemon.ask("statistics"))["dropped"]
        enemy.say(*(enemy.in_order((PORT_CMAN, PORT_LIFT)[n % 2], b"\x91" * n) for n in range(1, 501)))
        expected = sum(before.values()) + 500
        await until_equal(expected, lambda: daemon.ask("statistics"), lambda found: sum(found["dropped"].values()))
        assert enemy.up(1)
        assert len(enemy.of(1)) == 1

    against(cluster, body)


def test_a_message_longer_than_any_breaks_the_connection_before_it_is_kept(cluster: LocalCluster) -> None:
    async def body(enemy: Enemy, daemon: Daemon) -> None:
        stream = enemy.stream(1)
        assert stream._transport is not None
        stream._transport.write(struct.pack("<I", 2**32 - 1) + bytes(100_000))
        await enemy.until(lambda: stream._closed)
        await enemy.until(lambda: enemy.up(1) and enemy.comm._connections.get(enemy._engine(1).connection) is not None)
        assert enemy.stream(1) is not stream

    against(cluster, body)


def test_messages_that_never_end_are_bounded(cluster: LocalCluster) -> None:
    """The longest that is allowed, all but its last byte, byte by byte at first."""

    async def body(enemy: Enemy, daemon: Daemon) -> None:
        stream = enemy.stream(1)
        transport = stream._transport
        assert transport is not None
        transport.write(struct.pack("<I", MESSAGE_LIMIT))
        for _ in range(2000):
            transport.write(b"\0")
        transport.write(bytes(MESSAGE_LIMIT - 2001))
        await asyncio.sleep(1)

    against(cluster, body)
