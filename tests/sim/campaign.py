"""The campaign: seed after seed of every simulated body, for as long as it is given, with a record that goes on.

    python -m tests.sim.campaign [--seconds S] [--body NAME ...]     run (`make campaign SECONDS=600`)
    python -m tests.sim.campaign --report                            what has been run (`make campaign-report`)
    python -m tests.sim.campaign --show NAME SEED [--trace FILE]     one seed again (`make sim BODY=NAME SEED=n`)

One line of JSON per batch goes to `campaign/results.jsonl`. A later run of a body goes on after the last seed in that
file, whatever its commit: every seed is a new one. The body that is farthest behind its target at this commit goes
next, after the seeds that failed once. SIGINT ends it after the seed at work; what was run is written down. A seed
that fails goes to `tests/sim/seeds.txt`; from then on every campaign begins with it, and tests run it if it is quick.
"""

import argparse
import importlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from time import monotonic, process_time
from types import FrameType
from typing import Any, Final, NamedTuple

from corral.base.time import MILLISECOND, SECOND
from corral.sim import harness

ROOT: Final = Path(__file__).parent.parent.parent
RESULTS: Final = ROOT / "campaign" / "results.jsonl"
SEEDS: Final = Path(__file__).parent / "seeds.txt"
TEXT_MAX: Final = 400  # characters of a failure that the record keeps


class Run(NamedTuple):
    """What one seed came to. `faults` and `operations` as the body counts them."""

    virtual_ns: int = 0
    faults: int = 0
    operations: int = 0


class Body(NamedTuple):
    """`target`: `module:function` below tests.sim. Engines under a model of their surroundings, or whole nodes in
    virtual time, which run with the knobs that belong to the seed."""

    target: str
    seeds: int  # to have been run, for a campaign to be whole
    batch: int
    whole: bool

    def run(self, seed: int, trace: Path | None = None) -> Run:
        module, _, _ = self.target.partition(":")
        if not self.whole:
            return ENGINES[module](importlib.import_module(f"tests.sim.{module}"), seed)
        body = harness.find_body(f"tests.sim.{self.target}")
        outcome = harness.run(seed, body, knobs=harness.nasty(seed), trace_to=trace)
        return Run(outcome.virtual_ns, outcome.result["faults"], outcome.result["operations"])


def _cman(model: Any, seed: int) -> Run:
    done = model.run(seed)
    return Run(done["virtual_ms"] * MILLISECOND, done["faults"], done["installed"])


def _dlm(model: Any, seed: int) -> Run:
    cluster = model.Cluster(seed)
    done = cluster.play()
    return Run(cluster.now, done["rounds"], done["completed"])


def _fence(model: Any, seed: int) -> Run:
    cluster = model.Cluster(seed).go()
    return Run(cluster.now, cluster.round_id, sum(cluster.counts.values()))


def _lift(model: Any, seed: int) -> Run:
    cluster = model.Cluster(seed).go()
    return Run(cluster.now, cluster.faults, cluster.counts.get("rounds", 0))


def _comm(model: Any, seed: int) -> Run:
    finished = model.Run(seed).go()
    return Run(finished.rig.now, finished.faults, finished.deliveries)


def _gfs(model: Any, seed: int) -> Run:
    done = model.run(seed)
    return Run(0, done["cuts"], done["operations"])  # a power cut each; this model has no clock


ENGINES: Final = {
    "cman_cluster": _cman,
    "lift_cluster": _lift,
    "dlm_cluster": _dlm,
    "fence_cluster": _fence,
    "comm_sessions": _comm,
    "gfs_crash": _gfs,
}
BODIES: Final[Mapping[str, Body]] = {
    "cman": Body("cman_cluster:run", 5000, 50, False),
    "lift": Body("lift_cluster:run", 4000, 50, False),
    "dlm": Body("dlm_cluster:run", 5000, 50, False),
    "fence": Body("fence_cluster:run", 6000, 100, False),
    "comm": Body("comm_sessions:run", 3500, 50, False),
    "gfs.crash": Body("gfs_crash:run", 500, 10, False),
    "nodes.locks": Body("nodes:locks", 300, 5, True),
    "files.shared": Body("files:shared", 100, 2, True),
    "mounts.shared": Body("mounts:shared", 100, 2, True),
}


