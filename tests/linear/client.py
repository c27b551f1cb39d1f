"""A client process that works and records: `python -m tests.linear.client KIND SOCKET SPACE NAME SEED DIRECTORY`.

One line of JSON for each call, return and look at a lock, written before the next step, so that the record of a client
that was killed is whole. Times are of the machine's monotonic clock, in nanoseconds. It begins when DIRECTORY/go is
there and ends after DIRECTORY/stop; DIRECTORY/NAME.ready is there while it has everything open. When it loses its locks
it opens everything anew, under a new name.

    ["call", id, kind, key, argument, time]     ["return", id, time, result]     ["failed", id]: it did not happen
    ["sure", hold, time]: at or after `time` the lock of this acquisition was valid
"""

import asyncio
import json
import os
import random
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import corral
from corral import recipes
from corral.providers.locks import LockSpace

TIMEOUT: Final = 3.0  # seconds, of an operation
KEYS: Final = 2
PERMITS: Final = 2
BACKLOG: Final = 3  # elements of a queue beyond which nobody puts
VALUE_SIZE: Final = 256


class Recorder:
    def __init__(self, path: Path, name: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.name = name
        self._number = 0

    def write(self, *what: Any) -> None:
        os.write(self._file, json.dumps(what).encode() + b"\n")

    def call(self, kind: str, key: str, argument: Any = None) -> str:
        self._number += 1
        number = f"{self.name}.{self._number}"
        self.write("call", number, kind, key, number if argument is None else argument, time.monotonic_ns())
        return number

    def returned(self, number: str, result: Any = None) -> None:
        self.write("return", number, time.monotonic_ns(), result)

    def failed(self, number: str) -> None:
        self.write("failed", number)

    def look(self, number: str, held: Any) -> bool:
        """Whether it still has the lock of this acquisition; if so it is on record."""
        now = time.monotonic_ns()
        if held.valid:
            self.write("sure", number, now)
            return True
        return False


class Session:
    """From one loss to the next."""

    def __init__(self, space: LockSpace, recorder: Recorder, rng: random.Random) -> None:
        self.space = space
        self.recorder = recorder
        self.rng = rng

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def step(self) -> None:
        raise NotImplementedError

    async def use(self, number: str, held: Any) -> bool:
        """Some looks, with and without letting the loop turn between them."""
        for _ in range(self.rng.randrange(1, 4)):
            if self.rng.random() < 0.05:
                for _ in range(30):  # too busy to hear of anything, for longer than a node takes to be fenced
                    time.sleep(0.01)  # noqa: ASYNC251
                    if not self.recorder.look(number, held):
                        return False
            else:
                await asyncio.sleep(self.rng.random() * 0.02)
            if not self.recorder.look(number, held):
                return False
        return True

    def key(self) -> str:
        return f"k{self.rng.randrange(KEYS)}"


class Locks(Session):
    async def step(self) -> None:
        key = self.key()
        number = self.recorder.call("acquire", key)
        keep = self.rng.random() < 0.3
        try:
            held = await self.space.lock(key, corral.EX, timeout=TIMEOUT, keep=keep)
        except corral.TimedOut:
            self.recorder.failed(number)
            return
        self.recorder.returned(number, held.token)
        if await self.use(number, held):
            release = self.recorder.call("release", key, number)
            await held.unlock()
            self.recorder.returned(release)
        else:
            held.unlock_nowait()


class Counters(Session):
    async def open(self) -> None:
        self.counters = {f"k{n}": recipes.Counter(self.space, f"k{n}") for n in range(KEYS)}
        for counter in self.counters.values():
            await counter.open(timeout=4 * TIMEOUT)

    async def close(self) -> None:
        for counter in self.counters.values():
            await counter.close()

    async def step(self) -> None:
        key = self.key()
        counter = self.counters[key]
        if self.rng.random() < 0.5:
            number = self.recorder.call("add", key, 1)
            self.recorder.returned(number, await counter.add(timeout=TIMEOUT))
        else:
            number = self.recorder.call("read", key, 0)
            try:
                self.recorder.returned(number, await counter.read(timeout=TIMEOUT))
            except corral.TimedOut:
                self.recorder.failed(number)
        await asyncio.sleep(self.rng.random() * 0.05)


class Semaphores(Session):
    async def step(self) -> None:
        key = self.key()
        number = self.recorder.call("acquire", key)
        try:
            permit = await recipes.Semaphore(self.space, key, PERMITS).acquire(timeout=TIMEOUT)
        except corral.TimedOut:
            self.recorder.failed(number)
            return
        self.recorder.returned(number)
        if await self.use(number, permit):
            release = self.recorder.call("release", key, number)
            await permit.release()
            self.recorder.returned(release)
        else:
            with suppress(corral.LockLost):
                await permit.release()


class Queues(Session):
    async def open(self) -> None:
        self.queue = recipes.Queue(self.space, "k0")
        await self.queue.open(timeout=4 * TIMEOUT)

    async def close(self) -> None:
        await self.queue.close()

    async def step(self) -> None:
        if self.rng.random() < 0.5:
            if await self.queue.length(timeout=TIMEOUT) < BACKLOG:
                number = self.recorder.call("put", "k0")
                await self.queue.put(number.encode(), timeout=TIMEOUT)
                self.recorder.returned(number)
        else:
            await self.take()
        await asyncio.sleep(self.rng.random() * 0.05)

    async def take(self) -> None:
        number = self.recorder.call("take", "k0")
        try:
            element = await self.queue.take(timeout=TIMEOUT)
        except corral.TimedOut:
            return  # it may have had one for a moment
        self.recorder.returned(number, element.data.decode())
        if not await self.use(number, element):
            with suppress(corral.LockLost):
                await element.give_back()
            return
        if self.rng.random() < 0.1:
            back = self.recorder.call("give_back", "k0", number)
            await element.give_back()
            self.recorder.returned(back)
            return
        done = self.recorder.call("done", "k0", number)
        await element.done(timeout=TIMEOUT)
        self.recorder.returned(done)


KINDS: Final[dict[str, type[Session]]] = {
    "lock": Locks,
    "counter": Counters,
    "semaphore": Semaphores,
    "queue": Queues,
}


async def session(kind: str, socket: str, name: str, recorder: Recorder, rng: random.Random, directory: Path) -> None:
    """Works until it is told to stop, or loses something. An operation whose outcome is not known ends it too."""
    async with corral.connect(socket) as cluster:
        space = await cluster.lockspace(name, value_size=VALUE_SIZE)
        working = KINDS[kind](space, recorder, rng)
        ready = directory / f"{recorder.name.partition('/')[0]}.ready"
        await working.open()
        try:
            ready.touch()
            while not (directory / "go").exists():  # noqa: ASYNC110  another process makes it
                await asyncio.sleep(0.02)
            while not (directory / "stop").exists():
                await working.step()
        finally:
            ready.unlink(missing_ok=True)
            await working.close()


def main(kind: str, socket: str, space: str, name: str, seed: str, where: str) -> None:
    directory = Path(where)
    rng = random.Random(f"{name} {seed}")
    for turn in range(1_000_000):
        if turn and (directory / "stop").exists():
            break
        recorder = Recorder(directory / f"{name}.jsonl", f"{name}/{os.getpid()}.{turn}")
        try:
            asyncio.run(session(kind, socket, space, recorder, rng, directory))
        except recipes.ValueLost as error:
            recorder.write("violation", str(error))
            raise
        except (corral.ClusterError, OSError) as error:
            recorder.write("ended", f"{type(error).__name__}: {error}")
        time.sleep(rng.random() * 0.3)


if __name__ == "__main__":
    main(*sys.argv[1:])
