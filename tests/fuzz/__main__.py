"""python -m tests.fuzz: see the package's docstring. Exit status 1 when there is a finding."""

import argparse
import itertools
import sys
import time

from tests.fuzz.target import Finding, Target, run_case
from tests.fuzz.targets import targets

SLICE_SECONDS = 0.5  # each target gets this long before the next has its turn
FINDINGS_MAX = 5  # of one target; then it is left alone


class Progress:
    def __init__(self, target: Target, first: int) -> None:
        self.target = target
        self.numbers = itertools.count(first)
        self.cases = 0
        self.words: dict[str, int] = {}
        self.findings: list[str] = []

    def run_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and len(self.findings) < FINDINGS_MAX:
            self.cases += 1
            try:
                word = run_case(self.target, next(self.numbers))
            except Finding as finding:
                self.findings.append(str(finding))
                print(finding, flush=True)
            else:
                self.words[word] = self.words.get(word, 0) + 1


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz decoders and engines.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, over all targets")
    parser.add_argument("--target", help="only this one")
    parser.add_argument("--case", type=int, help="run this one case of --target")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--list", action="store_true", help="name the targets")
    options = parser.parse_args(argv)
    chosen = [target for target in targets() if options.target in (None, target.name)]
    if not chosen:
        parser.error(f"there is no target {options.target}; --list names them")
    if options.list:
        print("\n".join(target.name for target in chosen))
        return 0
    if options.case is not None:
        for target in chosen:
            print(target.name, run_case(target, options.case))
        return 0
    progress = [Progress(target, options.first) for target in chosen]
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        for one in progress:
            one.run_for(min(SLICE_SECONDS, options.seconds / len(progress)))
    for one in progress:
        words = ", ".join(f"{count} {word}" for word, count in sorted(one.words.items()))
        print(f"{one.target.name:20} {one.cases:8} cases: {words}{', FINDINGS' if one.findings else ''}")
    return 1 if any(one.findings for one in progress) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
