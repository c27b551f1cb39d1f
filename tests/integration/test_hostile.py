"""Hostile input at corrald's doors: refused or dropped, counted, told once; never a traceback, never a new view."""

import asyncio
import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.cli import processes
from corral.cli.layout import Layout, make
from corral.cli.localcluster import LocalCluster, ask
from corral.providers.ipc_wire import TO_CORRALD, Ask, Attach
from corral.real import pki

CORRAL = [sys.executable, "-m", "corral.cli.main"]
RSS_GROWTH_MAX = 48 << 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    layout = Layout(tmp_path_factory.mktemp("hostile") / "c")
    made = LocalCluster(layout, make(layout, 3), lambda _: None)
    try:
        made.up()
        yield made
    finally:
        made.abandon()


@pytest.fixture(autouse=True)
def unharmed(cluster: LocalCluster) -> Iterator[None]:
    """Whatever is thrown at it: same view, same processes, bounded memory, no traceback."""
    before = epoch(cluster), rss(cluster, 1)
    yield
    assert epoch(cluster) == before[0]
    assert rss(cluster, 1) - before[1] < RSS_GROWTH_MAX
    for node in cluster.config.node_ids:
        assert "Traceback" not in cluster.files(node).log.read_text()


def epoch(cluster: LocalCluster) -> int:
    return int(asyncio.run(ask(str(cluster.files(1).socket), "cman.status"))["epoch"])


def rss(cluster: LocalCluster, node: int) -> int:
    process = cluster.corrald(node)
    assert process is not None
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def address(cluster: LocalCluster, node: int) -> tuple[str, int]:
    host, _, port = cluster.config.node(node).address.rpartition(":")
    return host, int(port)


def framed(message: bytes) -> bytes:
    return struct.pack("<I", len(message)) + message


GARBAGE = {
    "zeros": bytes(64),
    "an endless message": b"\xff\xff\xff\xff" + bytes(100),
    "noise": random.Random(1).randbytes(4096),
    "a message that is no message": framed(b"\xc1" * 30),
    "a question before the greeting was answered": framed(TO_CORRALD.encode(Ask(1, "cman.status"))),
    "an attachment of a later version": framed(TO_CORRALD.encode(Attach(99, "client"))),
    "an unknown role": framed(TO_CORRALD.encode(Attach(1, "king"))),
    "attached, then noise": framed(TO_CORRALD.encode(Attach(1, "client"))) + framed(random.Random(2).randbytes(100)),
    "attached twice": framed(TO_CORRALD.encode(Attach(1, "client"))) * 2,
}


@pytest.mark.parametrize("door", ["corrald.sock", "lock.sock"])
@pytest.mark.parametrize("what", GARBAGE)
def test_nonsense_on_a_local_socket_ends_that_connection_only(cluster: LocalCluster, door: str, what: str) -> None:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(8)
        caller.connect(str(cluster.files(1).socket.with_name(door)))
        caller.sendall(GARBAGE[what])
        if what == "zeros":
            caller.shutdown(socket.SHUT_WR)
        received = b""
        try:
            while data := caller.recv(65536):
                received += data
        except ConnectionResetError:
            pass
    assert len(received) < 65536


def test_thousands_of_connections_are_refused_and_forgotten(cluster: LocalCluster) -> None:
    kept: list[socket.socket] = []
    try:
        for _ in range(1500):
            caller = socket.socket(socket.AF_UNIX)
            caller.setblocking(False)
            kept.append(caller)
            try:
                caller.connect(str(cluster.files(1).socket))
            except BlockingIOError:
                time.sleep(0.01)
    finally:
        for caller in kept:
            caller.close()
    assert epoch(cluster)


def test_a_caller_that_never_reads_is_disconnected(cluster: LocalCluster) -> None:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(cluster.files(1).socket))
        caller.settimeout(0.5)
        caller.sendall(framed(TO_CORRALD.encode(Attach(1, "client"))))
        question = framed(TO_CORRALD.encode(Ask(1, "timing"))) * 200
        with pytest.raises((BrokenPipeError, ConnectionResetError, TimeoutError)):
            caller.sendall(question * 2000)


def test_noise_in_datagrams_moves_no_heartbeat(cluster: LocalCluster) -> None:
    noise = random.Random(3)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(5000):
            sender.sendto(noise.randbytes(noise.randrange(0, 1400)), address(cluster, 1))


def test_strangers_at_the_network_port_are_refused_and_told_of_once(cluster: LocalCluster, tmp_path: Path) -> None:
    for payload in (b"GET / HTTP/1.0\r\n\r\n", bytes(100), random.Random(4).randbytes(3000)):
        with socket.create_connection(address(cluster, 1), timeout=8) as stranger:
            stranger.sendall(payload)
            try:
                while stranger.recv(65536):
                    pass
            except ConnectionResetError:
                pass
    other = tmp_path / "pki"
    pki.create_authority(other, "elsewhere")
    pki.create_node(other, 2)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(other / "node-2.crt", other / "node-2.key")
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        _greeting(context, address(cluster, 1))
    log = cluster.files(1).log.read_text()
    assert log.count("failed to authenticate") == 1  # the rest are counted


