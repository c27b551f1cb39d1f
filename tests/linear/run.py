"""Rounds of real client processes on a three-daemon cluster: nodes and clients killed and paused, histories checked.

    python -m tests.linear.run --minutes 10      `make linear MINUTES=10`

Each round has new lockspaces and new clients and is a seed; a line of JSON of each goes to `campaign/linear.jsonl`, and
a later run goes on after the last seed there. A round that fails leaves its records in the directory that is printed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from corral.base.errors import ClusterError
from corral.cli import processes
from corral.cli.layout import Layout, make
from corral.cli.localcluster import LocalCluster
from corral.node.config import write
from tests.linear import history
from tests.linear.checker import check

ROOT: Final = Path(__file__).parents[2]
RESULTS: Final = ROOT / "campaign" / "linear.jsonl"
DETECT: Final = 0.5
NODES: Final = (1, 2, 3)
PATIENCE: Final = 40.0


class Cluster:
    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        config = make(self.layout, len(NODES), detect=DETECT)
        write(config, self.layout.config)
        self.local = LocalCluster(self.layout, config, lambda _: None)

    def socket(self, node: int) -> str:
        return str(self.layout.node(node).socket)

    def whole(self) -> None:
        """Every node a member. One that was fenced because it stood still may end only now: it is started again."""
        deadline = time.monotonic() + PATIENCE
        while True:
            for node in NODES:
                self.local.resume(node)
                self.local.start(node)
            try:
                self.local.wait_ready(NODES, 3.0)
                return
            except ClusterError:
                if time.monotonic() > deadline:
                    raise

    def end(self) -> None:
        for node in NODES:
            self.local.resume(node)
        self.local.abandon()


class Clients:
    """One of each kind on each node."""

    def __init__(self, cluster: Cluster, directory: Path, seed: int) -> None:
        self.cluster = cluster
        self.directory = directory
        self.seed = seed
        self.names = [(kind, node) for kind in history.MODELS for node in NODES]
        self.running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        self.started = 0
        for name in self.names:
            self.start(*name)
        self.wait_ready()
        (directory / "go").touch()

    def wait_ready(self) -> None:
        """Until every client has everything open: a value whose last member dies begins anew."""
        deadline = time.monotonic() + PATIENCE
        while len(ready := list(self.directory.glob("*.ready"))) < len(self.names):
            assert time.monotonic() < deadline, f"only {sorted(path.name for path in ready)} have everything open"
            time.sleep(0.05)

    def start(self, kind: str, node: int) -> None:
        self.started += 1
        space = f"linear-{kind}-{self.seed}"
        with (self.directory / f"{kind}{node}.err").open("ab") as errors:
            self.running[kind, node] = subprocess.Popen(
                [sys.executable, "-m", "tests.linear.client", kind, self.cluster.socket(node), space, f"{kind}{node}",
                 f"{self.seed}.{self.started}", str(self.directory)],
                stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, cwd=ROOT,
            )  # fmt: skip

    def kill(self, kind: str, node: int) -> None:
        process = self.running[kind, node]
        process.kill()
        process.wait()
        (self.directory / f"{kind}{node}.ready").unlink(missing_ok=True)

    def stop(self) -> None:
        """Raises AssertionError when one hangs, or ended as it should not."""
        (self.directory / "stop").touch()
        deadline = time.monotonic() + PATIENCE
        for name, process in self.running.items():
            process.send_signal(signal.SIGCONT)
            try:
                status = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"client {name} hangs: {self.tail(name)}") from None
            assert status == 0, f"client {name} ended with {status}: {self.tail(name)}"

    def tail(self, name: tuple[str, int]) -> str:
        kind, node = name
        texts = [self.directory / f"{kind}{node}{suffix}" for suffix in (".err", ".jsonl")]
        return " | ".join(path.read_text()[-600:] for path in texts if path.exists())

    def end(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()


class Faults:
    """One at a time, so that a majority always goes on, and at least two of a kind of client."""

    def __init__(self, cluster: Cluster, clients: Clients, rng: random.Random) -> None:
        self.cluster = cluster
        self.clients = clients
        self.rng = rng
        self.count: dict[str, int] = {}

    def one(self) -> None:
        table: list[tuple[int, Callable[[int], None]]] = [
            (4, self.kill_node),
            (2, self.pause_briefly),
            (2, self.pause_for_long),
            (2, self.kill_lock_service),
            (3, self.kill_client),
            (3, self.pause_client),
        ]
        fault = self.rng.choices([f for _, f in table], [weight for weight, _ in table])[0]
        self.count[fault.__name__] = self.count.get(fault.__name__, 0) + 1
        fault(self.rng.choice(NODES))
        time.sleep(2 * DETECT)  # so that who lost something has noticed
        self.cluster.whole()
        self.clients.wait_ready()

    def kill_node(self, node: int) -> None:
        self.cluster.local.kill(node)
        time.sleep(self.rng.random() * 2)
        self.cluster.whole()

    def pause_briefly(self, node: int) -> None:
        """Shorter than detection, or a little longer: a lapse, perhaps a fence."""
        self.cluster.local.pause(node)
        time.sleep(DETECT * (0.3 + self.rng.random()))
        self.cluster.whole()

    def pause_for_long(self, node: int) -> None:
        self.cluster.local.pause(node)
        time.sleep(DETECT * (3 + 3 * self.rng.random()))
        self.cluster.whole()

    def kill_lock_service(self, node: int) -> None:
        """It is not started again: the whole node is, after a while."""
        for process in processes.read_participants(self.cluster.layout.node(node).participants):
            processes.send(process, signal.SIGKILL)
        time.sleep(1 + self.rng.random())
        self.cluster.whole()

    def kill_client(self, node: int) -> None:
        kind = self.rng.choice(list(history.MODELS))
        self.clients.kill(kind, node)
        time.sleep(self.rng.random())
        self.clients.start(kind, node)

    def pause_client(self, node: int) -> None:
        """Alone, or while its node is killed: it wakes up to locks that others have."""
        kind = self.rng.choice(list(history.MODELS))
        process = self.clients.running[kind, node]
        process.send_signal(signal.SIGSTOP)
        try:
            if self.rng.random() < 0.5:
                self.cluster.local.kill(node)
            time.sleep(self.rng.random() * 1.5)
        finally:
            process.send_signal(signal.SIGCONT)
        self.cluster.whole()


def one_round(cluster: Cluster, directory: Path, seed: int, seconds: float) -> dict[str, Any]:
    """What was done. Raises NotLinearizable, Undecided, or what a client raised."""
    rng = random.Random(seed)
    cluster.whole()
    clients = Clients(cluster, directory, seed)
    faults = Faults(cluster, clients, rng)
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(rng.random())
            faults.one()
        time.sleep(1)
        clients.stop()
    finally:
        clients.end()
    result: dict[str, Any] = {"seed": seed, "faults": dict(sorted(faults.count.items()))}
    for kind, model in history.MODELS.items():
        judged = check(model, history.read(directory.glob(f"{kind}[0-9].jsonl")))
        result[kind] = judged._asdict()
    return result


def next_seed() -> int:
    seeds = [json.loads(line)["seed"] for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return max(seeds, default=0) + 1


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--round", type=float, default=30, help="seconds of faults in a round")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    root = Path(tempfile.mkdtemp(prefix="linear-"))
    cluster = Cluster(root / "c")
    try:
        while time.monotonic() < end:
            seed = next_seed()
            directory = root / f"round{seed}"
            directory.mkdir()
            begun = time.monotonic()
            failed = ""
            try:
                result = one_round(cluster, directory, seed, options.round)
            except AssertionError as error:
                failed = f"{type(error).__name__}: {error}"
                result = {"seed": seed, "failed": failed[:2000]}
            result["seconds"] = round(time.monotonic() - begun, 1)
            with RESULTS.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result) if not failed else f"seed {seed}: {failed}\nrecords in {directory}", flush=True)
            if failed:
                cluster.local.keep_logs(directory)
                return 1
            shutil.rmtree(directory)
    finally:
        cluster.end()  # before the directory goes, by whose pid files it finds what it started
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
