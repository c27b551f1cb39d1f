"""`python -m corral.sim package.module:body SEED [--trace FILE]`: one run, its outcome as one line of JSON.

With --nasty the knobs are those that belong to the seed, as in `run_seeds`.
"""

import argparse
import json
import sys
from pathlib import Path

from corral.sim.harness import Failed, find_body, nasty, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m corral.sim", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", help="package.module:body")
    parser.add_argument("seed", type=int)
    parser.add_argument("--trace", type=Path, help="write the whole story to this file")
    parser.add_argument("--nasty", action="store_true", help="draw the knobs from the seed")
    asked = parser.parse_args()
    try:
        outcome = run(
            asked.seed,
            find_body(asked.target),
            knobs=nasty(asked.seed) if asked.nasty else None,
            trace_to=asked.trace,
        )
    except Failed as failure:
        sys.stderr.write(f"{failure}\n")
        return 1
    fields = outcome._asdict()
    del fields["result"]
    sys.stdout.write(json.dumps(fields) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
