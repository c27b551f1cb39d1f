"""The floor under every figure of a remote operation: one small message there and back between two processes.

Four ways, one message outstanding: bare TLS (a uvloop Protocol and nothing of ours), the World's connection, the
World's local socket, and datagrams. Wall-clock time per round trip (p50, p99) and CPU µs per round trip of both
processes together. Other benches import `measure` so that their ratios come from the same run.

    python bench/echo.py [--rounds 20000] [--size 64] [--json FILE]
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from corral.real import pki
from corral.real.world import RealWorld

WARM_UP = 500
CLUSTER = "bench"


class Result(dict[str, float]):
    """p50_us, p99_us, cpu_us (client and server together, per round trip), per_second."""


class Clock:
    """Times round trips: `turn` is called when an answer came and says whether to send again."""

    def __init__(self, rounds: int) -> None:
        self.done = asyncio.get_running_loop().create_future()
        self._left = rounds + WARM_UP
        self._rounds = rounds
        self._spans: list[int] = []
        self._sent = 0
        self._cpu = 0.0

    def send(self) -> None:
        self._sent = time.perf_counter_ns()

    def turn(self) -> bool:
        self._spans.append(time.perf_counter_ns() - self._sent)
        self._left -= 1
        if self._left == self._rounds:
            self._spans.clear()
            self._cpu = cpu_seconds()
            self.begun = time.perf_counter()
        if self._left:
            return True
        self.wall = time.perf_counter() - self.begun
        self.cpu = cpu_seconds() - self._cpu
        self.done.set_result(None)
        return False

    def result(self, server_cpu: float) -> Result:
        spans = sorted(self._spans)
        return Result(
            p50_us=spans[len(spans) // 2] / 1000,
            p99_us=spans[len(spans) * 99 // 100] / 1000,
            cpu_us=(self.cpu + server_cpu) / self._rounds * 1e6,
            per_second=self._rounds / self.wall,
        )


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# --- bare TLS --------------------------------------------------------------------------------------------------------


class BareServer(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.write = transport.write

    def data_received(self, data: bytes) -> None:
        self.write(data)


class BareClient(BareServer):
    def __init__(self, clock: Clock, payload: bytes) -> None:
        self._clock = clock
        self._payload = payload
        self._missing = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._send()

    def _send(self) -> None:
        self._missing = len(self._payload)
        self._clock.send()
        self.write(self._payload)

    def data_received(self, data: bytes) -> None:
        self._missing -= len(data)
        if not self._missing and self._clock.turn():
            self._send()


async def bare_client(clock: Clock, payload: bytes, address: str, home: str) -> None:
    host, port = address.split(":")
    context = pki.load(home, 2).client_context
    transport, _ = await asyncio.get_running_loop().create_connection(
        lambda: BareClient(clock, payload), host, int(port), ssl=context, server_hostname=""
    )
    await clock.done
    transport.abort()


# --- the World's ways ------------------------------------------------------------------------------------------------


class Echo:
    """A ConnectionHandler that sends everything back."""

    def __init__(self, connection: Any) -> None:
        self._send = connection.send

    def received(self, messages: list[bytes]) -> None:
        self._send(messages)

    def broken(self, reason: str) -> None:
        pass


class Caller:
    """A ConnectionHandler that times answers."""

    def __init__(self, clock: Clock, payload: bytes) -> None:
        self._clock = clock
        self._messages = [payload]
        self.connection: Any = None

    def start(self) -> None:
        self._clock.send()
        self.connection.send(self._messages)

    def received(self, messages: list[bytes]) -> None:
        if self._clock.turn():
            self.start()

    def broken(self, reason: str) -> None:
        if not self._clock.done.done():
            self._clock.done.set_exception(ConnectionError(reason))


async def world_client(clock: Clock, payload: bytes, way: str, address: str, home: str) -> None:
    world = RealWorld(home, pki.load(home, 2))
    try:
        if way == "datagram":

            def deliver(_: str, answer: bytes) -> None:
                if clock.turn():
                    send()

            sock = await world.network.datagrams("127.0.0.1:0", deliver)

            def send() -> None:
                clock.send()
                sock.send(address, payload)

            send()
        else:
            caller = Caller(clock, payload)
            if way == "local":
                caller.connection = await world.local.connect(address, caller)
            else:
                caller.connection = await world.network.connect(address, 1, caller)
            caller.start()
        async with asyncio.timeout(120):
            await clock.done
    finally:
        await world.close()


# --- the other process -----------------------------------------------------------------------------------------------


async def serve(way: str, home: str) -> None:
    """Prints its address, echoes until its input is closed, answers each line of input with its CPU seconds so far."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def asked() -> None:
        if os.read(0, 1):
            print(cpu_seconds(), flush=True)
        elif not ended.done():
            ended.set_result(None)

    loop.add_reader(0, asked)
    world = RealWorld(home, pki.load(home, 1))
    if way == "bare":
        context: ssl.SSLContext = pki.load(home, 1).server_context
        server = await loop.create_server(BareServer, "127.0.0.1", 0, ssl=context)
        print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    elif way == "world":
        print((await world.network.listen("127.0.0.1:0", Echo)).address, flush=True)
    elif way == "local":
        print((await world.local.listen(f"{home}/sock", Echo)).address, flush=True)
    else:
        sock = await world.network.datagrams("127.0.0.1:0", lambda address, payload: sock.send(address, payload))
        print(sock.address, flush=True)
    await ended
    await world.close()


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(way: str, rounds: int = 20_000, size: int = 64) -> Result:
    """`way`: bare, world, local or datagram."""
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as home:
        pki.create_authority(home, CLUSTER)
        for node in (1, 2):
            pki.create_node(home, node)
        command = [sys.executable, __file__, "--serve", way, home]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            try:
                address = server.stdout.readline().decode().strip()

                def ask() -> float:
                    server.stdin.write(b"?")  # type: ignore[union-attr]
                    return float(server.stdout.readline())  # type: ignore[union-attr]

                return uvloop.run(_client(way, rounds, bytes(size), address, home, ask))
            finally:
                server.stdin.close()
                server.wait()


async def _client(way: str, rounds: int, payload: bytes, address: str, home: str, ask: Callable[[], float]) -> Result:
    clock = Clock(rounds)
    before = ask()
    if way == "bare":
        await bare_client(clock, payload, address, home)
    else:
        await world_client(clock, payload, way, address, home)
    # The server's start-up is before, its warm-up is in: scaled out.
    spent = (ask() - before) * rounds / (rounds + WARM_UP)
    return clock.result(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(serve(*options.serve))
        return
    results: dict[str, Result] = {}
    print(f"{options.size} bytes there and back, one outstanding, {options.rounds} rounds")
    print(f"{'way':<10}{'p50 µs':>9}{'p99 µs':>9}{'CPU µs':>9}{'per s':>9}")
    for way in ("bare", "world", "local", "datagram"):
        found = results[way] = measure(way, options.rounds, options.size)
        print(f"{way:<10}{found['p50_us']:9.1f}{found['p99_us']:9.1f}{found['cpu_us']:9.1f}{found['per_second']:9.0f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"python": platform.python_version(), "kernel": platform.release(), "load": os.getloadavg()[0]}
        options.json.write_text(json.dumps({"about": about, "size": options.size, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
