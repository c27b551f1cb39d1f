"""Unix sockets of the real World: who calls, who may call, and what becomes of a dead daemon's socket."""

import asyncio
import os
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from corral.real import local as locals_
from tests.unit.real.support import Acceptor, Bench, Recorder, eventually, on_loop


def test_the_kernel_says_who_calls_and_who_answers(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        acceptor = Acceptor()
        path = bench.path("sock")
        await bench.world().local.listen(path, acceptor)
        handler = Recorder()
        connection = await bench.world().local.connect(path, handler)
        me = (os.getpid(), os.getuid(), os.getgid())
        assert connection.credentials == me
        assert acceptor.connections[0].credentials == me
        assert connection.node is None
        connection.send([b"up", b""])
        assert await acceptor.handlers[0].wait_messages(2) == [b"up", b""]
        acceptor.connections[0].send([b"down"])
        assert await handler.wait_messages(1) == [b"down"]
        connection.close()
        assert await acceptor.handlers[0].wait_broken() == "closed by the peer"

    on_loop(tmp_path, body)


def test_the_socket_is_for_owner_and_group(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        mask = os.umask(0)
        try:
            await bench.world().local.listen(bench.path("sock"), Acceptor())
        finally:
            os.umask(mask)
        assert stat.S_IMODE(os.stat(bench.path("sock")).st_mode) == 0o660

    on_loop(tmp_path, body)


CALLER = """
import socket, sys
sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1]); sock.recv(100); sys.stdin.read()
"""


def test_kill_9_of_the_caller_breaks_the_stream(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        acceptor = Acceptor()
        await bench.world().local.listen(bench.path("sock"), acceptor)
        with subprocess.Popen([sys.executable, "-c", CALLER, bench.path("sock")], stdin=subprocess.PIPE) as child:  # noqa: ASYNC220
            await eventually(lambda: bool(acceptor.connections))
            assert acceptor.connections[0].credentials.pid == child.pid
            child.kill()
        assert await acceptor.handlers[0].wait_broken() == "closed by the peer"

    on_loop(tmp_path, body)


def test_a_socket_that_answers_is_not_replaced(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        path = bench.path("sock")
        acceptor = Acceptor()
        first = await bench.world().local.listen(path, acceptor)
        with pytest.raises(OSError, match=r"a process already answers on .*: stop it first"):
            await bench.world().local.listen(path, Acceptor())
        connection = await bench.world().local.connect(path, Recorder())
        assert connection.credentials is not None
        first.close()
        assert not os.path.exists(path)  # noqa: ASYNC240
        await bench.world().local.listen(path, Acceptor())

    on_loop(tmp_path, body)


def test_a_dead_daemons_socket_is_replaced(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        path = bench.path("sock")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        with pytest.raises(ConnectionRefusedError):
            await bench.world().local.connect(path, Recorder())
        acceptor = Acceptor()
        await bench.world().local.listen(path, acceptor)
        await bench.world().local.connect(path, Recorder())
        assert len(acceptor.connections) == 1

    on_loop(tmp_path, body)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        (tmp_path / "sock").write_text("precious")
        with pytest.raises(FileExistsError, match="is not a socket: remove it"):
            await bench.world().local.listen(bench.path("sock"), Acceptor())
        assert (tmp_path / "sock").read_text() == "precious"

    on_loop(tmp_path, body)


def test_of_many_starters_on_a_stale_socket_exactly_one_wins(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        path = bench.path("sock")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        worlds = [bench.world() for _ in range(8)]
        results = await asyncio.gather(
            *(world.local.listen(path, Acceptor()) for world in worlds), return_exceptions=True
        )
        assert sorted(isinstance(result, OSError) for result in results) == [False] + [True] * 7

    on_loop(tmp_path, body)


def test_closing_late_does_not_remove_the_successors_socket(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        path = bench.path("sock")
        old = await bench.world().local.listen(path, Acceptor())
        os.unlink(path)
        acceptor = Acceptor()
        await bench.world().local.listen(path, acceptor)
        old.close()
        await bench.world().local.connect(path, Recorder())
        assert len(acceptor.connections) == 1

    on_loop(tmp_path, body)


def test_a_path_longer_than_a_unix_address_works(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90) / ("e" * 90)
    deep.mkdir(parents=True)

    async def body(bench: Bench) -> None:
        acceptor = Acceptor()
        path = str(deep / "corrald.sock")
        listener = await bench.world().local.listen(path, acceptor)
        with pytest.raises(OSError, match="already answers"):
            await bench.world().local.listen(path, Acceptor())
        assert (await bench.world().local.connect(path, Recorder())).credentials is not None
        listener.close()
        assert not os.path.exists(path)  # noqa: ASYNC240

    on_loop(tmp_path, body)


@pytest.mark.parametrize(("prepare", "error"), [("nothing", FileNotFoundError), ("file", ConnectionRefusedError)])
def test_nobody_there_is_told_by_type_and_name(tmp_path: Path, prepare: str, error: type[OSError]) -> None:
    async def body(bench: Bench) -> None:
        if prepare == "file":
            (tmp_path / "sock").write_text("")
        with pytest.raises(error, match="sock"):
            await bench.world().local.connect(bench.path("sock"), Recorder())

    on_loop(tmp_path, body)


def test_a_listener_that_never_greets_is_a_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locals_, "GREETING_SECONDS", 0.1)

    async def body(bench: Bench) -> None:
        with socket.socket(socket.AF_UNIX) as stopped:
            stopped.bind(bench.path("sock"))
            stopped.listen(1)
            with pytest.raises(TimeoutError, match=r"did not answer within .*: is its process stopped"):
                await bench.world().local.connect(bench.path("sock"), Recorder())

    on_loop(tmp_path, body)


def test_another_program_on_the_path_is_an_error(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(struct.pack("<I", 5) + b"hello")
            writer.close()

        server = await asyncio.start_unix_server(stranger, bench.path("sock"))
        with pytest.raises(ConnectionAbortedError, match="does not speak corral's protocol"):
            await bench.world().local.connect(bench.path("sock"), Recorder())
        server.close()

    on_loop(tmp_path, body)


def test_garbage_breaks_only_its_stream(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        acceptor = Acceptor()
        await bench.world().local.listen(bench.path("sock"), acceptor)
        good = Recorder()
        await bench.world().local.connect(bench.path("sock"), good)
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(bench.path("sock"))
            rude.send(b"GET / HTTP/1.1\r\n\r\n")
            await eventually(lambda: len(acceptor.handlers) == 2)
            assert "bytes, more than" in await acceptor.handlers[1].wait_broken()
        assert good.breaks == []
        assert acceptor.handlers[0].breaks == []

    on_loop(tmp_path, body)


def test_connections_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locals_, "CONNECTIONS_MAX", 3)

    async def body(bench: Bench) -> None:
        acceptor = Acceptor()
        server = bench.world()
        await server.local.listen(bench.path("sock"), acceptor)
        for _ in range(3):
            await bench.world().local.connect(bench.path("sock"), Recorder())
        with pytest.raises(ConnectionError):
            await bench.world().local.connect(bench.path("sock"), Recorder())
        assert len(acceptor.connections) == 3
        assert server.local.refused == 1

    on_loop(tmp_path, body)


def test_a_connect_cancelled_at_any_moment_leaves_nothing(tmp_path: Path) -> None:
    """After 0, 1, 2 ... loop turns, until it had been connected before."""

    async def body(bench: Bench) -> None:
        acceptor = Acceptor()
        server, client = bench.world(1), bench.world(2)
        listener = await server.network.listen("127.0.0.1:0", acceptor)
        await server.local.listen(bench.path("sock"), acceptor)
        for make in (
            lambda: client.local.connect(bench.path("sock"), Recorder()),
            lambda: client.network.connect(listener.address, 1, Recorder()),
        ):
            for turns in range(400):
                connecting = asyncio.ensure_future(make())
                for _ in range(turns):
                    if connecting.done():
                        break
                    await asyncio.sleep(0)
                if connecting.done():
                    (await connecting).close()
                    break
                connecting.cancel()
                await asyncio.gather(connecting, return_exceptions=True)
            assert connecting.done()
            assert not connecting.cancelled(), "the loop reached the end"
            await eventually(lambda: not server.local.open_streams and not client.local.open_streams)
            await eventually(lambda: not server.network.open_streams and not client.network.open_streams)

    on_loop(tmp_path, body)
