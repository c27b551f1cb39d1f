"""What the simulated network promises and what it may do to a program."""

import asyncio

import pytest

from corral.base.time import MILLISECOND, SECOND
from corral.base.world import Connection, World
from corral.sim.links import Delay, Loss, Repeat
from corral.sim.process import Process
from corral.sim.simulation import Simulation

from .rig import Accepting, Recorder, simulate

ADDRESS = "10.0.0.1:7000"


async def pair(sim: Simulation) -> tuple[Process, Connection, Recorder, Process, Connection, Recorder]:
    """A client on n2 connected to a server on n1: process, connection and handler of both."""
    server, client = sim.machines["n1"].attach("server"), sim.machines["n2"].attach("client")
    accepting, handler = Accepting(), Recorder()
    await server.world.network.listen(ADDRESS, accepting)
    connection = await client.world.network.connect(ADDRESS, 1, handler)
    await asyncio.sleep(0.1)
    accepted = accepting.handlers[0].connection
    assert accepted is not None
    return client, connection, handler, server, accepted, accepting.handlers[0]


def numbers(count: int) -> list[bytes]:
    return [number.to_bytes(4, "little") for number in range(count)]


def test_messages_arrive_whole_in_order_under_loss_and_delay() -> None:
    async def body(sim: Simulation) -> None:
        _, connection, _, _, _, there = await pair(sim)
        sim.network.lay(Loss(0.2), ["n2"], ["n1"])
        sim.network.lay(Delay(0, 50 * MILLISECOND), ["n2"], ["n1"])
        for number in numbers(500):
            connection.send([number])
            await asyncio.sleep(0.001)
        await asyncio.sleep(60)
        assert there.messages == numbers(500)
        assert there.breaks == []

    simulate(body)


def test_a_connection_has_a_bandwidth() -> None:
    async def body(sim: Simulation) -> None:
        _, connection, _, _, _, there = await pair(sim)
        for _ in range(10):
            connection.send([bytes(1 << 20)])
            await asyncio.sleep(0.000001)
        await asyncio.sleep(0.5)
        assert len(there.messages) == 4
        await asyncio.sleep(0.6)
        assert len(there.messages) == 10

    simulate(body, ns_per_byte=100)


def test_what_one_turn_queues_arrives_in_one_wakeup() -> None:
    async def body(sim: Simulation) -> None:
        _, connection, _, _, _, there = await pair(sim)
        for number in numbers(100):
            connection.send([number])
        await asyncio.sleep(1)
        assert (there.messages, there.wakeups) == (numbers(100), 1)

    simulate(body)


def test_a_message_is_what_it_was_when_it_was_sent() -> None:
    async def body(sim: Simulation) -> None:
        _, connection, _, _, _, there = await pair(sim)
        buffer = bytearray(b"before")
        connection.send([buffer, memoryview(b"view")])
        buffer[:] = b"after!"
        await asyncio.sleep(1)
        assert there.messages == [b"before", b"view"]

    simulate(body)


def test_close_delivers_what_was_sent_and_breaks_both_ends_once() -> None:
    async def body(sim: Simulation) -> None:
        _, connection, here, _, accepted, there = await pair(sim)
        connection.send([b"last words"])
        connection.close()
        assert here.breaks == []  # never from within a call
        connection.close()
        connection.send([b"ignored"])
        await asyncio.sleep(1)
        accepted.close()
        await asyncio.sleep(1)
        assert there.messages == [b"last words"]
        assert (len(here.breaks), len(there.breaks)) == (1, 1)

    simulate(body)


def test_a_killed_process_breaks_its_connections_after_what_it_sent() -> None:
    async def body(sim: Simulation) -> None:
        client, connection, here, _, _, there = await pair(sim)
        connection.send([b"sent before the kill"])
        client.kill()
        await asyncio.sleep(1)
        assert there.messages == [b"sent before the kill"]
        assert (here.breaks, there.breaks) == ([], ["reset by the peer"])

    simulate(body)


def test_a_power_cut_is_noticed_by_timeout_or_after_the_reboot() -> None:
    async def noticed_after(sim: Simulation, reboot: bool) -> float:
        _, _, _, _, _, there = await pair(sim)
        cut = sim.now
        sim.machines["n2"].power_cut()
        if reboot:
            await asyncio.sleep(1)
            sim.machines["n2"].boot()
        while not there.breaks:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(30)
        assert len(there.breaks) == 1
        return (sim.now - cut) / SECOND - 30

    assert 15 <= simulate(lambda sim: noticed_after(sim, False)) <= 17
    assert simulate(lambda sim: noticed_after(sim, True)) <= 3


