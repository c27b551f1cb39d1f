"""python -m tests.oracle: see the package's docstring. Exit status 1 when there is a difference."""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from tests.oracle.boot import GuestFailed, Guests, missing
from tests.oracle.compare import compare
from tests.oracle.generate import LENGTH, run


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description="The lock engine against Linux's DLM.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the others count on")
    parser.add_argument("--length", type=int, default=LENGTH, help="calls a run")
    parser.add_argument("--nodes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--record", type=Path, help="append what is stable to this file, as docs/design/dlm-oracle.md")
    options = parser.parse_args(argv)
    if reason := missing():
        print(f"skipped: {reason}")
        return 0
    runs = [
        {"seed": seed, "operations": run(seed, options.length, options.nodes)}
        for seed in range(options.seed, options.seed + options.runs)
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the guest ends with us
    with tempfile.TemporaryDirectory(prefix="corral-oracle-") as name:
        directory = Path(name)
        try:
            with Guests(directory, runs, options.nodes) as guests:
                return play(guests, options.record)
        except GuestFailed as failed:
            print(f"the guest failed: {failed}")
            for log in sorted(directory.glob("*.log")):
                print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-15:], sep="\n")
            return 2


def play(guests: Guests, file: Path | None) -> int:
    played = steps = unstable = parted = failed = 0
    for record in guests.records():
        outcome = compare(record, guests.count)
        played += 1
        steps += len(outcome.run["steps"])
        unstable += outcome.unstable
        parted += outcome.parting is not None
        failed += bool(outcome.mismatches)
        for mismatch in outcome.mismatches:
            print(mismatch, flush=True)
        if file is not None:
            with file.open("a") as out:
                out.write(json.dumps(outcome.run) + "\n")
    print(f"{played} runs, {steps} steps; {unstable} unstable, {parted} part from Linux on purpose, {failed} differ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
