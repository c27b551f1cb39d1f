"""What every World promises (base/world.py), as checks that any implementation can run.

An implementation writes a `Laboratory`: it makes worlds (each stands for one process) on one machine and one event
loop, and runs the coroutine of a check on that loop. The checks know nothing else, so what passes here for the real
and for the simulated world is what engines, drivers and doors may rely on in both.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import pytest

from corral.base.ids import NodeId
from corral.base.time import MILLISECOND, SECOND
from corral.base.world import Connection, ProcessId, World

BLOCK = 4096
PATIENCE = 20.0


class Laboratory(Protocol):
    host: str  # where all worlds of this laboratory listen

    def run(self, check: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        """Runs `check(self)` and ends every world it made."""

    def world(self, node: NodeId, state: str = "") -> World:
        """A new process of this node; those of one `state` find each other's stores, one after the other."""

    async def end(self, world: World) -> None:
        """This process ends, as by exit."""

    def path(self, name: str) -> str:
        """Where worlds find each other's sockets and pages."""

    def disk(self, size: int) -> str:
        """A new device of zeros."""

    def bystander(self) -> ProcessId:
        """Another living process, which does nothing."""


Check = Callable[[Laboratory], Coroutine[Any, Any, None]]
CHECKS: list[Check] = []


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


# --- tools -----------------------------------------------------------------------------------------------------------