def test_a_short_partition_delays_and_a_long_one_breaks() -> None:
    async def body(sim: Simulation) -> None:
        _, connection, here, _, _, there = await pair(sim)
        cut = sim.network.partition(["n1"], ["n2"])
        connection.send([b"late"])
        await asyncio.sleep(3)
        assert there.messages == []
        sim.network.heal(cut)
        await asyncio.sleep(2)
        assert (there.messages, here.breaks, there.breaks) == ([b"late"], [], [])

        sim.network.partition(["n1"], ["n2"])
        connection.send([b"lost"])
        await asyncio.sleep(8)
        assert here.breaks == ["timed out"]
        assert there.breaks == []  # it sent nothing, so it knows nothing
        sim.network.heal()
        await asyncio.sleep(2)
        assert (there.messages, there.breaks) == ([b"late"], ["reset by the peer"])

    simulate(body, user_timeout=5 * SECOND)


def test_a_one_way_partition_delivers_and_then_breaks_for_want_of_acknowledgement() -> None:
    async def body(sim: Simulation) -> None:
        _, connection, here, _, accepted, there = await pair(sim)
        sim.network.partition(["n1"], ["n2"], one_way=True)
        connection.send([b"heard"])
        accepted.send([b"not heard"])
        await asyncio.sleep(8)
        assert (here.messages, there.messages) == ([], [b"heard"])
        assert (len(here.breaks), len(there.breaks)) == (1, 1)

    simulate(body, user_timeout=5 * SECOND)


def test_a_partition_of_two_leaves_the_third_connected() -> None:
    async def body(sim: Simulation) -> None:
        accepting = Accepting()
        for name in ("n1", "n2", "n3"):
            world = sim.machines[name].attach("p").world
            await world.network.listen(f"{sim.machines[name].hosts[0]}:1", accepting)
        sim.network.partition(["n1"], ["n2"])
        world = sim.machines["n3"].attach("q").world
        await world.network.connect("10.0.0.1:1", 1, Recorder())
        await world.network.connect("10.0.0.2:1", 2, Recorder())
        with pytest.raises(TimeoutError):
            await sim.machines["n1"].attach("q").world.network.connect("10.0.0.2:1", 2, Recorder())

    simulate(body, machines=3)


def test_connect_is_refused_times_out_or_finds_somebody_else() -> None:
    async def body(sim: Simulation) -> None:
        network = sim.machines["n2"].attach("client").world.network
        with pytest.raises(ConnectionRefusedError):
            await network.connect(ADDRESS, 1, Recorder())
        accepting = Accepting()
        server = sim.machines["n1"].attach("server")
        await server.world.network.listen(ADDRESS, accepting)
        for node, cluster in ((3, "corral"), (1, "other")):
            stranger = sim.machines["n2"].attach("stranger", cluster=cluster)
            with pytest.raises(OSError, match="not node") as wrong:
                await stranger.world.network.connect(ADDRESS, node, Recorder())
            assert not isinstance(wrong.value, ConnectionRefusedError)
        assert (accepting.handlers, sim.network.refused) == ([], 2)
        server.kill()
        await server.wait_gone()
        with pytest.raises(ConnectionRefusedError):
            await network.connect(ADDRESS, 1, Recorder())
        sim.machines["n1"].power_cut()
        with pytest.raises(TimeoutError):
            await network.connect(ADDRESS, 1, Recorder())
        with pytest.raises(OSError, match="no route"):
            await network.connect("10.9.9.9:1", 1, Recorder())
        with pytest.raises(OSError, match="host:port"):
            await network.connect("nonsense", 1, Recorder())

    simulate(body)


def test_both_ends_know_the_certificate_of_the_other() -> None:
    async def body(sim: Simulation) -> None:
        _, connection, _, _, accepted, _ = await pair(sim)
        assert (connection.node, accepted.node) == (1, 2)
        assert connection.credentials is None

    simulate(body)


