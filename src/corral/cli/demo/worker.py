"""What an application on one node does in the demo: plain POSIX calls on the mount, nothing of corral's.

    python worker.py counters DIR NAME SECONDS     adds to shared counters under flock
    python worker.py append DIR NAME SECONDS       appends records to one shared log
    python worker.py follow DIR COUNT              reads a tree while somebody else writes it

Each acknowledged change is told on standard output *after* the fsync that makes it durable. A stopped worker says why.
"""

import fcntl
import os
import struct
import sys
import time

COUNTERS = 3


def tell(*words: object) -> None:
    """The last word is when it was acknowledged, CLOCK_BOOTTIME in nanoseconds."""
    print(*words, time.clock_gettime_ns(time.CLOCK_BOOTTIME), flush=True)


def counters(directory: str, name: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    turn = sum(name.encode())
    while time.monotonic() < end:
        number = turn % COUNTERS
        turn += 1
        descriptor = os.open(f"{directory}/counter{number}", os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            (value,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
            os.pwrite(descriptor, struct.pack("<Q", value + 1), 0)
            os.fsync(descriptor)
            tell("counter", number, value + 1)
        finally:
            os.close(descriptor)  # gives the lock back


def append(directory: str, name: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    descriptor = os.open(f"{directory}/log", os.O_WRONLY | os.O_APPEND)
    number = 0
    while time.monotonic() < end:
        number += 1
        record = f"{name} {number} {'x' * (number % 90)}\n".encode()
        written = os.write(descriptor, record)
        if written != len(record):
            raise OSError(f"wrote {written} of {len(record)} bytes")
        os.fsync(descriptor)
        tell("record", name, number)
    os.close(descriptor)


def follow(directory: str, count: int) -> None:
    """Reads every file as soon as its name is there, until `count` files have been read."""
    seen: set[str] = set()
    read = 0
    while len(seen) < count:
        for path, _, names in os.walk(directory):
            for name in names:
                full = os.path.join(path, name)
                if full in seen:
                    continue
                try:
                    with open(full, "rb") as file:
                        read += len(file.read())
                except FileNotFoundError:
                    continue  # still under its temporary name
                seen.add(full)
        time.sleep(0.05)
    tell("followed", len(seen), read)


def main(arguments: list[str]) -> int:
    what, directory, *rest = arguments
    try:
        if what == "counters":
            counters(directory, rest[0], float(rest[1]))
        elif what == "append":
            append(directory, rest[0], float(rest[1]))
        else:
            follow(directory, int(rest[0]))
    except OSError as error:
        tell("stopped", error.strerror or error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