class Recorder:
    """A ConnectionHandler that holds its world to the contract while it records."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.batches = 0
        self.breaks: list[str] = []
        self.inside = False  # set around calls from which a handler must not be called
        self._changed = asyncio.Event()

    def received(self, messages: list[bytes]) -> None:
        assert not self.inside, "called from inside another call"
        assert not self.breaks, "delivered after the break"
        assert messages, "an empty delivery"
        assert all(type(message) is bytes for message in messages)
        self.batches += 1
        self.messages.extend(messages)
        self._changed.set()

    def broken(self, reason: str) -> None:
        assert not self.inside, "called from inside another call"
        self.breaks.append(reason)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def wait_messages(self, count: int) -> list[bytes]:
        await self.until(lambda: len(self.messages) >= count)
        return self.messages

    async def wait_broken(self) -> None:
        await self.until(lambda: bool(self.breaks))


class Pair:
    """Node 1 listens, node 2 has connected to it, or one process has to another over a local socket."""

    def __init__(self, lab: Laboratory) -> None:
        self.server = lab.world(1)
        self.client = lab.world(2)
        self.near = Recorder()
        self.far = Recorder()
        self.accepted: list[Connection] = []

    def accept(self, connection: Connection) -> Recorder:
        self.accepted.append(connection)
        return self.far


async def over_network(lab: Laboratory) -> tuple[Pair, Connection]:
    pair = Pair(lab)
    listener = await pair.server.network.listen(f"{lab.host}:0", pair.accept)
    return pair, await pair.client.network.connect(listener.address, 1, pair.near)


async def over_socket(lab: Laboratory) -> tuple[Pair, Connection]:
    pair = Pair(lab)
    await pair.server.local.listen(lab.path("sock"), pair.accept)
    return pair, await pair.client.local.connect(lab.path("sock"), pair.near)


WAYS = (over_network, over_socket)


async def settle(world: World, span: int = 50 * MILLISECOND) -> None:
    """Time for what should not happen to happen."""
    await world.sleep_until(world.now() + span)


# --- time ------------------------------------------------------------------------------------------------------------


@check
async def timers_fire_once_and_never_early(lab: Laboratory) -> None:
    world = lab.world(1)
    start = world.now()
    fired: list[tuple[int, int]] = []
    done = world.future()
    for delay in (9_500_000, 0, -5, 4_000_001, 2_000_000):
        world.call_at(start + delay, lambda delay=delay: fired.append((delay, world.now() - start)))  # type: ignore[misc]
    world.call_at(start + 30 * MILLISECOND, lambda: done.set_result(None))
    assert fired == [], "never from inside call_at"
    await done
    assert sorted(delay for delay, _ in fired) == [-5, 0, 2_000_000, 4_000_001, 9_500_000]
    assert all(late >= delay for delay, late in fired)


@check
async def a_cancelled_timer_never_fires(lab: Laboratory) -> None:
    world = lab.world(1)
    fired: list[str] = []
    due = world.call_at(world.now(), lambda: fired.append("due"))
    later = world.call_at(world.now() + MILLISECOND, lambda: fired.append("later"))
    due.cancel()
    later.cancel()
    later.cancel()
    await settle(world)
    assert fired == []


@check
async def sleeping_ends_not_before_its_time(lab: Laboratory) -> None:
    world = lab.world(1)
    when = world.now() + 7_300_000
    await world.sleep_until(when)
    assert world.now() >= when
    await world.sleep_until(when - SECOND)


@check
async def a_spawned_task_can_be_awaited_and_cancelled(lab: Laboratory) -> None:
    world = lab.world(1)

    async def answer() -> int:
        await world.sleep_until(world.now() + MILLISECOND)
        return 42

    assert await world.spawn(answer(), "answer") == 42
    endless = world.spawn(world.sleep_until(world.now() + 3600 * SECOND), "endless")
    await settle(world, MILLISECOND)
    endless.cancel()
    await asyncio.gather(endless, return_exceptions=True)
    assert endless.cancelled()


@check
async def the_end_of_a_turn_comes_once_and_after_what_was_ready(lab: Laboratory) -> None:
    world = lab.world(1)
    heard: list[str] = []

    async def ready() -> None:
        heard.append("ready")

    def gathered() -> None:
        heard.append("end")
        world.at_turn_end(lambda: heard.append("and what that began"))

    world.at_turn_end(gathered)
    world.at_turn_end(lambda: heard.append("end, too"))
    await ready()
    assert heard == ["ready"]
    await settle(world)
    assert heard == ["ready", "end", "end, too", "and what that began"]


@check
async def chance_and_wall_clock(lab: Laboratory) -> None:
    world = lab.world(1)
    assert len(world.random_bytes(33)) == 33
    assert world.random_bytes(16) != world.random_bytes(16)
    assert 0 <= world.rng.random() < 1
    assert world.wall_seconds() > 1_700_000_000
    assert abs(world.wall_ns() // SECOND - world.wall_seconds()) <= 1


# --- connections, both kinds -----------------------------------------------------------------------------------------


@check
async def messages_arrive_whole_and_in_order_both_ways(lab: Laboratory) -> None:
    for way in WAYS:
        pair, connection = await way(lab)
        messages = [bytes([index % 256]) * size for index, size in enumerate((0, 1, 4096, 100_000, 3_000_000, 2, 0))]
        for message in messages:
            connection.send([message])
        pair.accepted[0].send([bytearray(messages[2]), memoryview(messages[3])])
        assert await pair.far.wait_messages(len(messages)) == messages
        assert await pair.near.wait_messages(2) == messages[2:4]
        await settle(pair.client)
        assert connection.pending == 0


@check
async def what_one_turn_sends_arrives_together(lab: Laboratory) -> None:
    for way in WAYS:
        pair, connection = await way(lab)
        await settle(pair.client)
        before = pair.far.batches
        for number in range(100):
            connection.send([b"%d" % number])
        assert await pair.far.wait_messages(100) == [b"%d" % number for number in range(100)]
        assert pair.far.batches - before <= 2


@check
async def a_buffer_is_the_senders_again_after_the_turn(lab: Laboratory) -> None:
    for way in WAYS:
        pair, connection = await way(lab)
        buffer = bytearray(b"before")
        connection.send([buffer])
        await settle(pair.client)
        buffer[:] = b"after!"
        assert await pair.far.wait_messages(1) == [b"before"]


@check
async def a_close_delivers_what_was_sent_and_breaks_both_sides_once(lab: Laboratory) -> None:
    for way in WAYS:
        pair, connection = await way(lab)
        connection.send([b"last"])
        pair.near.inside = True
        connection.close()
        connection.close()
        pair.near.inside = False
        await pair.near.wait_broken()
        await pair.far.wait_broken()
        connection.send([b"ignored"])
        pair.accepted[0].send([b"ignored"])
        await settle(pair.client)
        assert pair.far.messages == [b"last"]
        assert pair.near.messages == []
        assert (len(pair.near.breaks), len(pair.far.breaks)) == (1, 1)
        assert connection.pending == 0


@check
async def a_handler_may_answer_and_close_from_inside(lab: Laboratory) -> None:
    for way in WAYS:
        pair, connection = await way(lab)

        class Answering(Recorder):
            def received(self, messages: list[bytes]) -> None:
                super().received(messages)
                pair.accepted[0].send([b"re: " + message for message in messages])  # noqa: B023
                pair.accepted[0].close()  # noqa: B023

        # The same connection, another behaviour from here on.
        pair.far.received = Answering().received  # type: ignore[method-assign]
        connection.send([b"question"])
        assert await pair.near.wait_messages(1) == [b"re: question"]
        await pair.near.wait_broken()


@check
async def the_end_of_a_process_breaks_its_connections(lab: Laboratory) -> None:
    for way in WAYS:
        pair, _ = await way(lab)
        await lab.end(pair.client)
        await pair.far.wait_broken()
        assert pair.far.messages == []


@check
async def what_is_sent_on_accepting_waits_for_the_connector(lab: Laboratory) -> None:
    """connect returns before the first delivery: a handler may use its connection in `received`."""
    server, client = lab.world(1), lab.world(2)
    known: list[Connection] = []
    seen: list[bool] = []

    class Using(Recorder):
        def received(self, messages: list[bytes]) -> None:
            super().received(messages)
            seen.append(bool(known))

    def accept(connection: Connection) -> Recorder:
        connection.send([b"welcome"])
        return Recorder()

    listener = await server.network.listen(f"{lab.host}:0", accept)
    handler = Using()
    known.append(await client.network.connect(listener.address, 1, handler))
    assert await handler.wait_messages(1) == [b"welcome"]
    await server.local.listen(lab.path("sock"), accept)
    known.clear()
    second = Using()
    known.append(await client.local.connect(lab.path("sock"), second))
    assert await second.wait_messages(1) == [b"welcome"]
    assert seen == [True, True]


# --- network ---------------------------------------------------------------------------------------------------------


@check
async def each_side_knows_the_others_node(lab: Laboratory) -> None:
    pair, connection = await over_network(lab)
    assert (connection.node, pair.accepted[0].node) == (1, 2)
    assert connection.credentials is None


@check
async def nobody_listening_is_refused(lab: Laboratory) -> None:
    server, client = lab.world(1), lab.world(2)
    listener = await server.network.listen(f"{lab.host}:0", lambda connection: Recorder())
    handler = Recorder()
    connection = await client.network.connect(listener.address, 1, handler)
    address = listener.address
    listener.close()
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        await client.network.connect(address, 1, Recorder())
    await settle(client)
    assert handler.breaks == [], "closing a listener breaks no connection"
    again = await server.network.listen(address, lambda connection: Recorder())
    assert again.address == address
    await lab.end(server)
    with pytest.raises(ConnectionRefusedError):
        await client.network.connect(address, 1, Recorder())
    connection.close()


@check
async def the_wrong_node_is_an_error_but_no_refusal(lab: Laboratory) -> None:
    server, client = lab.world(1), lab.world(2)
    reached: list[Connection] = []

    def accept(connection: Connection) -> Recorder:
        reached.append(connection)
        return Recorder()

    listener = await server.network.listen(f"{lab.host}:0", accept)
    handler = Recorder()
    with pytest.raises(OSError) as raised:
        await client.network.connect(listener.address, 3, handler)
    assert not isinstance(raised.value, ConnectionRefusedError)
    assert handler.messages == []


@check
async def no_address_is_an_oserror(lab: Laboratory) -> None:
    """Addresses also come from other members."""
    world = lab.world(1)
    for address in ("", "nonsense", f"{lab.host}:99999", "a..b:1", "x" * 300 + ":1", "x\0y:1", ":1", "\ud800:1"):
        with pytest.raises(OSError) as raised:
            await world.network.connect(address, 2, Recorder())
        assert not isinstance(raised.value, ConnectionRefusedError)


@check
async def an_address_in_use_is_an_error(lab: Laboratory) -> None:
    first, second = lab.world(1), lab.world(2)
    listener = await first.network.listen(f"{lab.host}:0", lambda connection: Recorder())
    assert int(listener.address.rpartition(":")[2]) > 0
    with pytest.raises(OSError):
        await second.network.listen(listener.address, lambda connection: Recorder())


@check
async def datagrams_bring_an_address_that_can_be_answered(lab: Laboratory) -> None:
    first, second = lab.world(1), lab.world(2)
    got: list[tuple[str, bytes]] = []
    back: list[tuple[str, bytes]] = []
    one = await first.network.datagrams(f"{lab.host}:0", lambda address, payload: got.append((address, payload)))
    two = await second.network.datagrams(f"{lab.host}:0", lambda address, payload: back.append((address, payload)))
    for _ in range(20):  # best effort
        two.send(one.address, b"ping")
        await settle(second, 5 * MILLISECOND)
        if got:
            break
    assert got[0] == (two.address, b"ping")
    for _ in range(20):
        one.send(got[0][0], b"pong")
        await settle(first, 5 * MILLISECOND)
        if back:
            break
    assert back[0] == (one.address, b"pong")


@check
async def sending_a_datagram_never_raises(lab: Laboratory) -> None:
    world = lab.world(1)
    socket = await world.network.datagrams(f"{lab.host}:0", lambda address, payload: None)
    for address in (f"{lab.host}:9", "nonsense", "", "x" * 300 + ":1", "a..b:1", "x\0y:1", "\ud800:1"):
        socket.send(address, b"x")
    socket.send(f"{lab.host}:9", bytes(70_000))
    socket.close()
    socket.close()
    socket.send(f"{lab.host}:9", b"closed")
    await settle(world)


# --- local sockets ---------------------------------------------------------------------------------------------------


@check
async def a_local_stream_names_the_callers_process(lab: Laboratory) -> None:
    pair, connection = await over_socket(lab)
    assert pair.accepted[0].credentials is not None
    assert pair.accepted[0].credentials.pid == pair.client.process.me.pid
    assert connection.credentials is not None
    assert connection.credentials.pid == pair.server.process.me.pid
    assert connection.node is None


@check
async def a_socket_answers_for_one_process_at_a_time(lab: Laboratory) -> None:
    first, second, client = lab.world(1), lab.world(1), lab.world(2)
    path = lab.path("sock")
    with pytest.raises(FileNotFoundError):
        await client.local.connect(path, Recorder())
    listener = await first.local.listen(path, lambda connection: Recorder())
    with pytest.raises(OSError):
        await second.local.listen(path, lambda connection: Recorder())
    (await client.local.connect(path, Recorder())).close()
    listener.close()
    with pytest.raises((FileNotFoundError, ConnectionRefusedError)):
        await client.local.connect(path, Recorder())
    await second.local.listen(path, lambda connection: Recorder())
    (await client.local.connect(path, Recorder())).close()


# --- processes -------------------------------------------------------------------------------------------------------


@check
async def a_living_process_is_not_gone_and_a_killed_one_is(lab: Laboratory) -> None:
    process = lab.world(1).process
    assert process.identify(process.me.pid) == process.me
    assert not process.is_gone(process.me)
    other = lab.bystander()
    assert process.identify(other.pid) == other
    assert not process.is_gone(other)
    waiting = asyncio.ensure_future(process.wait_gone(other))
    await asyncio.sleep(0)
    assert not waiting.done()
    process.kill(other)
    async with asyncio.timeout(PATIENCE):
        await waiting
    assert process.is_gone(other)
    assert process.identify(other.pid) is None
    process.kill(other)
    await process.wait_gone(other)


@check
async def another_with_the_same_pid_is_never_killed(lab: Laboratory) -> None:
    process = lab.world(1).process
    other = lab.bystander()
    for stranger in (other._replace(start=other.start + 1), other._replace(boot_id="another boot")):
        assert process.is_gone(stranger)
        process.kill(stranger)
        await process.wait_gone(stranger)
    await asyncio.sleep(0.01)
    assert not process.is_gone(other)
    process.kill(other)
    await process.wait_gone(other)


@check
async def the_participants_file_tells_who_is_left(lab: Laboratory) -> None:
    corrald, one, two = lab.world(1), lab.world(1), lab.world(1)
    path = lab.path("participants")
    assert await corrald.process.muster(path) is None
    first = await one.process.enlist(path)
    second = await two.process.enlist(path)
    found = await corrald.process.muster(path)
    assert found is not None
    assert set(found) == {one.process.me, two.process.me}
    first.release()
    assert await corrald.process.muster(path) is not None
    second.release()
    second.release()
    assert await corrald.process.muster(path) is None
    third = await one.process.enlist(path)
    assert await corrald.process.muster(path) == [one.process.me]
    third.release()


# --- stores ----------------------------------------------------------------------------------------------------------


@check
async def records_outlive_their_process_in_order(lab: Laboratory) -> None:
    world = lab.world(1, "kept")
    assert await world.store("log").read() == []
    await world.store("log").append([b"one", b""])
    await world.store("log").append([b"two" * 1000])
    await world.store("log").append([])
    await world.store("other").append([b"elsewhere"])
    assert await world.store("log").read() == [b"one", b"", b"two" * 1000]
    await lab.end(world)
    again = lab.world(1, "kept")
    assert await again.store("log").read() == [b"one", b"", b"two" * 1000]
    assert await again.store("other").read() == [b"elsewhere"]
    await again.store("log").append([b"three"])
    assert (await again.store("log").read())[-1] == b"three"
    assert await lab.world(1, "fresh").store("log").read() == []


@check
async def replace_leaves_only_the_new_records(lab: Laboratory) -> None:
    world = lab.world(1, "kept")
    store = world.store("log")
    await store.append([b"old"] * 10)
    await store.replace([b"new", b"er"])
    await store.append([b"est"])
    await lab.end(world)
    again = lab.world(1, "kept")
    assert await again.store("log").read() == [b"new", b"er", b"est"]
    await again.store("log").replace([])
    assert await again.store("log").read() == []


@check
async def appends_take_effect_in_the_order_of_their_calls(lab: Laboratory) -> None:
    store = lab.world(1, "kept").store("log")
    await asyncio.gather(*(store.append([b"%d" % number]) for number in range(40)))
    assert await store.read() == [b"%d" % number for number in range(40)]


# --- disks -----------------------------------------------------------------------------------------------------------


@check
async def a_disk_gives_back_what_was_written(lab: Laboratory) -> None:
    name = lab.disk(64 * BLOCK)
    disk = await lab.world(1).disk(name)
    assert (disk.block_size, disk.size) == (BLOCK, 64 * BLOCK)
    assert await disk.read(0, 64 * BLOCK) == bytes(64 * BLOCK)
    pieces = [b"a" * 100, bytearray(b"b" * BLOCK), memoryview(b"c" * (BLOCK - 100))]
    await disk.write(3 * BLOCK, pieces)
    await disk.flush()
    content = await disk.read(2 * BLOCK, 4 * BLOCK)
    assert content == bytes(BLOCK) + b"".join(pieces) + bytes(BLOCK)
    assert isinstance(content, bytearray)
    other = await lab.world(2).disk(name)
    assert await other.read(3 * BLOCK, 2 * BLOCK) == b"".join(pieces), "it is shared"
    await other.write(3 * BLOCK, [bytes(BLOCK)])
    assert await disk.read(3 * BLOCK, BLOCK) == bytes(BLOCK), "and nothing is cached"


@check
async def a_write_goes_on_when_its_task_is_cancelled(lab: Laboratory) -> None:
    world = lab.world(1)
    disk = await world.disk(lab.disk(16 * BLOCK))
    write = world.spawn(disk.write(0, [b"x" * (16 * BLOCK)]), "write")
    await asyncio.sleep(0)
    write.cancel()
    await asyncio.gather(write, return_exceptions=True)
    await settle(world)
    await disk.flush()
    assert await disk.read(0, 16 * BLOCK) == b"x" * (16 * BLOCK)


@check
async def a_discard_spoils_nothing_else(lab: Laboratory) -> None:
    disk = await lab.world(1).disk(lab.disk(16 * BLOCK))
    await disk.write(0, [b"x" * (16 * BLOCK)])
    await disk.discard(4 * BLOCK, 8 * BLOCK)
    await disk.flush()
    content = await disk.read(0, 16 * BLOCK)
    assert content[: 4 * BLOCK] == b"x" * (4 * BLOCK)
    assert content[12 * BLOCK :] == b"x" * (4 * BLOCK)


@check
async def no_such_disk_is_an_oserror(lab: Laboratory) -> None:
    with pytest.raises(FileNotFoundError):
        await lab.world(1).disk(lab.path("no such disk"))


# --- the shared page -------------------------------------------------------------------------------------------------


@check
async def a_page_is_one_memory_until_its_creator_makes_another(lab: Laboratory) -> None:
    first, second = lab.world(1), lab.world(1)
    path = lab.path("page")
    with pytest.raises(FileNotFoundError):
        second.page(path, 4096, create=False)
    mine = first.page(path, 4096, create=True)
    yours = second.page(path, 4096, create=False)
    assert bytes(mine) == bytes(4096)
    mine[0:4] = b"tick"
    assert bytes(yours[0:4]) == b"tick"
    yours[8:9] = b"!"
    assert bytes(mine[8:9]) == b"!"
    fresh = lab.world(1).page(path, 4096, create=True)
    assert bytes(fresh) == bytes(4096)
    assert bytes(yours[0:4]) == b"tick"
    with pytest.raises(OSError):
        second.page(path, 8192, create=False)
