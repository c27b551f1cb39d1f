"""What the demo promises and how it is checked: acknowledgements counted against what is there."""

import itertools
import os
import re
import shutil
import struct
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple, final

FILES_MIN: Final = 1_000
BYTES_MIN: Final = 40 << 20
FILLER_SIZE: Final = 256 << 10
QUICK_PACKAGES: Final = ("email", "importlib", "json")
NOWHERE: Final = "a-link-to-nothing"
RECORD: Final = re.compile(rb"(n\d+l) (\d+) (x*)\n")
PART: Final = re.compile(rb"(n\d*l?)(?: \d*(?: x*)?)?(?=n|\Z)")


class Failed(Exception):
    """A promise of the demo was not kept; the message says which."""


class Tree(NamedTuple):
    files: int
    directories: int
    size: int


def measure(root: Path) -> Tree:
    files = directories = size = 0
    for path, names, leaves in os.walk(root):
        directories += len(names)
        for leaf in leaves:
            status = os.lstat(os.path.join(path, leaf))
            files += 1
            size += status.st_size
    return Tree(files, directories, size)


def make_source(target: Path, *, quick: bool) -> Tree:
    """The standard library of this Python with its byte code, filled up with generated files to the promised size.
    `quick`: a few packages of it, as they are. A symbolic link to nothing is always there."""
    library = Path(sysconfig.get_paths()["stdlib"])
    if quick:
        for package in QUICK_PACKAGES:
            shutil.copytree(library / package, target / package, symlinks=True)
        (target / NOWHERE).symlink_to("/nothing/is/here")
        return measure(target)
    skipped = shutil.ignore_patterns("site-packages", "test", "tests", "idlelib", "config-*", "*.a", "*.so")
    shutil.copytree(library, target, symlinks=True, ignore=skipped)
    (target / NOWHERE).symlink_to("/nothing/is/here")
    found = measure(target)
    number = 0
    while found.files + number < FILES_MIN or found.size + number * FILLER_SIZE < BYTES_MIN:
        directory = target / "generated" / f"{number // 64:03d}"
        directory.mkdir(parents=True, exist_ok=True)
        seed = struct.pack("<Q", number) * (FILLER_SIZE // 8)
        (directory / f"{number:05d}.bin").write_bytes(seed)
        number += 1
    return measure(target)


@final
class Acknowledged:
    """What the writers were told is durable."""

    def __init__(self) -> None:
        self.counters: dict[int, int] = {}  # counter -> highest value acknowledged
        self.increments: dict[int, int] = {}  # counter -> acknowledgements
        self.records: dict[str, int] = {}  # writer -> records acknowledged
        self.stopped: dict[str, str] = {}
        self.at: dict[str, list[int]] = {}  # writer -> when each of its acknowledgements came, CLOCK_BOOTTIME

    def take(self, writer: str, line: str) -> None:
        """One line of a writer."""
        words = line.split()
        if words[:1] in (["counter"], ["record"]):
            self.at.setdefault(writer, []).append(int(words[3]))
        if words[:1] == ["counter"]:
            number, value = int(words[1]), int(words[2])
            self.counters[number] = max(value, self.counters.get(number, 0))
            self.increments[number] = self.increments.get(number, 0) + 1
        elif words[:1] == ["record"]:
            self.records[writer] = max(int(words[2]), self.records.get(writer, 0))
        elif words[:1] == ["stopped"]:
            self.stopped[writer] = " ".join(words[1:-1])

    def longest_pause(self, writers: list[str], after: int) -> tuple[int, int]:
        """Of these writers, the longest time without an acknowledgement that ended after that instant: (when it ended,
        how long), nanoseconds; (0, 0) when nobody was acknowledged after it."""
        worst = (0, 0)
        for writer in writers:
            times = self.at.get(writer, [])
            for before, now in itertools.pairwise(times):
                if now > after and now - before > worst[1]:
                    worst = (now, now - before)
        return worst

    @property
    def total(self) -> int:
        return sum(self.increments.values()) + sum(self.records.values())

    def check_counters(self, directory: Path, in_flight: int) -> str:
        """Each counter is at least what was acknowledged, and at most that and what could be in flight: a lost or
        doubled increment shows as a value below the acknowledgements, two holders as an increment seen twice."""
        for number, count in sorted(self.increments.items()):
            (value,) = struct.unpack("<Q", (directory / f"counter{number}").read_bytes()[:8])
            if value < count or value < self.counters[number]:
                raise Failed(f"counter {number} is {value}, but {max(count, self.counters[number])} were acknowledged")
            if value > count + in_flight:
                raise Failed(f"counter {number} is {value}, but only {count} (and {in_flight} in flight) were written")
        return f"{sum(self.increments.values())} increments"

    def check_log(self, path: Path) -> str:
        """Every acknowledged record is there once, whole, and each writer's are in order. Of a record that was never
        acknowledged, because its writer's node died in the middle of it, a first part may be there."""
        for record in check_records(path.read_bytes(), RECORD, PART, self.records):
            if len(record[3]) != int(record[2]) % 90:
                raise Failed(f"the log has a damaged record: {record[0][:60]!r}")
        return f"{sum(self.records.values())} records"


def check_records(
    content: bytes, whole: re.Pattern[bytes], part: re.Pattern[bytes], acknowledged: Mapping[str, int]
) -> list[re.Match[bytes]]:
    """The whole records of a log (groups: writer, number). Raises Failed unless every acknowledged one is there once
    and each writer's are in order. A writer whose node died may leave the first part (group: as much of its name as
    there is) of one record that it was never told of: a write across two blocks is two steps."""
    records: list[re.Match[bytes]] = []
    seen: dict[str, int] = {}
    parts: set[bytes] = set()
    at = 0
    while at < len(content):
        found = whole.match(content, at) or part.match(content, at)
        if found is None or found[1] in parts:
            raise Failed(f"the log has a damaged record at byte {at}: {content[at : at + 80]!r}")
        at = found.end()
        if found.re is part:
            parts.add(found[1])
            continue
        name, number = found[1].decode(), int(found[2])
        if number != seen.get(name, 0) + 1:
            raise Failed(f"the log has record {number} of {name} after {seen.get(name, 0)}")
        seen[name] = number
        records.append(found)
    for name, number in sorted(acknowledged.items()):
        if seen.get(name, 0) < number:
            raise Failed(f"{number} records of {name} were acknowledged, the log has {seen.get(name, 0)}")
    return records