# --- the record ------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> list[dict[str, Any]]:
    """A last line that was cut off by the end of its writer is passed over."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append(path: Path, line: str) -> None:
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")  # an earlier writer was killed within its line
        file.write(line.encode() + b"\n")


def next_seed(results: Iterable[Mapping[str, Any]], body: str) -> int:
    return max((batch["first_seed"] + batch["count"] for batch in results if batch["body"] == body), default=1)


def seeds_run(results: Iterable[Mapping[str, Any]], body: str, commit: str = "") -> int:
    return sum(b["count"] for b in results if b["body"] == body and commit in ("", b["commit"]))


def how_to_see(body: str, seed: int) -> str:
    return f"make sim BODY={body} SEED={seed} TRACE=/tmp/{body}-{seed}.txt"


# --- running ---------------------------------------------------------------------------------------------------------


class Campaign:
    """`stopped` is set by SIGINT: the seed at work is finished, the batch written, and that is it."""

    def __init__(self, results: Path, seeds: Path, commit: str, bodies: Mapping[str, Body]) -> None:
        self.results = results
        self.seeds = seeds
        self.commit = commit
        self.bodies = bodies
        self.stopped = False
        self.failures = 0

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        self.stopped = True

    def go(self, until: float) -> None:
        while not self.stopped and monotonic() < until:
            results = read_results(self.results)
            name = min(self.bodies, key=lambda body: seeds_run(results, body, self.commit) / self.bodies[body].seeds)
            self.batch(name, next_seed(results, name), until)

    def kept(self) -> None:
        """The seeds that failed once, before any new one: a campaign at a commit vouches for them too."""
        for name, body in self.bodies.items():
            for seed in harness.kept_seeds(self.seeds, name):
                if self.stopped:
                    return
                try:
                    body.run(seed)
                except Exception as error:
                    self.fail(name, seed, error)

    def batch(self, name: str, first: int, until: float) -> None:
        body = self.bodies[name]
        began, count = process_time(), 0
        virtual_ns = faults = operations = 0
        failed: list[dict[str, Any]] = []
        while count < body.batch and not self.stopped and monotonic() < until:
            seed = first + count
            count += 1
            try:
                run = body.run(seed)
            except Exception as error:  # whatever a body raises is what the campaign is after
                failed.append({"seed": seed, "error": f"{type(error).__name__}: {error}"[:TEXT_MAX]})
                self.fail(name, seed, error)
                continue
            virtual_ns += run.virtual_ns
            faults += run.faults
            operations += run.operations
        if not count:
            return
        line = {
            "commit": self.commit,
            "body": name,
            "first_seed": first,
            "count": count,
            "virtual_seconds": round(virtual_ns / SECOND, 1),
            "operations": operations,
            "faults": faults,
            "cpu_seconds": round(process_time() - began, 2),
            "failures": failed,
        }
        self.results.parent.mkdir(exist_ok=True)
        append(self.results, json.dumps(line))
        print(f"{name}: {count} seeds from {first}, {line['cpu_seconds']} CPU s, {len(failed)} failed", flush=True)

    def fail(self, name: str, seed: int, error: Exception) -> None:
        self.failures += 1
        harness.keep_seed(self.seeds, name, seed)
        first = (str(error).splitlines() or [""])[0]
        print(f"FAILED {name} {seed}: {type(error).__name__}: {first}\n    {how_to_see(name, seed)}", flush=True)


# --- reporting -------------------------------------------------------------------------------------------------------


def report(results: list[dict[str, Any]]) -> str:
    """Totals over all commits, with the newest one's share."""
    newest = results[-1]["commit"] if results else ""
    heads = ("seeds", "target", newest, "virtual s", "ops", "faults", "CPU s")
    lines = ["body".ljust(14) + "".join(head.rjust(11) for head in heads) + "  failed"]
    for name, body in BODIES.items():
        mine = [batch for batch in results if batch["body"] == name]
        figures = (
            seeds_run(mine, name),
            body.seeds,
            seeds_run(mine, name, newest),
            *(round(sum(b[what] for b in mine)) for what in ("virtual_seconds", "operations", "faults", "cpu_seconds")),
        )
        failed = sum(len(batch["failures"]) for batch in mine)
        lines.append(name.ljust(14) + "".join(str(figure).rjust(11) for figure in figures) + f"  {failed}")
    for kind, whole in (("engines", False), ("whole nodes", True)):
        names = {name for name, body in BODIES.items() if body.whole == whole}
        mine = [batch for batch in results if batch["body"] in names]
        target = sum(BODIES[name].seeds for name in names)
        lines.append(f"{kind}: {sum(b['count'] for b in mine)} of {target} seeds")
    for batch in results:
        for failure in batch["failures"]:
            first = (failure["error"].splitlines() or [""])[0]
            lines.append(f"failed at {batch['commit']}: {batch['body']} {failure['seed']}: {first}")
    return "\n".join(lines)


def show(name: str, seed: int, trace: Path | None) -> int:
    try:
        print(BODIES[name].run(seed, trace))
    except AssertionError as error:
        print(error, *getattr(error, "__notes__", ()), sep="\n")
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.campaign", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--body", action="append", choices=sorted(BODIES), help="only these")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=Path, default=SEEDS, help="where failing seeds are kept")
    parser.add_argument("--commit", default="", help="of the source that runs, where git cannot tell")
    parser.add_argument("--fresh", action="store_true", help="seeds nobody has run, drawn by chance, kept in no record")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--show", nargs=2, metavar=("BODY", "SEED"))
    parser.add_argument("--trace", type=Path, help="with --show, whole nodes only: the story goes to this file")
    asked = parser.parse_args()
    if asked.report:
        print(report(read_results(asked.results)))
        return 0
    if asked.show:
        name, seed = asked.show
        if name not in BODIES or not seed.isdigit():
            parser.error(f"--show takes one of {', '.join(BODIES)} and a number")
        return show(name, int(seed), asked.trace)
    bodies = {name: body for name, body in BODIES.items() if not asked.body or name in asked.body}
    if asked.fresh:
        return fresh(asked.seconds, asked.seeds, bodies)
    campaign = Campaign(asked.results, asked.seeds, asked.commit or harness.commit(), bodies)
    signal.signal(signal.SIGINT, campaign.stop)
    until = monotonic() + asked.seconds
    campaign.kept()
    campaign.go(until)
    print(report(read_results(asked.results)))
    return 1 if campaign.failures else 0


def fresh(seconds: float, seeds: Path, bodies: Mapping[str, Body]) -> int:
    """For every change: some seconds of seeds that were never run before."""
    with tempfile.TemporaryDirectory() as directory:
        results = Path(directory) / "results.jsonl"
        (first,) = harness.fresh_seeds(1)
        for name in bodies:
            append(results, json.dumps({"commit": "", "body": name, "first_seed": first, "count": 0}))
        campaign = Campaign(results, seeds, harness.commit(), bodies)
        signal.signal(signal.SIGINT, campaign.stop)
        campaign.go(monotonic() + seconds)
        run = sum(batch["count"] for batch in read_results(results))
    print(f"{run} fresh seeds from {first}, {campaign.failures} failed")
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main())
