"""TLS connections and datagrams of the real World: what honest nodes get, and what everybody else gets."""

import asyncio
import contextlib
import logging
import os
import resource
import socket
import ssl
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.base.world import Connection
from corral.real import network as networks
from corral.real import pki
from corral.real.identity import Credentials
from corral.real.network import TlsListener
from corral.real.stream import MESSAGE_LIMIT
from corral.real.world import RealWorld
from tests.unit.real.support import Acceptor, Bench, Recorder, authority, credentials, eventually, on_loop

ANY = "127.0.0.1:0"


class Pair:
    """Node 1 listens, node 2 is connected to it."""

    def __init__(self) -> None:
        self.acceptor = Acceptor()
        self.handler = Recorder()
        self.server: RealWorld
        self.client: RealWorld
        self.listener: TlsListener
        self.connection: Connection

    @property
    def accepted(self) -> Any:
        return self.acceptor.connections[0]

    @property
    def accepted_handler(self) -> Recorder:
        return self.acceptor.handlers[0]


async def pair(bench: Bench) -> Pair:
    made = Pair()
    made.server, made.client = bench.world(1), bench.world(2)
    made.listener = await made.server.network.listen(ANY, made.acceptor)  # type: ignore[assignment]
    made.connection = await made.client.network.connect(made.listener.address, 1, made.handler)
    return made


# --- honest nodes ----------------------------------------------------------------------------------------------------