def test_a_connect_that_is_cancelled_leaves_no_connection_behind() -> None:
    async def body(sim: Simulation) -> None:
        accepting = Accepting()
        await sim.machines["n1"].attach("server").world.network.listen(ADDRESS, accepting)
        client = sim.machines["n2"].attach("client")
        for micros in range(0, 1000, 20):
            task = asyncio.create_task(client.world.network.connect(ADDRESS, 1, Recorder()))
            await asyncio.sleep(micros / 1e6)
            if task.done():
                task.result().close()
            task.cancel()
            await asyncio.wait({task})
        await asyncio.sleep(1)
        assert client.connections == {}
        assert accepting.handlers
        assert all(len(handler.breaks) == 1 for handler in accepting.handlers)

    simulate(body)


def test_a_paused_process_gets_everything_late_and_at_once() -> None:
    arrived: list[tuple[float, int]] = []

    class Late(Recorder):
        def received(self, messages: list[bytes]) -> None:
            arrived.append((asyncio.get_running_loop().time(), len(messages)))

    async def server(world: World) -> None:
        await world.network.listen(ADDRESS, lambda connection: Late())
        await asyncio.Event().wait()

    async def body(sim: Simulation) -> None:
        process = sim.machines["n1"].start("server", server)
        client = sim.machines["n2"].attach("client")
        await asyncio.sleep(0.1)
        connection = await client.world.network.connect(ADDRESS, 1, Recorder())
        process.pause()
        for _ in range(10):
            connection.send([b"x"])
            await asyncio.sleep(0.1)
        await asyncio.sleep(20)
        assert arrived == []
        process.resume()
        await asyncio.sleep(1)
        assert [count for _, count in arrived] == [10]

    simulate(body)


def test_pending_counts_what_a_stopped_reader_does_not_take() -> None:
    async def server(world: World) -> None:
        await world.network.listen(ADDRESS, lambda connection: Recorder())
        await asyncio.Event().wait()

    async def body(sim: Simulation) -> None:
        process = sim.machines["n1"].start("server", server)
        await asyncio.sleep(0.1)
        connection = await sim.machines["n2"].attach("client").world.network.connect(ADDRESS, 1, Recorder())
        process.pause()
        connection.send([bytes(1 << 20)])
        await asyncio.sleep(1)
        assert connection.pending == (1 << 20) - (256 << 10)
        process.resume()
        await asyncio.sleep(1)
        assert connection.pending == 0

    simulate(body)


def test_listening_twice_is_refused_and_port_zero_is_resolved() -> None:
    async def body(sim: Simulation) -> None:
        network = sim.machines["n1"].attach("server").world.network
        listener = await network.listen("0.0.0.0:7000", Accepting())
        with pytest.raises(OSError, match="in use"):
            await network.listen(ADDRESS, Accepting())
        listener.close()
        await network.listen(ADDRESS, Accepting())
        with pytest.raises(OSError, match="not an address"):
            await network.listen("10.0.0.2:7000", Accepting())
        anywhere = await network.listen("127.0.0.1:0", Accepting())
        port = int(anywhere.address.rpartition(":")[2])
        assert port > 0
        await network.connect(f"localhost:{port}", 1, Recorder())

    simulate(body)


def test_datagrams_are_lost_repeated_and_reordered_but_never_altered() -> None:
    async def body(sim: Simulation) -> list[bytes]:
        got: list[tuple[str, bytes]] = []
        here, there = (sim.machines[name].attach("p").world.network for name in ("n1", "n2"))
        socket = await here.datagrams("10.0.0.1:9", lambda source, payload: None)
        await there.datagrams("10.0.0.2:9", lambda source, payload: got.append((source, payload)))
        sim.network.lay(Loss(0.2), ["n1"], ["n2"])
        sim.network.lay(Repeat(0.2), ["n1"], ["n2"])
        for number in numbers(1000):
            socket.send("10.0.0.2:9", number)
            await asyncio.sleep(0.0001)
        socket.send("10.0.0.2:10", b"nobody")
        socket.send("nonsense", b"nobody")
        await asyncio.sleep(1)
        assert {source for source, _ in got} == {"10.0.0.1:9"}
        return [payload for _, payload in got]

    got = simulate(body)
    distinct = set(got)
    assert distinct < set(numbers(1000))
    assert 700 < len(distinct) < 900
    assert 1.1 < len(got) / len(distinct) < 1.3
    assert got != sorted(got)


