"""Stories with real processes: `corral up --mount`, applications at work on every mount, and then something happens.

Every story holds the same promise: what was acknowledged is there, read through another node; nobody else's counter
was overwritten; those who did nothing wrong go on.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import corral
from tests.integration.stories import RECOVER, Mounted, until

pytestmark = [pytest.mark.root, pytest.mark.fuse]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    mounted = Mounted(tmp_path_factory.mktemp("stories") / "c")
    try:
        yield mounted
    finally:
        mounted.end()
        for node in mounted.config.node_ids:
            assert not mounted.cluster.mounts.is_mounted(node)
            assert not mounted.cluster.participants(node)


@pytest.fixture
def mounted(made: Mounted) -> Mounted:
    made.restore()
    return made


def test_a_corrald_paused_for_3_s_is_fenced_and_its_mount_never_writes_again(mounted: Mounted) -> None:
    async def hold_a_lock_through_it() -> None:
        async with corral.connect(str(mounted.layout.node(2).socket)) as cluster:
            held = await (await cluster.lockspace("story")).lock("a", corral.EX)
            token = held.token
            await asyncio.to_thread(mounted.cluster.pause, 2)
            await asyncio.to_thread(time.sleep, 3)
            await asyncio.to_thread(mounted.cluster.resume, 2)
            async with corral.connect(str(mounted.layout.node(1).socket)) as other:
                after = await (await other.lockspace("story")).lock("a", corral.EX, timeout=20)
                assert after.token > token
                await after.unlock()
            with pytest.raises(corral.LockLost):
                await held.unlock()

    with mounted.work() as work:
        asyncio.run(hold_a_lock_through_it())
        mounted.wait(1, [1, 3])
        work.stopped(2)
        assert mounted.mount_process(2) is None
        count = work.records_of(2, through=1)
        work.goes_on(1, 3)
        assert work.records_of(2, through=1) == count
        work.check(3)


def test_a_corrald_restarted_under_a_live_mount_ends_that_mount_and_rejoins_clean(mounted: Mounted) -> None:
    with mounted.work() as work:
        before = mounted.status(2)["incarnation"]
        old = mounted.mount_process(2)
        assert old is not None
        mounted.cluster.kill(2, only="corrald")
        mounted.start(2)
        assert mounted.wait(1, [1, 2, 3])
        assert mounted.wait(2, [1, 2, 3])["incarnation"] > before
        assert mounted.mount_process(2) is None  # it never attaches to another incarnation
        work.stopped(2)
        count = work.records_of(2, through=1)
        work.goes_on(1, 3)
        mounted.mount_again(2)
        assert work.records_of(2, through=2) == count
        work.check(2)


def test_a_mount_killed_alone_is_replayed_by_a_survivor_without_a_new_view(mounted: Mounted) -> None:
    with mounted.work() as work:
        epoch = mounted.status(1)["epoch"]
        mounted.cluster.kill(3, only="mount")
        work.stopped(3)
        work.goes_on(1, 2)
        assert mounted.status(1)["epoch"] == epoch
        mounted.mount_again(3)
        work.check(3)


def test_a_node_that_was_killed_and_is_started_has_its_mount_again(mounted: Mounted) -> None:
    (mounted.mount(1) / "before").write_text("kept")
    mounted.cluster.kill(3)
    mounted.wait(1, [1, 2])
    directory = f"--dir={mounted.layout.root}"
    corral_command = [sys.executable, "-m", "corral.cli.main", "node", "start", "3", directory]
    subprocess.run(corral_command, check=True, capture_output=True, timeout=120)
    assert (mounted.mount(3) / "before").read_text() == "kept"


def test_a_mount_paused_for_longer_than_recover_is_evicted_and_the_others_go_on(mounted: Mounted) -> None:
    with mounted.work() as work:
        epoch = mounted.status(1)["epoch"]
        since = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        mounted.cluster.pause(3, only="mount")
        until(lambda: mounted.mount_process(3) is None, "the paused mount to be killed", 4 * RECOVER)
        assert any("is evicted" in line for line in mounted.told(3, since))
        work.stopped(3)
        work.goes_on(1, 2)
        assert mounted.status(1)["epoch"] == epoch
        work.check(2)


def test_two_of_three_mount_again_after_a_power_loss_of_all(mounted: Mounted) -> None:
    with mounted.work() as work:
        for node in (1, 2, 3):
            mounted.cluster.kill(node)
        for node in (1, 2, 3):
            work.stopped(node)
        mounted.start(1)
        mounted.start(2)
        mounted.wait(2, [1, 2])
        mounted.mount_again(2)
        mounted.mount_again(1)
        work.check(2)
        work.check(1)


def test_a_node_whose_state_was_deleted_comes_back_and_mounts(mounted: Mounted) -> None:
    with mounted.work() as work:
        mounted.cluster.kill(2)
        mounted.wait(1, [1, 3])
        for path in mounted.layout.node(2).state.iterdir():
            path.unlink()
        mounted.start(2)
        mounted.wait(2, [1, 2, 3])
        mounted.mount_again(2)
        work.goes_on(1, 3)
        work.check(2)


def test_a_second_mount_that_dies_during_a_recovery_is_recovered_too(mounted: Mounted) -> None:
    with mounted.work() as work:
        mounted.cluster.kill(3)
        until(lambda: 3 not in mounted.status(1)["members"], "the first failure to be seen")
        mounted.cluster.kill(2, only="mount")
        mounted.wait(1, [1, 2])
        work.stopped(2)
        work.goes_on(1)
        work.check(1)


def test_a_full_state_directory_stops_its_corrald_with_one_line(mounted: Mounted) -> None:
    files = mounted.layout.node(2)
    mounted.cluster.stop(2)
    mounted.wait(1, [1, 3])
    with tiny(files.state) as fill:
        mounted.start(2)
        mounted.wait(2, [1, 2, 3])
        mounted.cluster.stop(3)
        mounted.wait(2, [1, 2])
        fill()
        for _ in range(20):  # each a new view, which node 2 would have to remember; the last page has room for some
            mounted.start(3)
            until(lambda: mounted.cluster.corrald(2) is None or _in_view(mounted, 3), "node 3 in, or node 2 down")
            if mounted.cluster.corrald(2) is None:
                break
            mounted.cluster.stop(3)
        assert mounted.cluster.corrald(2) is None
        mounted.wait(1, [1, 3])
        said = [line for line in files.log.read_text().splitlines() if "cannot be kept" in line]
        assert said
        assert "Traceback" not in files.log.read_text()
        mounted.cluster.kill(2)


def _in_view(mounted: Mounted, node: int) -> bool:
    status = mounted.status(1)
    return node in status["members"] and bool(status["active"])


@contextlib.contextmanager
def tiny(directory: Path) -> "Iterator[object]":
    """A disk of its own for this directory, with room for what is there and little more; yields what fills it up."""
    content = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", directory], check=True)
    try:
        for name, data in content.items():
            (directory / name).write_bytes(data)

        def fill() -> None:
            with contextlib.suppress(OSError), (directory / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(512))

        yield fill
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def test_a_full_image_says_so_at_once_and_loses_nothing(mounted: Mounted) -> None:
    directory = mounted.mount(1) / "full"
    directory.mkdir()
    block = os.urandom(1 << 20)
    written: dict[str, int] = {}
    with pytest.raises(OSError, match="No space left"):
        _fill(directory, block, written)
    through = mounted.mount(2) / "full"
    with pytest.raises(OSError, match="No space left"):
        (through / "more").write_bytes(block * 8)
    for name, size in written.items():
        content = (through / name).read_bytes()
        assert len(content) >= size
        assert content[:size] == (block * 8)[:size]
    for path in list(through.iterdir()):
        path.unlink()
    until(lambda: _fits(mounted.mount(1) / "again", block), "space to be free again")


def _fill(directory: Path, block: bytes, written: dict[str, int]) -> None:
    """Files of 8 MiB, each synced, until there is no room; `written` says how much of each was acknowledged."""
    for number in range(1000):
        with (directory / str(number)).open("wb", buffering=0) as file:
            for _ in range(8):
                written[str(number)] = written.get(str(number), 0) + file.write(block)
            os.fsync(file.fileno())


def _fits(path: Path, block: bytes) -> bool:
    try:
        path.write_bytes(block)
    except OSError:
        return False
    return path.read_bytes() == block