def test_both_sides_know_whom_they_talk_to(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        made = await pair(bench)
        assert made.connection.node == 1
        assert made.accepted.node == 2
        assert made.connection.credentials is None

    on_loop(tmp_path, body)


def test_messages_of_all_sizes_arrive_whole_and_in_order_both_ways(tmp_path: Path) -> None:
    sizes = (0, 1, 100, 16_384, 65_536, 300_000, MESSAGE_LIMIT, 3)

    async def body(bench: Bench) -> None:
        made = await pair(bench)
        messages = [bytes([index]) * size for index, size in enumerate(sizes)]
        for message in messages:
            made.connection.send([message])
            made.accepted.send([message])
        assert await made.handler.wait_messages(len(sizes)) == messages
        assert await made.accepted_handler.wait_messages(len(sizes)) == messages
        assert made.connection.pending == 0

    on_loop(tmp_path, body)


def test_pending_counts_what_a_peer_that_does_not_read_leaves_here(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        made = await pair(bench)
        made.accepted._transport.pause_reading()
        for _ in range(8):
            made.connection.send([bytes(MESSAGE_LIMIT)])
            await asyncio.sleep(0.01)
        assert made.connection.pending > 2 * MESSAGE_LIMIT
        made.accepted._transport.resume_reading()
        await made.accepted_handler.wait_messages(8)
        await eventually(lambda: made.connection.pending == 0)

    on_loop(tmp_path, body)


def test_what_was_sent_before_close_arrives_and_both_sides_break_once(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        made = await pair(bench)
        made.connection.send([b"last"])
        made.connection.close()
        made.connection.close()
        assert await made.accepted_handler.wait_broken() == "closed by the peer"
        assert await made.handler.wait_broken() == "closed by this side"
        await asyncio.sleep(0.05)
        assert made.accepted_handler.messages == [b"last"]
        assert (len(made.handler.breaks), len(made.accepted_handler.breaks)) == (1, 1)
        made.accepted.send([b"ignored"])

    on_loop(tmp_path, body)


def test_nobody_listening_is_refused(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        made = await pair(bench)
        address = made.listener.address
        made.listener.close()
        with pytest.raises(ConnectionRefusedError, match=f"nobody listens on {address}"):
            await made.client.network.connect(address, 1, Recorder())
        assert made.handler.breaks == [], "closing the listener breaks no connection"

    on_loop(tmp_path, body)


def test_a_peer_that_is_another_node_is_an_error_but_not_a_refusal(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        made = await pair(bench)
        with pytest.raises(ConnectionAbortedError, match=r"is node 1, not node 3: check the addresses"):
            await made.client.network.connect(made.listener.address, 3, Recorder())

    on_loop(tmp_path, body)


def test_without_credentials_there_are_no_connections(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        world = bench.world()
        with pytest.raises(OSError, match="no certificate"):
            await world.network.listen(ANY, Acceptor())
        with pytest.raises(OSError, match="no certificate"):
            await world.network.connect(ANY, 1, Recorder())

    on_loop(tmp_path, body)


def test_a_taken_address_is_a_sentence(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        made = await pair(bench)
        with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use"):
            await made.client.network.listen(made.listener.address, Acceptor())

    on_loop(tmp_path, body)


# --- strangers before the handshake ends -----------------------------------------------------------------------------


def attacked(tmp_path: Path, attack: Callable[[str], None], check: Callable[[RealWorld], None]) -> None:
    """Lets `attack(address)` loose on node 1 in a thread, then checks. Nothing of it may reach `accept`, everything it
    cost must be given back, and an honest node must still get in."""

    async def body(bench: Bench) -> None:
        world, acceptor = bench.world(1), Acceptor()
        listener = await world.network.listen(ANY, acceptor)
        (await bench.world(3).network.connect(listener.address, 1, Recorder())).close()
        await eventually(lambda: bool(acceptor.handlers and acceptor.handlers[0].breaks))
        acceptor.connections.clear()
        await eventually(lambda: not world.network.open_streams)
        before = len(os.listdir("/proc/self/fd"))
        await asyncio.to_thread(attack, listener.address)
        assert isinstance(listener, TlsListener)
        await eventually(lambda: not listener._half_open and not world.network.open_streams)
        await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)
        assert acceptor.connections == []
        check(world)
        await bench.world(2).network.connect(listener.address, 1, Recorder())
        await eventually(lambda: len(acceptor.connections) == 1)

    on_loop(tmp_path, body)


def tls_attack(context: ssl.SSLContext | None = None, payload: bytes = b"") -> Callable[[str], None]:
    """Connects with TLS and this context, sends, and waits until the other side ends it."""

    def attack(address: str) -> None:
        host, port = address.split(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 10) as plain:
            used = context or ssl._create_unverified_context()
            with used.wrap_socket(plain, server_hostname=None if context else host) as secure:
                secure.sendall(payload)
                while secure.recv(4096):
                    pass

    return attack


def plain_attack(payload: bytes) -> Callable[[str], None]:
    def attack(address: str) -> None:
        host, port = address.split(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 10) as plain:
            plain.sendall(payload)
            while plain.recv(4096):
                pass

    return attack


def old_tls() -> ssl.SSLContext:
    """A node's own certificate, but TLS 1.2."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    home = authority("home")
    context.load_cert_chain(f"{home}/node-2.crt", f"{home}/node-2.key")
    return context


def gullible(identity: Credentials) -> ssl.SSLContext:
    """Shows its own certificate and believes everybody's."""
    identity.client_context.verify_mode = ssl.CERT_NONE
    return identity.client_context


HELLO_WITHOUT_END = b"\x16\x03\x01\x40\x00" + bytes(100)


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (plain_attack(b"GET / HTTP/1.0\r\n\r\n"), "http request"),
        (plain_attack(bytes(range(256)) * 64), "only nodes with a certificate"),
        (plain_attack(struct.pack("<I", 5) + b"hello"), "only nodes with a certificate"),
        (tls_attack(), "peer did not return a certificate"),
        (tls_attack(old_tls()), "unsupported protocol"),
        (tls_attack(gullible(credentials(2, "home", 1))), "made with this cluster's CA"),
        (tls_attack(gullible(credentials(2, "other"))), "made with this cluster's CA"),
    ],
    ids=["http", "garbage", "plaintext frames", "no certificate", "TLS 1.2", "another CA", "another cluster"],
)
def test_who_cannot_authenticate_is_counted_and_named_and_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, attack: Callable[[str], None], said: str
) -> None:
    caplog.set_level(logging.WARNING, "corral.network")

    def check(world: RealWorld) -> None:
        assert world.network.counters.handshakes_failed == 1
        assert len(caplog.messages) == 1
        assert "127.0.0.1 failed to authenticate" in caplog.messages[0]
        assert said in caplog.messages[0]

    attacked(tmp_path, attack, check)


def test_a_certificate_of_our_ca_for_another_cluster_is_a_stranger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when two clusters share a CA: the signature is good, the name is not."""
    caplog.set_level(logging.WARNING, "corral.network")
    monkeypatch.setattr(pki, "_cluster_of", lambda *_: "neighbours")
    pki.create_node(authority("home"), 9)
    monkeypatch.undo()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    home = authority("home")
    context.load_cert_chain(f"{home}/node-9.crt", f"{home}/node-9.key")

    def check(world: RealWorld) -> None:
        assert world.network.counters.strangers == 1
        assert "does not name a node of cluster 'home'" in caplog.messages[0]

    try:
        attacked(tmp_path, tls_attack(context), check)
    finally:
        for suffix in ("crt", "key"):
            os.unlink(f"{home}/node-9.{suffix}")


def test_a_thousand_failures_of_one_source_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "corral.network")

    def attack(address: str) -> None:
        for _ in range(100):
            plain_attack(b"nonsense, and enough of it to be read as a TLS record\n")(address)

    def check(world: RealWorld) -> None:
        assert world.network.counters.handshakes_failed == 100
        assert len(caplog.messages) == 1

    attacked(tmp_path, attack, check)


def test_who_begins_a_handshake_and_stops_is_dropped_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "HANDSHAKE_SECONDS", 0.5)

    def check(world: RealWorld) -> None:
        assert world.network.counters.handshakes_failed == 2
        monkeypatch.undo()

    def attack(address: str) -> None:
        plain_attack(HELLO_WITHOUT_END)(address)
        plain_attack(b"")(address)

    attacked(tmp_path, attack, check)


def test_held_places_give_way_to_honest_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow loris: more unfinished handshakes than there are places, held open; the honest node gets in all the same."""

    async def body(bench: Bench) -> None:
        world, acceptor = bench.world(1), Acceptor()
        listener = await world.network.listen(ANY, acceptor)
        assert isinstance(listener, TlsListener)
        host, port = listener.address.split(":")
        with contextlib.ExitStack() as held:
            for number in range(networks.HALF_OPEN_MAX + 40):
                sock = held.enter_context(socket.socket())
                sock.setblocking(False)
                await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
                with contextlib.suppress(OSError):
                    sock.send(HELLO_WITHOUT_END)
                assert len(listener._half_open) <= networks.HALF_OPEN_MAX, number
            await eventually(lambda: world.network.counters.half_open_dropped >= 40)
            await bench.world(2).network.connect(listener.address, 1, Recorder())
            await eventually(lambda: len(acceptor.connections) == 1)
        await eventually(lambda: not listener._half_open)

    on_loop(tmp_path, body)


def test_a_client_refuses_a_server_of_another_ca(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        acceptor = Acceptor()
        impostor = bench.world(identity=credentials(1, "home", 1))
        listener = await impostor.network.listen(ANY, acceptor)
        with pytest.raises(ConnectionAbortedError, match="its certificate is not from our cluster's CA"):
            await bench.world(2).network.connect(listener.address, 1, Recorder())
        assert acceptor.connections == []

    on_loop(tmp_path, body)


def test_a_server_that_never_answers_is_a_timeout_not_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "HANDSHAKE_SECONDS", 0.2)

    async def body(bench: Bench) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises(TimeoutError, match="did not answer within"):
                await bench.world(2).network.connect(address, 1, Recorder())

    on_loop(tmp_path, body)


def test_a_client_that_the_server_refuses_learns_it_from_connect(tmp_path: Path) -> None:
    """In TLS 1.3 the client's handshake ends before the server has judged its certificate: the greeting closes that."""

    async def body(bench: Bench) -> None:
        acceptor = Acceptor()
        listener = await bench.world(1).network.listen(ANY, acceptor)
        wrong = credentials(2, "home", 1)
        wrong.client_context.verify_mode = ssl.CERT_NONE
        handler = Recorder()
        with pytest.raises(ConnectionAbortedError, match="its log says why"):
            await bench.world(identity=wrong).network.connect(listener.address, 1, handler)
        assert acceptor.connections == []
        assert handler.breaks == []

    on_loop(tmp_path, body)


# --- authenticated, but hostile --------------------------------------------------------------------------------------


def test_an_oversize_message_breaks_only_its_connection(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        made = await pair(bench)
        other = Recorder()
        await bench.world(3).network.connect(made.listener.address, 1, other)
        made.connection._transport.write(struct.pack("<I", 0xFFFFFFFF) + b"x")  # type: ignore[attr-defined]
        assert "4294967295 bytes" in await made.accepted_handler.wait_broken()
        await made.handler.wait_broken()
        assert other.breaks == []

    on_loop(tmp_path, body)


def test_a_killed_peer_breaks_the_connection(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        made = await pair(bench)
        made.connection.drop()  # type: ignore[attr-defined]
        assert await made.accepted_handler.wait_broken()
        assert made.accepted_handler.messages == []

    on_loop(tmp_path, body)


# --- datagrams -------------------------------------------------------------------------------------------------------


def test_datagrams_bring_their_senders_address(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        got: list[tuple[str, bytes]] = []
        first = await bench.world().network.datagrams(ANY, lambda address, payload: got.append((address, payload)))
        second = await bench.world().network.datagrams(ANY, lambda address, payload: got.append((address, payload)))
        second.send(first.address, b"to first")
        await eventually(lambda: len(got) == 1)
        assert got == [(second.address, b"to first")]
        first.send(got[0][0], b"back")
        await eventually(lambda: len(got) == 2)
        assert got[1] == (first.address, b"back")

    on_loop(tmp_path, body)


def test_sending_a_datagram_never_raises_and_counts_the_loss(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        world = bench.world()
        sender = await world.network.datagrams(ANY, lambda address, payload: None)
        for address in ("127.0.0.1:1", "127.0.0.1:1", "no such thing", "[::1]:9", "255.255.255.255:9", ""):
            sender.send(address, b"x")
        sender.send("127.0.0.1:9", bytes(70_000))
        sender.close()
        sender.send("127.0.0.1:9", b"closed")
        assert world.network.counters.datagrams_dropped >= 4

    on_loop(tmp_path, body)


def test_host_names_are_looked_up_without_stopping_the_loop(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        got: list[bytes] = []
        target = await bench.world().network.datagrams(ANY, lambda address, payload: got.append(payload))
        sender = await bench.world().network.datagrams(ANY, lambda address, payload: None)
        name = f"localhost:{target.address.split(':')[1]}"

        def arrived() -> bool:
            sender.send(name, b"x")
            return bool(got)

        await eventually(arrived)

    on_loop(tmp_path, body)


# --- no descriptors left ---------------------------------------------------------------------------------------------


def test_without_descriptors_callers_wait_and_are_served_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """accept fails with EMFILE: it is said once, the loop does not spin on it, and the caller gets in afterwards."""
    caplog.set_level(logging.WARNING, "corral.network")

    async def body(bench: Bench) -> None:
        world = bench.world(1)
        listener = await world.network.listen(ANY, Acceptor())
        await bench.world(2).network.connect(listener.address, 1, Recorder())  # everything is imported and open
        host, port = listener.address.split(":")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as caller:
            caller.setblocking(False)
            resource.setrlimit(resource.RLIMIT_NOFILE, (caller.fileno(), hard))
            try:
                with contextlib.suppress(BlockingIOError):
                    caller.connect((host, int(port)))
                await eventually(lambda: world.network.counters.accepts_failed > 0)
                await asyncio.sleep(0.1)
                assert world.network.counters.accepts_failed == 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert "raise the limit of open files" in caplog.text
            assert isinstance(listener, TlsListener)
            await eventually(lambda: len(listener._half_open) == 1)

    on_loop(tmp_path, body)
