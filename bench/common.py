"""What every bench needs: a cluster to measure, the CPU time of its processes, and one shape for results.

A result file is one JSON object:

    about   when, of which commit, by which command, on what machine, how loaded before and after
    rows    one figure each: name, unit, runs (all of them, in order), median, best; where it has them: cpu_us (all
            processes together, per operation), beside (the same of the thing compared with), of (its name), ratio,
            mark (what we want it to be) and met
"""

import contextlib
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from corral.cli import processes
from corral.cli.layout import Layout

RESULTS = Path(__file__).parent / "results"
HERTZ = os.sysconf("SC_CLK_TCK")
LESS_IS_BETTER = ("µs", "ms", "s", "bytes")


# --- the cluster -----------------------------------------------------------------------------------------------------


def corral(*arguments: str) -> str:
    """Runs the command line; raises with what it said."""
    done = subprocess.run([sys.executable, "-m", "corral.cli.main", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"corral {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@contextlib.contextmanager
def cluster(*, nodes: int = 3, mount: bool = False, size: str = "2G") -> Iterator[Layout]:
    """A local cluster in a directory of its own, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as directory:
        options = ["--mount", "--size", size] if mount else []
        try:
            corral("up", "--nodes", str(nodes), "--dir", directory, *options)
            yield Layout(Path(directory))
        finally:
            corral("down", "--dir", directory)


def corralds(layout: Layout, *nodes: int) -> list[int]:
    """The daemons of these nodes."""
    found = [processes.read_pid_file(layout.node(node).pid) for node in nodes]
    return [process.pid for process in found if process is not None]


def participants(layout: Layout, *nodes: int) -> list[int]:
    """Lock service and mount of these nodes."""
    return [process.pid for node in nodes for process in processes.read_participants(layout.node(node).participants)]


def mount_process(layout: Layout, node: int) -> int:
    process = processes.read_pid_file(layout.node(node).mount_pid)
    assert process is not None, "mounted before"
    return process.pid


# --- CPU time --------------------------------------------------------------------------------------------------------


def cpu_of(pids: Iterable[int]) -> float:
    """Seconds that these processes have spent, all their threads, user and system (steps of 10 ms)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
    return total / HERTZ


class Spent:
    """`with Spent(pids) as spent: ...` gives `spent.wall`, and `spent.cpu` of this process and those."""

    def __init__(self, pids: Sequence[int] = (), *, own: bool = True) -> None:
        self._pids = pids
        self._own = own

    def _cpu(self) -> float:
        return cpu_of(self._pids) + (time.process_time() if self._own else 0)

    def __enter__(self) -> "Spent":
        self._cpu_before = self._cpu()
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._begun
        self.cpu = self._cpu() - self._cpu_before


# --- results ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """One figure. `unit` tells the direction: times are better small, rates large."""

    name: str
    unit: str
    mark: float | None = None
    of: str = ""  # the name of what `beside` measures
    marked_ratio: bool = False  # the mark is for the ratio
    runs: list[float] = dataclasses.field(default_factory=list)
    beside: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def add(self, figure: float, *, cpu_us: float | None = None, beside: float | None = None) -> None:
        self.runs.append(figure)
        if cpu_us is not None:
            self.cpu.append(cpu_us)
        if beside is not None:
            self.beside.append(beside)

    def as_json(self) -> dict[str, Any]:
        less = self.unit in LESS_IS_BETTER
        median = statistics.median(self.runs)
        found: dict[str, Any] = {
            "name": self.name,
            "unit": self.unit,
            "median": rounded(median),
            "best": rounded(min(self.runs) if less else max(self.runs)),
            "runs": [rounded(run) for run in self.runs],
        }
        if self.cpu:
            found["cpu_us"] = rounded(statistics.median(self.cpu))
        if self.beside:
            found["of"] = self.of
            found["beside"] = rounded(statistics.median(self.beside))
            found["ratio"] = rounded(median / statistics.median(self.beside))
        if self.mark is not None:
            judged = found["ratio"] if self.marked_ratio else median
            found["mark"] = self.mark
            found["marked"] = "ratio" if self.marked_ratio else self.unit
            found["met"] = judged <= self.mark if less else judged >= self.mark
        return found


def rounded(figure: float) -> float:
    """Three digits are more than such a machine can promise."""
    return float(f"{figure:.3g}") if figure < 1000 else float(round(figure))


class Results:
    """Collects the rows of one bench, prints each when it is complete, and writes the file."""

    def __init__(self, bench: str, **more: Any) -> None:
        self._bench = bench
        self._rows: list[dict[str, Any]] = []
        self._about = about() | more

    def add(self, *rows: Row) -> None:
        for row in rows:
            found = row.as_json()
            self._rows.append(found)
            print(f"  {line(found)}", flush=True)

    def write(self, path: Path | None = None) -> None:
        path = path or RESULTS / f"{self._bench}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._about["load_after"] = rounded(os.getloadavg()[0])
        path.write_text(json.dumps({"about": self._about, "rows": self._rows}, indent=1, ensure_ascii=False) + "\n")


def line(row: dict[str, Any]) -> str:
    """A row as `make bench` prints it."""
    cpu = f"{row['cpu_us']:9.6g}" if "cpu_us" in row else " " * 9
    beside = f"{row['ratio']:8.3g} x {row['of']} ({row['beside']:.6g})" if "ratio" in row else ""
    mark = ""
    if "mark" in row:
        unit = "x" if row["marked"] == "ratio" else row["unit"]
        mark = f"  {'met' if row['met'] else 'MISSED'}: mark {row['mark']:g} {unit}"
    return f"{row['name']:<52}{row['median']:10.6g} {row['unit']:<8}{row['best']:10.6g}{cpu}{beside}{mark}"


HEADING = f"  {'':<52}{'median':>10} {'':<8}{'best':>10}{'CPU µs':>9}   ratio"


def about() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip()

    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--", "../src")),
        "command": " ".join(["python", "-m", Path(sys.argv[0]).stem, *sys.argv[1:]]).replace("-m ", "-m bench.", 1),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load_before": rounded(os.getloadavg()[0]),
    }