def _greeting(context: ssl.SSLContext, where: tuple[str, int]) -> None:
    """Raises when the other side does not take us: TLS 1.3 tells a client only when it reads."""
    with socket.create_connection(where, timeout=8) as plain, context.wrap_socket(plain) as stranger:
        if not stranger.recv(100):
            raise ConnectionResetError


# --- corrald with the wrong papers ---------------------------------------------------------------------------------


def corrald(*arguments: str) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-m", "corral.corrald", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)


def test_a_corrald_of_a_node_that_does_not_exist_says_which_there_are(cluster: LocalCluster, tmp_path: Path) -> None:
    done = corrald(f"--config={cluster.layout.config}", "--node=9", f"--state={tmp_path / 's'}")
    assert done.returncode == 3
    assert "it has 1, 2, 3" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_corrald_at_an_address_in_use_says_so(cluster: LocalCluster, tmp_path: Path) -> None:
    done = corrald(f"--config={cluster.layout.config}", "--node=1", f"--state={tmp_path / 's'}")
    assert done.returncode == 1
    assert "cannot listen at" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_corrald_with_anothers_certificate_or_none_is_told(cluster: LocalCluster, tmp_path: Path) -> None:
    papers = tmp_path / "pki"
    shutil.copytree(cluster.layout.pki, papers)
    for name in ("crt", "key"):
        shutil.copy(papers / f"node-1.{name}", papers / f"node-2.{name}")
    common = [f"--config={cluster.layout.config}", "--node=2", f"--state={tmp_path / 's'}"]
    for directory in (papers, tmp_path / "nothing"):
        done = corrald(*common, f"--certificates={directory}")
        assert done.returncode in (1, 3)
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("corrald: ")


def test_a_cluster_of_another_name_or_uuid_is_not_joined(cluster: LocalCluster, tmp_path: Path) -> None:
    """Node 2's own certificate, the right addresses, but another cluster: the others never take it for node 2."""
    before = cluster.corrald(2)
    text = cluster.layout.config.read_text()
    host, port = address(cluster, 2)
    elsewhere = tmp_path / "cluster.toml"
    other = text.replace(cluster.config.uuid, "00000000-0000-4000-8000-000000000000")
    elsewhere.write_text(other.replace(f"{host}:{port}", f"{host}:{port + 10_000}"))
    log = tmp_path / "log"
    stranger = processes.spawn(
        [sys.executable, "-m", "corral.corrald", f"--config={elsewhere}", "--node=2", f"--state={tmp_path / 's'}",
         f"--certificates={cluster.layout.pki}", "--no-lock-service"],
        log=log, pid_file=tmp_path / "pid",
    )  # fmt: skip
    try:
        time.sleep(3)
        assert processes.is_alive(stranger) or "Traceback" not in log.read_text()
        assert cluster.corrald(2) == before
    finally:
        processes.kill([stranger])
    assert "Traceback" not in log.read_text()


# --- every sentence of the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("up --nodes 2 --dir {new} --detect nan", 3, "detect is 0.1 to 120 seconds"),
        ("up --nodes 2 --dir /etc", 1, "not empty and holds no cluster"),
        ("gfs mkfs {new} --table aé:b --size 64M", 1, "CLUSTER:NAME"),
        ("gfs mkfs {new} --table a:b --size 1K", 1, "at least 16 MiB"),
        ("gfs mkfs {new} --table a:b --size 12X", 2, "is not a size"),
        ("gfs mkfs /dev/null --table a:b --yes", 1, "neither a block device nor an image"),
        ("gfs fsck /dev/null", 1, "neither a block device nor an image"),
        ("gfs fsck /etc/passwd", 1, "is this a corral filesystem"),
        ("gfs mount {new} {new}", 1, "no corrald answers"),
        ("--socket /etc/passwd cman status", 1, "no corrald answers"),
        ("--socket {socket} fence ack 3", 1, "node 3"),
        ("node kill 9 --dir {dir}", 3, "it has 1, 2, 3"),
        ("status --dir {new}", 1, "there is no cluster"),
    ],
)
def test_the_command_line_answers_with_a_sentence(
    cluster: LocalCluster, tmp_path: Path, arguments: str, status: int, said: str
) -> None:
    names = {"new": tmp_path / "new", "socket": cluster.files(1).socket, "dir": cluster.layout.root}
    argv = [*CORRAL, "--socket=/nonexistent/socket", *arguments.format(**names).split()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL, check=False)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == status
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    ["cman status", "cman groups", "cman timing", "cman history", "fence status", "fence check", "status --dir {dir}"],
)
def test_every_report_is_also_json(cluster: LocalCluster, arguments: str) -> None:
    argv = [*CORRAL, f"--socket={cluster.files(1).socket}", *arguments.format(dir=cluster.layout.root).split()]
    done = subprocess.run([*argv, "--json"], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.lstrip()[0] in "[{"
