"""Disks of the real World where only the real thing can show it: a killed writer, a block device, two processes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.real.disk import BLOCK
from tests.unit.real.support import Bench, eventually, on_loop

SIZE = 4 << 20

WRITER = """
import asyncio, mmap, sys, uvloop
from corral.real.world import RealWorld
async def main():
    disk = await RealWorld("/nonexistent").disk(sys.argv[1])
    buffer = memoryview(mmap.mmap(-1, 1 << 20))
    async def writes(offset):
        number = 0
        while True:
            number = number % 255 + 1
            buffer[:] = bytes([number]) * len(buffer)
            await disk.write(offset, [buffer])
            if offset == 0 and number == 9:
                print("writing", flush=True)
    await asyncio.gather(*(writes(index << 20) for index in range(4)))
uvloop.run(main())
"""


def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(bytes(SIZE))
    return path


def test_when_a_killed_writer_is_gone_none_of_its_writes_is_left(tmp_path: Path) -> None:
    """Four threads were writing when it was killed. What the disk holds when it is gone is what it holds later."""
    path = str(image(tmp_path))

    async def body(bench: Bench) -> None:
        world = bench.world()
        disk = await world.disk(path)
        for _ in range(5):
            with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE) as writer:  # noqa: ASYNC220
                assert writer.stdout is not None
                assert writer.stdout.readline() == b"writing\n"
                identity = world.process.identify(writer.pid)
                assert identity is not None
                world.process.kill(identity)
                await world.process.wait_gone(identity)
                before = await disk.read(0, SIZE)
                await world.sleep_until(world.now() + 20_000_000)
                assert await disk.read(0, SIZE) == before
                assert any(before)
                await disk.write(0, [bytes(SIZE)])

    on_loop(tmp_path, body)


def test_two_processes_see_each_others_writes_at_once(tmp_path: Path) -> None:
    path = str(image(tmp_path))

    async def body(bench: Bench) -> None:
        disk = await bench.world().disk(path)
        with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE) as writer:  # noqa: ASYNC220
            assert writer.stdout is not None
            writer.stdout.readline()
            first = await disk.read(0, BLOCK)
            while await disk.read(0, BLOCK) == first:
                pass
            writer.kill()

    on_loop(tmp_path, body)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    if os.geteuid() != 0:
        pytest.skip("needs root for a loop device")
    if shutil.which("losetup") is None:
        pytest.skip("needs losetup for a loop device")
    made = subprocess.run(
        ["losetup", "--find", "--show", "--direct-io=on", image(tmp_path)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no loop device to be had: {made.stderr.strip()}")
    name = made.stdout.strip()
    yield name
    subprocess.run(["losetup", "--detach", name], check=True)


@pytest.mark.root
def test_a_block_device(tmp_path: Path, device: str) -> None:
    async def body(bench: Bench) -> None:
        disk = await bench.world().disk(device)
        assert disk.direct
        assert disk.size == SIZE
        await disk.write(BLOCK, [b"x" * 100, b"y" * (3 * BLOCK - 100)])
        await disk.flush()
        assert bytes(await disk.read(BLOCK, 3 * BLOCK)) == b"x" * 100 + b"y" * (3 * BLOCK - 100)
        await disk.discard(2 * BLOCK, BLOCK)
        assert bytes(await disk.read(BLOCK, BLOCK))[:100] == b"x" * 100
        with pytest.raises(ValueError, match="beyond its end"):
            await disk.read(SIZE, BLOCK)
        await eventually(lambda: not disk._under_way)
        disk.close()

    on_loop(tmp_path, body)
