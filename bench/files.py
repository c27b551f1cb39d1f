"""What file operations cost through the kernel, beside the same program on the filesystem under the image.

    one mount                 node 1 of a three-node cluster works, the other two are mounted and idle
    three, own directories    each node in a directory of its own at the same time; rates are sums
    three, one directory      all in one directory, every name theirs alone: each operation wants the directory's lock
                              while two others want it too

Every phase is a plain loop of system calls in a process of its own per mount, started together; a rate is all
operations over the time until the last process was through. CPU µs are of the mount processes of the nodes that work
and (cold phases) of those that hand over, per operation; the client's and the kernel's own are not in it.

    create          open(O_CREAT|O_EXCL) and close of empty files
    stat, warm      of what this node just made: the kernel answers most of it from its cache
    stat, cold      through another node that never saw the files, while their maker still has them cached under EX:
                    each is a hand-over
    4 KiB           create, write 4 KiB, close; "+ fsync" adds fsync before close, and the device is flushed each time
    ls -l, cold     /bin/ls -l of 2,000 files on a third node that has none of them in any cache
    sequential      1 MiB calls; a write ends with fsync, and that is in its time; a cold read is another node's
The image is opened O_DIRECT. Beside: an ordinary directory of the filesystem the image lies on, where "cold" is warm
for metadata (only the whole machine's caches could be dropped) and file pages are dropped with fadvise.

    python -m bench.files [--runs 3] [--files 1000] [--json FILE]
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.common import HEADING, Results, Row, cluster, cpu_of, mount_process

from corral.cli.layout import Layout

LISTED = 2_000
SYNCED = 100  # files with fsync each
MEGABYTES = 64
MIB = 1 << 20

# --- one process on one mount ----------------------------------------------------------------------------------------


def create(at: str, count: int) -> None:
    for number in range(count):
        os.close(os.open(f"{at}f{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def stat(at: str, count: int) -> None:
    for number in range(count):
        os.stat(f"{at}f{number}")


def rename(at: str, count: int) -> None:
    for number in range(count):
        os.rename(f"{at}f{number}", f"{at}g{number}")


def unlink(at: str, count: int) -> None:
    for number in range(count):
        os.unlink(f"{at}g{number}")


def small(at: str, count: int) -> None:
    page = os.urandom(4096)
    for number in range(count):
        file = os.open(f"{at}s{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(file, page)
        os.close(file)


def synced(at: str, count: int) -> None:
    page = os.urandom(4096)
    for number in range(count):
        file = os.open(f"{at}y{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(file, page)
        os.fsync(file)
        os.close(file)


def write(at: str, count: int) -> None:
    piece = os.urandom(MIB)
    file = os.open(f"{at}big", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for _ in range(count):
        os.write(file, piece)
    os.fsync(file)
    os.close(file)


def read(at: str, count: int) -> None:
    file = os.open(f"{at}big", os.O_RDONLY)
    got = 0
    while piece := os.read(file, MIB):
        got += len(piece)
    os.close(file)
    assert got == count * MIB, f"{at}big has {got} bytes"


def forget(at: str, _count: int) -> None:
    file = os.open(f"{at}big", os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def ls(at: str, _count: int) -> None:
    subprocess.run(["/bin/ls", "-l", os.path.dirname(at)], stdout=subprocess.DEVNULL, check=True)


PHASES: dict[str, Callable[[str, int], None]] = {
    phase.__name__: phase for phase in (create, stat, rename, unlink, small, synced, write, read, forget, ls)
}


def worker() -> None:
    """Lines of `phase prefix count` in, seconds out."""
    print("ready", flush=True)
    for line in sys.stdin:
        name, at, count = line.split()
        begun = time.perf_counter()
        PHASES[name](at, int(count))
        print(time.perf_counter() - begun, flush=True)


# --- all of them -----------------------------------------------------------------------------------------------------


class Workers:
    """One process per mount, all doing the same phase at the same time."""

    def __init__(self, count: int) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.files", "--worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            )
            for _ in range(count)
        ]  # fmt: skip
        for index in range(count):
            assert self._answer(index) == "ready"

    def _answer(self, index: int) -> str:
        output = self._processes[index].stdout
        assert output is not None
        return output.readline().strip()

    def run(self, phase: str, prefixes: dict[int, str], count: int, pids: list[int]) -> tuple[float, float]:
        """Operations per second of all, CPU seconds of `pids`. `prefixes`: which process works where."""
        before = cpu_of(pids)
        begun = time.perf_counter()
        for index, prefix in prefixes.items():
            process = self._processes[index]
            assert process.stdin is not None
            process.stdin.write(f"{phase} {prefix} {count}\n")
        for index in prefixes:
            if not self._answer(index):
                raise SystemExit(f"phase {phase} failed at {prefixes[index]}; its error is above")
        wall = time.perf_counter() - begun
        return count * len(prefixes) / wall, cpu_of(pids) - before

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


@contextlib.contextmanager
def workers(count: int) -> Iterator[Workers]:
    started = Workers(count)
    try:
        yield started
    finally:
        started.close()


Figures = dict[str, list[tuple[float, float | None]]]  # name of the row -> (rate, CPU µs per operation) of each run


class Bench:
    def __init__(self, runs: int, files: int, results: Results) -> None:
        self._runs = runs
        self._files = files
        self._results = results

    def run(self) -> None:
        with cluster(mount=True) as layout, workers(3) as processes:
            beside = self._ext4(layout, processes)
            for title, working, shared in (
                ("one mount", [1], False),
                ("three, own directories", [1, 2, 3], False),
                ("three, one directory", [1, 2, 3], True),
            ):
                figures: Figures = {}
                for run in range(self._runs):
                    self._mounted(layout, processes, working, shared, f"{len(title)}-{run}", figures)
                self._rows(title, figures, beside)

    def _ext4(self, layout: Layout, processes: Workers) -> Figures:
        """The same on the filesystem under the image, one process."""
        figures: Figures = {}
        for _ in range(self._runs):
            with tempfile.TemporaryDirectory(prefix="corral-bench-plain-", dir=layout.root.parent) as directory:
                one = {0: f"{directory}/"}
                self._warm(processes, one, [], figures, self._files)
                processes.run("create", one, self._files, [])
                self._note(figures, "stat, cold", processes.run("stat", one, self._files, []), self._files)
                processes.run("forget", one, 0, [])
                self._note(figures, "sequential read, cold", processes.run("read", one, MEGABYTES, []), MEGABYTES)
                self._listing(processes, {0: f"{directory}/l/"}, {0: f"{directory}/l/"}, [], figures)
        return figures

    def _mounted(
        self, layout: Layout, processes: Workers, working: list[int], shared: bool, tag: str, figures: Figures
    ) -> None:
        pids = {node: mount_process(layout, node) for node in (1, 2, 3)}
        root = {node: f"{layout.node(node).mount}/{tag}" for node in (1, 2, 3)}
        os.mkdir(root[1])
        own = {node: "" if shared else f"d{node}/" for node in working}
        for node in working:
            if not shared:
                os.mkdir(f"{root[node]}/{own[node]}")
        prefixes = {node - 1: f"{root[node]}/{own[node]}n{node}-" for node in working}
        # The next node looks at what this one made.
        others = {node - 1: f"{root[node]}/{own[maker]}n{maker}-" for maker in working for node in [maker % 3 + 1]}
        busy = [pids[node] for node in working]
        both = [pids[node] for node in sorted({*working, *(index + 1 for index in others)})]
        count = self._count(working, shared)
        self._warm(processes, prefixes, busy, figures, count)
        made = {index: f"{prefix}cold-" for index, prefix in prefixes.items()}
        looked = {index: f"{prefix}cold-" for index, prefix in others.items()}
        processes.run("create", made, count, [])
        self._note(figures, "stat, cold", processes.run("stat", looked, count, both), count * len(working))
        total = MEGABYTES * len(working)
        self._note(figures, "sequential read, cold", processes.run("read", others, MEGABYTES, both), total)
        if working == [1]:
            listed = {0: f"{root[1]}/l/"}
            self._listing(processes, listed, {2: f"{root[3]}/l/"}, [pids[1], pids[3]], figures)
        shutil.rmtree(root[1])

    def _count(self, working: list[int], shared: bool) -> int:
        """Fewer where each is slow: a rate does not need more."""
        return self._files if working == [1] else max(50, self._files // (10 if shared else 4))

    def _warm(
        self, processes: Workers, prefixes: dict[int, str], pids: list[int], figures: Figures, files: int
    ) -> None:
        many = len(prefixes)
        for phase, title, count in (
            ("create", "create", files),
            ("stat", "stat, warm", files),
            ("rename", "rename", files),
            ("unlink", "unlink", files),
            ("small", "4 KiB files", files),
            ("synced", "4 KiB files + fsync", min(files, SYNCED)),
            ("write", "sequential write + fsync", MEGABYTES),
            ("read", "sequential read, warm", MEGABYTES),
        ):
            self._note(figures, title, processes.run(phase, prefixes, count, pids), count * many)

    def _listing(
        self, processes: Workers, maker: dict[int, str], reader: dict[int, str], pids: list[int], figures: Figures
    ) -> None:
        (path,) = maker.values()
        os.mkdir(path)
        processes.run("create", maker, LISTED, [])
        rate, cpu = processes.run("ls", reader, 1, pids)
        self._note(figures, "ls -l of 2,000, cold", (rate * LISTED, cpu), LISTED)

    def _note(self, figures: Figures, title: str, measured: tuple[float, float], operations: int) -> None:
        rate, cpu = measured
        figures.setdefault(title, []).append((rate, cpu / operations * 1e6))

    def _rows(self, title: str, figures: Figures, beside: Figures) -> None:
        marks = {"create": 2000.0, "sequential write + fsync": 200.0} if title == "one mount" else {}
        for name, runs in figures.items():
            unit = "MB/s" if name.startswith("sequential") else "/s"
            factor = MIB / 1e6 if unit == "MB/s" else 1.0
            row = Row(f"{title}: {name}", unit, of="ext4", mark=marks.get(name))
            plain = statistics.median(rate for rate, _ in beside[name])
            for rate, cpu in runs:
                row.add(rate * factor, cpu_us=cpu, beside=plain * factor)
            self._results.add(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return
    results = Results("files", files=options.files)
    print(HEADING)
    Bench(options.runs, options.files, results).run()
    results.write(options.json)


if __name__ == "__main__":
    main()
