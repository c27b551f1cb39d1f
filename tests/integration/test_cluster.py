"""A local cluster of real processes: what a person does with `corral up`, and what then goes wrong."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import corral
from corral import sync
from corral.api.dlm import CONVERT, EX, NL, PERSISTENT, PR, VALBLK, Completion, Request
from corral.cli import processes
from corral.cli.layout import Layout
from corral.cli.localcluster import LocalCluster

CORRAL = [sys.executable, "-m", "corral.cli.main"]


def command(*arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run([*CORRAL, *arguments], capture_output=True, text=True, timeout=120, check=False)
    if check:
        assert done.returncode == 0, done.stderr
    return done


class Local:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.dir = f"--dir={directory}"
        self.layout = Layout(directory)

    def socket(self, node: int) -> str:
        return str(self.layout.node(node).socket)

    def status(self, node: int) -> dict[str, Any]:
        done = command("--socket", self.socket(node), "cman", "status", "--json", check=False)
        return json.loads(done.stdout) if done.stdout else {"members": [], "active": False, "quorate": False}

    def wait(self, node: int, members: list[int], seconds: float = 20) -> dict[str, Any]:
        """Until this node is in an active view of exactly these."""
        end = time.monotonic() + seconds
        while True:
            status = self.status(node)
            if status["members"] == members and status["active"]:
                return status
            assert time.monotonic() < end, f"node {node} is still in {status}"
            time.sleep(0.05)

    def start(self, *nodes: int) -> None:
        cluster = LocalCluster(self.layout, self.layout.load(), lambda _: None)
        for node in nodes:
            cluster.start(node)
        cluster.wait_ready(nodes)


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    cluster = Local(tmp_path / "c")
    try:
        command("up", "--nodes=3", cluster.dir)
        yield cluster
    finally:
        config = cluster.layout.load()
        LocalCluster(cluster.layout, config, lambda _: None).abandon()
        for node in config.node_ids:
            assert not processes.read_participants(cluster.layout.node(node).participants)


def test_up_is_idempotent_and_down_leaves_nothing(local: Local) -> None:
    command("up", "--nodes=3", local.dir)
    assert "has 3 nodes, not 2" in command("up", "--nodes=2", local.dir, check=False).stderr
    status = json.loads(command("status", local.dir, "--json").stdout)
    assert [node["members"] for node in status["nodes"].values()] == [[1, 2, 3]] * 3
    assert all(node["active"] and node["quorate"] for node in status["nodes"].values())
    command("down", local.dir)
    assert not list(local.directory.glob("node*/*.sock"))
    assert not list(local.directory.glob("node*/pid"))
    assert command("status", local.dir, check=False).returncode == 1


def test_a_lock_passes_from_a_killed_node_to_a_waiter_with_a_larger_token(local: Local) -> None:
    async def story() -> None:
        async with corral.connect(local.socket(1)) as one, corral.connect(local.socket(3)) as three:
            here = await (await one.lockspace("s")).lock("other", corral.NL)
            assert here.token
            spaces = await one.lockspace("s"), await three.lockspace("s")
            held = await spaces[1].lock("a", corral.EX)
            with pytest.raises(corral.WouldBlock):
                await spaces[0].lock("a", corral.EX, wait=False)
            waiting = asyncio.create_task(asyncio.wait_for(spaces[0].lock("a", corral.EX)._acquire(), 20))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            token = held.token
            await asyncio.to_thread(command, "node", "kill", "3", local.dir)
            granted = await waiting
            assert granted.token > token
            with pytest.raises(corral.LockLost):
                await held.unlock()

    asyncio.run(story())
    assert local.wait(1, [1, 2])["quorate"]


def test_a_lockspace_has_one_length_of_value_blocks_on_all_nodes(local: Local) -> None:
    async def story() -> None:
        async with corral.connect(local.socket(1)) as one, corral.connect(local.socket(2)) as two:
            space = await one.lockspace("sizes", value_size=64)
            with pytest.raises(corral.ClusterError, match="64 bytes on node 1, not 32"):
                await two.lockspace("sizes")
            async with asyncio.timeout(20), space.lock("still", corral.EX):
                pass
            other = await two.lockspace("sizes", value_size=64)
            async with asyncio.timeout(20), other.lock("still", corral.EX) as held:
                assert len(held.value) in (0, 64)

    asyncio.run(story())


def test_who_holds_and_who_waits_is_seen_from_outside_and_what_the_dead_left_is_purged(local: Local) -> None:
    def asked(name: str, *options: str) -> "subprocess.CompletedProcess[str]":
        return command("--socket", local.socket(1), "dlm", "query", "seen", name, *options, check=False)

    async def story() -> None:
        async with corral.connect(local.socket(2)) as two, asyncio.timeout(60):
            space = await two.lockspace("seen")
            held = await space.lock("a", corral.EX)
            waiting = asyncio.ensure_future(space.lock("a", corral.PR)._acquire())
            answers: asyncio.Queue[Completion] = asyncio.Queue()
            space.submit(
                [Request("lock", b"part", corral.EX, PERSISTENT, range=(0, 9))],
                lambda _handle, completion: answers.put_nowait(completion),
            )
            assert (await answers.get()).status == 0
            found = json.loads((await asyncio.to_thread(asked, "a", "--json")).stdout)
            assert [(lock["node"], lock["state"], lock["granted"], lock["requested"]) for lock in found["locks"]] == [
                (2, "granted", "EX", "-"),
                (2, "waiting", "-", "PR"),
            ]
            assert "EX 0-9" in (await asyncio.to_thread(asked, "part")).stdout
            await held.unlock()
            await (await waiting).unlock()

    asyncio.run(story())
    assert "EX 0-9" in asked("part").stdout, "its client is gone, it stays"
    command("--socket", local.socket(1), "dlm", "purge", "seen", "--node", "2")
    nobody = asked("part")
    deadline = time.monotonic() + 10
    while nobody.returncode == 0 and "EX" in nobody.stdout and time.monotonic() < deadline:
        nobody = asked("part")
    assert "EX" not in nobody.stdout
    other = asked("a", "--value-size", "64")
    assert other.returncode == 1
    assert other.stderr.count("\n") == 1
    assert "value blocks of 32 bytes" in other.stderr


def test_a_lockspace_is_made_once_and_released_when_nobody_needs_it_or_by_force(local: Local) -> None:
    async def story() -> None:
        async with (
            corral.connect(local.socket(1)) as one,
            corral.connect(local.socket(1)) as same,
            corral.connect(local.socket(2)) as two,
            asyncio.timeout(60),
        ):
            space = await one.lockspace("once", exclusive=True)
            with pytest.raises(corral.ClusterError, match="exists on this node already"):
                await same.lockspace("once", exclusive=True)
            beside = await same.lockspace("once")
            there = await two.lockspace("once", exclusive=True)
            held = await beside.lock("a", corral.EX)
            for force in (0, 1):
                with pytest.raises(corral.Busy, match="locks of clients of this node"):
                    await space.release(force)
            await space.release(2)
            with pytest.raises(corral.LockLost):
                await held.convert(corral.NL)
            async with there.lock("a", corral.EX):
                pass
            again = await one.lockspace("once", exclusive=True)
            await again.release()

    asyncio.run(story())


@pytest.mark.parametrize("whole", [True, False], ids=["its-node", "its-lock-service"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "held"])
def test_a_client_too_busy_to_hear_of_its_loss_counts_on_its_lock_no_longer_than_it_may(
    local: Local, whole: bool, kept: bool
) -> None:
    """Its loop does not turn, so it never hears that the connection broke: only the page can tell it."""
    script = (
        "import asyncio, contextlib, corral, sys, time\n"
        "async def main():\n"
        "    async with corral.connect(sys.argv[1]) as cluster:\n"
        "        space = await cluster.lockspace('s')\n"
        "        kept = sys.argv[2] == 'True'\n"
        "        held = await space.lock('a', keep=kept)\n"
        "        if kept: space.leave(held)\n"
        "        print('held', flush=True)\n"
        "        sure, end = 0, time.monotonic() + 10\n"
        "        with contextlib.suppress(corral.LockLost):\n"
        "            while time.monotonic() < end:\n"
        "                if kept:\n"
        "                    async with space.lock('a', keep=True):\n"
        "                        sure = time.monotonic_ns()\n"
        "                elif held.valid:\n"
        "                    sure = time.monotonic_ns()\n"
        "                else:\n"
        "                    break\n"
        "        print(sure, flush=True)\n"
        "        sys.stdin.read()\n"
        "asyncio.run(main())\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, local.socket(3), str(kept)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    assert holder.stdout is not None

    async def take() -> int:
        async with corral.connect(local.socket(1)) as cluster:
            space = await cluster.lockspace("s")
            waiting = asyncio.ensure_future(asyncio.wait_for(space.lock("a", corral.EX)._acquire(), 20))
            await asyncio.sleep(0.2)
            if whole:
                await asyncio.to_thread(command, "node", "kill", "3", local.dir)
            else:
                for process in processes.read_participants(local.layout.node(3).participants):
                    processes.send(process, signal.SIGKILL)
            await waiting
            return time.monotonic_ns()

    try:
        assert holder.stdout.readline() == b"held\n"
        granted = asyncio.run(take())
        assert int(holder.stdout.readline()) < granted
    finally:
        holder.kill()
        holder.communicate()


def test_long_values_go_in_as_many_messages_as_they_need(local: Local) -> None:
    count, size = 1100, 4096  # more bytes than a message may have, both ways

    async def story() -> None:
        async with corral.connect(local.socket(1)) as cluster:
            space = await cluster.lockspace("long", value_size=size)
            answers: asyncio.Queue[Completion] = asyncio.Queue()

            def completed(_handle: int, completion: Completion) -> None:
                answers.put_nowait(completion)

            names = [f"page{number}".encode() for number in range(count)]
            handles = space.submit([Request("lock", name, EX, VALBLK) for name in names], completed)
            assert {(await answers.get()).status for _ in names} == {0}
            space.submit(
                [Request("convert", b"", NL, CONVERT | VALBLK, lock, b"x" * size) for lock in handles], completed
            )
            assert {(await answers.get()).status for _ in names} == {0}
            space.submit([Request("convert", b"", PR, CONVERT | VALBLK, lock) for lock in handles], completed)
            assert {(await answers.get()).value for _ in names} == {b"x" * size}

    asyncio.run(asyncio.wait_for(story(), 60))


def test_threads_reach_the_files_of_the_cluster_without_a_mount(local: Local) -> None:
    disk = local.directory / "disk.img"
    with disk.open("wb") as image:
        image.truncate(128 << 20)
    command("gfs", "mkfs", str(disk), "--table=local:home", "--journals=3", "--yes")
    with sync.open_filesystem(disk, local.socket(1)) as here, sync.open_filesystem(disk, local.socket(2)) as there:
        here.mkdir("reports")
        with here.open("reports/today", os.O_RDWR | os.O_CREAT) as file:
            file.pwrite(b"written by node 1", 0)
        assert there.read("reports/today") == b"written by node 1"
        with there.open("reports/today", os.O_RDWR) as file:
            file.flock()
            file.pwrite(b"WRITTEN", 0)
            file.fsync()
        assert here.read("reports/today") == b"WRITTEN by node 1"
        assert here.listdir("reports") == ["today"]
        with pytest.raises(FileNotFoundError):
            there.read("reports/tomorrow")


def test_a_client_that_dies_frees_its_locks_at_once(local: Local) -> None:
    script = (
        "import asyncio, corral, sys\n"
        "async def main():\n"
        "    async with corral.connect(sys.argv[1]) as cluster:\n"
        "        space = await cluster.lockspace('s')\n"
        "        await space.lock('a')\n"
        "        print('held', flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, local.socket(1)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        rounds = json.loads(command("--socket", local.socket(1), "cman", "groups", "--json").stdout)[0]["round"]

        async def take() -> None:
            async with corral.connect(local.socket(1)) as cluster:
                space = await cluster.lockspace("s")
                with pytest.raises(corral.WouldBlock):
                    await space.lock("a", wait=False)
                holder.kill()
                held = await space.lock("a", timeout=5)
                await held.unlock()

        asyncio.run(take())
        after = json.loads(command("--socket", local.socket(1), "cman", "groups", "--json").stdout)[0]["round"]
        assert after == rounds  # without a round
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_paused_corrald_is_left_out_and_killed(local: Local) -> None:
    command("node", "pause", "2", local.dir)
    local.wait(1, [1, 3])
    end = time.monotonic() + 10
    while processes.read_pid_file(local.layout.node(2).pid) is not None:
        assert time.monotonic() < end
        time.sleep(0.05)
    command("node", "start", "2", local.dir)
    local.wait(1, [1, 2, 3])


@pytest.mark.parametrize("asked", [1, 3])
def test_a_member_is_fenced_on_request_and_may_come_back(local: Local, asked: int) -> None:
    """Node 1 coordinates, so whoever is asked, it is told whom to leave out."""
    victim = {1: 3, 3: 1}[asked]
    before = local.status(victim)["incarnation"]
    command("--socket", local.socket(asked), "fence", "node", str(victim), "--reason=it hangs")
    local.wait(asked, sorted({1, 2, 3} - {victim}))
    history = json.loads(command("--socket", local.socket(2), "fence", "status", "--json").stdout)["history"]
    assert [(fact["node"], fact["incarnation"], fact["proof"]) for fact in history] == [(victim, before, "killed")]
    command("node", "start", str(victim), local.dir)
    assert local.wait(victim, [1, 2, 3])["incarnation"] > before


def test_a_fence_request_that_cannot_be_is_refused_in_one_sentence(local: Local) -> None:
    def refusal(node: int) -> str:
        done = command("--socket", local.socket(1), "fence", "node", str(node), check=False)
        assert done.returncode == 1
        return done.stderr

    assert "node 1 does not fence itself: ask another node" in refusal(1)
    assert "node 9 is not configured" in refusal(9)
    command("node", "kill", "3", local.dir)
    local.wait(1, [1, 2])
    assert "without node 2 there is no quorum" in refusal(2)
    assert local.status(1)["members"] == [1, 2]


def test_two_of_three_come_back_from_a_power_loss_once_the_third_is_fenced(local: Local) -> None:
    for node in (1, 2, 3):
        command("node", "kill", str(node), local.dir)
    local.start(1, 2)
    status = local.wait(2, [1, 2])
    assert status["quorate"]
    history = json.loads(command("--socket", local.socket(1), "fence", "status", "--json").stdout)["history"]
    assert {fact["node"] for fact in history} >= {3}
    local.start(3)
    local.wait(1, [1, 2, 3])


def test_a_node_without_its_state_comes_back(local: Local) -> None:
    command("node", "kill", "2", local.dir)
    local.wait(1, [1, 3])
    for path in local.layout.node(2).state.iterdir():
        path.unlink()
    local.start(2)
    local.wait(1, [1, 2, 3])


def test_a_killed_corrald_comes_back_as_a_new_incarnation(local: Local) -> None:
    before = local.status(3)["incarnation"]
    command("node", "kill", "3", local.dir, "--only=corrald")
    local.wait(1, [1, 2])
    command("node", "start", "3", local.dir)
    assert local.wait(3, [1, 2, 3])["incarnation"] > before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cman", "status"], "no corrald answers at"),
        (["up", "--nodes=99"], "99 is not in the range"),
        (["down", "--dir=/nonexistent/x"], "there is no cluster in"),
        (["gfs", "mkfs", "/nonexistent/disk", "--table=a:b"], "does not exist"),
        (["gfs", "mkfs", "/tmp", "--table=ab", "--yes"], "CLUSTER:NAME"),
        (["node", "kill", "9", "--dir=/nonexistent/x"], "there is no cluster in"),
    ],
)
def test_an_error_is_one_sentence_without_a_traceback(arguments: list[str], said: str) -> None:
    done = command("--socket=/nonexistent/socket", *arguments, check=False)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