def test_datagrams_for_a_paused_process_are_bounded() -> None:
    got: list[bytes] = []

    async def main(world: World) -> None:
        await world.network.datagrams("10.0.0.2:9", lambda source, payload: got.append(payload))
        await asyncio.Event().wait()

    async def body(sim: Simulation) -> None:
        process = sim.machines["n2"].start("reader", main)
        socket = await sim.machines["n1"].attach("p").world.network.datagrams("10.0.0.1:9", lambda *_: None)
        await asyncio.sleep(1)
        process.pause()
        for _ in range(2000):
            socket.send("10.0.0.2:9", b"x")
        await asyncio.sleep(1)
        process.resume()
        await asyncio.sleep(1)
        assert len(got) == 512

    simulate(body)


def test_two_networks_fail_separately() -> None:
    async def body(sim: Simulation) -> None:
        for node in (1, 2):
            sim.machine(node, name=f"m{node}", hosts=(f"10.1.0.{node}", f"10.2.0.{node}"))
        server = sim.machines["m1"].attach("server").world
        await server.network.listen("0.0.0.0:7000", Accepting())
        client = sim.machines["m2"].attach("client").world
        sim.network.partition(["10.1.0.1"], ["10.1.0.2"])
        await client.network.connect("10.2.0.1:7000", 1, Recorder())
        with pytest.raises(TimeoutError):
            await client.network.connect("10.1.0.1:7000", 1, Recorder())

    simulate(body, machines=0)


def test_local_streams_carry_credentials_and_see_the_death_of_the_server() -> None:
    async def body(sim: Simulation) -> None:
        machine = sim.machines["n1"]
        server, client = machine.attach("server", uid=7), machine.attach("client", uid=8)
        with pytest.raises(FileNotFoundError):
            await client.world.local.connect("/run/x.sock", Recorder())
        accepting, handler = Accepting(), Recorder()
        await server.world.local.listen("/run/x.sock", accepting)
        connection = await client.world.local.connect("/run/x.sock", handler)
        connection.send([b"hello"])
        await asyncio.sleep(0.1)
        there = accepting.handlers[0]
        assert there.messages == [b"hello"]
        assert there.connection is not None
        assert there.connection.credentials == (client.pid, 8, 8)
        assert connection.credentials == (server.pid, 7, 7)
        assert connection.node is None
        server.kill()
        await asyncio.sleep(0.1)
        assert len(handler.breaks) == 1
        with pytest.raises(ConnectionRefusedError):
            await client.world.local.connect("/run/x.sock", Recorder())
        other = sim.machines["n2"].attach("elsewhere")
        with pytest.raises(FileNotFoundError):
            await other.world.local.connect("/run/x.sock", Recorder())

    simulate(body)


def test_a_local_connect_to_a_stopped_server_times_out() -> None:
    async def server(world: World) -> None:
        await world.local.listen("/run/x.sock", Accepting())
        await asyncio.Event().wait()

    async def body(sim: Simulation) -> None:
        machine = sim.machines["n1"]
        process, client = machine.start("server", server), machine.attach("client")
        await asyncio.sleep(1)
        process.pause()
        handler = Recorder()
        with pytest.raises(TimeoutError):
            await client.world.local.connect("/run/x.sock", handler)
        process.resume()
        await client.world.local.connect("/run/x.sock", Recorder())
        await asyncio.sleep(1)
        assert handler.breaks == []
        process.pause()
        task = asyncio.create_task(client.world.local.connect("/run/x.sock", handler))
        await asyncio.sleep(1)
        process.kill()
        with pytest.raises(ConnectionResetError):
            await task
        assert handler.breaks == []

    simulate(body)


def test_a_connect_to_a_stopped_process_times_out_and_is_reset_when_that_dies() -> None:
    async def server(world: World) -> None:
        await world.network.listen(ADDRESS, Accepting())
        await asyncio.Event().wait()

    async def body(sim: Simulation) -> None:
        process, client = sim.machines["n1"].start("server", server), sim.machines["n2"].attach("client")
        await asyncio.sleep(1)
        process.pause()
        with pytest.raises(TimeoutError):
            await client.world.network.connect(ADDRESS, 1, Recorder())
        task = asyncio.create_task(client.world.network.connect(ADDRESS, 1, Recorder()))
        await asyncio.sleep(1)
        process.kill()
        with pytest.raises(ConnectionResetError):
            await task

    simulate(body)
