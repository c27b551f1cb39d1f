"""What an application on one node does in the demo. How it reaches the shared files comes first on its command line:

    python -m corral.cli.demo.worker mounted DIR JOB ...             plain POSIX calls on the mount at DIR
    python -m corral.cli.demo.worker library SOCKET DEVICE JOB ...   corral's library, through that corrald

    begin DIR                     makes the counters and the log
    copy SOURCE DIR               copies a tree of this machine in
    fetch DIR TARGET              copies a directory out, into one of this machine
    follow DIR COUNT              reads a tree while somebody else writes it
    compare SOURCE DIR            every name, byte, mode and time against a tree of this machine
    counters DIR NAME SECONDS     adds to shared counters under flock
    append DIR NAME SECONDS       appends records to one shared log

Each acknowledged change is told on standard output *after* the fsync that makes it durable. At its end a worker says
`done`, with a count, or `stopped`, with the reason.
"""

import asyncio
import os
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from stat import S_ISLNK

from corral.cli.demo.plain import PlainFiles
from corral.cli.demo.trees import AnyFiles, Differs, compare, copy, walk

COUNTERS = 3


def tell(*words: object) -> None:
    """The last word is when it was acknowledged, CLOCK_BOOTTIME in nanoseconds."""
    print(*words, time.clock_gettime_ns(time.CLOCK_BOOTTIME), flush=True)


async def begin(files: AnyFiles, directory: str) -> int:
    await files.mkdir(directory)
    for name in [f"counter{number}" for number in range(COUNTERS)] + ["log"]:
        async with files.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT) as file:
            await file.pwrite(b"" if name == "log" else bytes(8), 0)
            await file.fsync()
    return COUNTERS


async def counters(files: AnyFiles, directory: str, name: str, seconds: float) -> int:
    end = time.monotonic() + seconds
    turn = first = sum(name.encode())
    while time.monotonic() < end:
        number = turn % COUNTERS
        turn += 1
        async with files.open(f"{directory}/counter{number}", os.O_RDWR) as file:  # closing gives the lock back
            await file.flock()
            (value,) = struct.unpack("<Q", await file.pread(8, 0))
            await file.pwrite(struct.pack("<Q", value + 1), 0)
            await file.fsync()
            tell("counter", number, value + 1)
    return turn - first


async def append(files: AnyFiles, directory: str, name: str, seconds: float) -> int:
    end = time.monotonic() + seconds
    number = 0
    async with files.open(f"{directory}/log", os.O_WRONLY | os.O_APPEND) as file:
        while time.monotonic() < end:
            number += 1
            record = f"{name} {number} {'x' * (number % 90)}\n".encode()
            written = await file.append(record)
            if written != len(record):
                raise OSError(f"wrote {written} of {len(record)} bytes")
            await file.fsync()
            tell("record", name, number)
    return number


async def follow(files: AnyFiles, directory: str, count: int) -> int:
    """Reads every file as soon as its name is there, until `count` files have been read."""
    seen: set[str] = set()
    while len(seen) < count:
        if await exists(files, directory):
            async for path, _, names in walk(files, directory):
                for full in [f"{path}/{name}" for name in names if f"{path}/{name}" not in seen]:
                    if S_ISLNK((await files.stat(full, follow=False)).mode):
                        await files.readlink(full)  # it may point to nothing, or out of this filesystem
                    else:
                        await files.read(full)
                    seen.add(full)
        await asyncio.sleep(0.05)
    return len(seen)


async def exists(files: AnyFiles, path: str) -> bool:
    try:
        await files.stat(path)
    except FileNotFoundError:
        return False
    return True


async def work(files: AnyFiles, job: str, rest: list[str]) -> int:
    here = PlainFiles(Path("/"))
    if job == "begin":
        return await begin(files, rest[0])
    if job == "copy":
        await files.mkdir(rest[1])
        return await copy(here, rest[0], files, rest[1])
    if job == "fetch":
        await here.mkdir(rest[1])
        return await copy(files, rest[0], here, rest[1])
    if job == "follow":
        return await follow(files, rest[0], int(rest[1]))
    if job == "compare":
        return await compare(here, rest[0], files, rest[1])
    if job == "counters":
        return await counters(files, rest[0], rest[1], float(rest[2]))
    if job == "append":
        return await append(files, rest[0], rest[1], float(rest[2]))
    raise OSError(f"{job} is no job")


@asynccontextmanager
async def open_files(arguments: list[str]) -> AsyncIterator[AnyFiles]:
    """Takes the words that say how from `arguments`."""
    if arguments.pop(0) == "mounted":
        yield PlainFiles(Path(arguments.pop(0)))
        return
    from corral.files import open_filesystem

    socket, device = arguments.pop(0), arguments.pop(0)
    async with open_filesystem(device, socket) as files:
        yield files


async def main(arguments: list[str]) -> int:
    from corral.base.errors import ClusterError

    try:
        async with open_files(arguments) as files:
            result = await work(files, arguments[0], arguments[1:])
    except OSError as error:
        tell("stopped", error.strerror or error)
        return 1
    except (Differs, ClusterError) as error:
        tell("stopped", error)
        return 1
    tell("done", result)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
