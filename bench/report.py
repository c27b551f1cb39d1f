"""One table of the results in bench/results, or what changed against the committed ones.

python -m bench.report [--diff [REVISION]]
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from bench.common import HEADING, LESS_IS_BETTER, RESULTS, line

NOTABLE = 1.1  # times better or worse; less is noise on a shared machine
BENCHES = ("dlm", "locks", "recovery", "files")


def committed(path: Path, revision: str) -> dict[str, Any] | None:
    done = subprocess.run(
        ["git", "show", f"{revision}:./{path.name}"], capture_output=True, text=True, cwd=path.parent, check=False
    )
    return json.loads(done.stdout) if done.returncode == 0 else None


def head(about: dict[str, Any]) -> str:
    changed = " with changes" if about["changed"] else ""
    load = f"load {about['load_before']:g} before, {about['load_after']:g} after, {about['cpus']} CPUs"
    return f"{about['command']}: {about['date']}, commit {about['commit']}{changed}, {load}"


def show(path: Path) -> None:
    found = json.loads(path.read_text())
    print(f"\n{head(found['about'])}\n{HEADING}")
    for row in found["rows"]:
        print(f"  {line(row)}")


def show_difference(path: Path, revision: str) -> None:
    new, old = json.loads(path.read_text()), committed(path, revision)
    if old is None:
        print(f"\n{path.name} is not in {revision}")
        return
    print(f"\nwas {head(old['about'])}\nis  {head(new['about'])}")
    print(f"  {'':<52}{'was':>10}{'is':>10} {'':<8}{'times':>7}{'CPU was':>10}{'is':>10}")
    before = {row["name"]: row for row in old["rows"]}
    for row in new["rows"]:
        other = before.pop(row["name"], None)
        if other is None:
            print(f"  {row['name']:<52}{'new':>10}{row['median']:10.6g} {row['unit']}")
            continue
        better = row["median"] / other["median"] if other["median"] else 1.0
        if row["unit"] in LESS_IS_BETTER:
            better = 1 / better if better else 1.0
        word = "" if 1 / NOTABLE < better < NOTABLE else "  better" if better > 1 else "  WORSE"
        cpu = f"{other['cpu_us']:10.6g}{row['cpu_us']:10.6g}" if "cpu_us" in row and "cpu_us" in other else " " * 20
        figures = f"{other['median']:10.6g}{row['median']:10.6g} {row['unit']:<8}"
        print(f"  {row['name']:<52}{figures}{better:7.2f}{cpu}{word}")
    for name in before:
        print(f"  {name:<52}{'gone':>10}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diff", nargs="?", const="HEAD", metavar="REVISION")
    options = parser.parse_args()
    for bench in BENCHES:
        path = RESULTS / f"{bench}.json"
        if not path.exists():
            print(f"\n{path} is not there: run make bench")
        elif options.diff:
            show_difference(path, options.diff)
        else:
            show(path)


if __name__ == "__main__":
    main()
