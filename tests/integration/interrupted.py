"""SIGINT to the demo at some moment: what is left of it afterwards must be nothing.

    python -m tests.integration.interrupted --moments 25 [--seed 1] [-- --no-fuse --quick]

tries that many moments, drawn from the seed over the length of one whole run, early ones oftener, every third with a
second SIGINT soon after the first; `make interrupts` does it both ways. A moment that failed is named, to be tried
again with --at.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from corral.fuse.mounting import Mounted, abort_connection, mounts

MARK = "CORRAL_TEST_MARK"
END_SECONDS = 60.0  # on a busy machine


class Ended(NamedTuple):
    after: float  # seconds it ran, up to the signal
    ending: float  # seconds from the signal to its end
    status: int
    said: str
    left: list[str]


def interrupt(options: list[str], at: float, again: float | None = None, *, once_said: str = "") -> Ended:
    """Runs the demo with these options, sends SIGINT `at` seconds after it said that, and again later."""
    mark = uuid.uuid4().hex
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # as in the background of a shell; the demo would inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="corral-interrupted-", dir="/var/tmp", ignore_cleanup_errors=True) as name:
        home = Path(name)
        with (home / "output").open("wb") as output:
            began = time.monotonic()
            demo = subprocess.Popen(
                [sys.executable, "-m", "corral.cli.main", "demo", *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(os.environ, **{MARK: mark}, TMPDIR=name),
                start_new_session=True,
            )
        while once_said not in _text(home / "output") and demo.poll() is None:
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            demo.wait(at)
        after = time.monotonic() - began
        demo.send_signal(signal.SIGINT)
        if again is not None:
            time.sleep(again)
            demo.send_signal(signal.SIGINT)
        left = []
        try:
            demo.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            left.append(f"the demo itself, after {END_SECONDS:g} s")
            demo.kill()
            demo.wait()
        ending = time.monotonic() - began - after
        said = (home / "output").read_text(errors="replace")
        (home / "output").unlink()
        left += what_is_left(mark, home)
        _end(mark, home)
        return Ended(after, ending, demo.returncode, said, left)


def what_is_left(mark: str, home: Path) -> list[str]:
    left = [f"process {path.parent.name}: {_text(path.parent / 'cmdline')}" for path in _marked(mark)]
    left += [f"mount {mounted.path}" for mounted in _mounts_in(home)]
    left += [f"socket {line.split()[-1]}" for line in _text(Path("/proc/net/unix")).splitlines() if f"{home}/" in line]
    left += [f"file {path}" for path in sorted(home.iterdir())]
    return left


def _end(mark: str, home: Path) -> None:
    """So that a moment that failed does not disturb the next."""
    while marked := _marked(mark):
        for path in marked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.parent.name), signal.SIGKILL)
        for mounted in _mounts_in(home):
            abort_connection(mounted)
        time.sleep(0.05)
    for mounted in _mounts_in(home):
        abort_connection(mounted)


def _mounts_in(home: Path) -> list[Mounted]:
    return [mounted for mounted in mounts() if mounted.path.startswith(f"{home}/")]


def _marked(mark: str) -> list[Path]:
    """Who inherited the mark, which is everybody the demo started, and theirs."""
    return [path for path in Path("/proc").glob("[0-9]*/environ") if f"{MARK}={mark}" in _text(path)]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at", type=float, help="only this moment, in seconds")
    parser.add_argument("--length", type=float, help="seconds that a whole run takes; measured when not given")
    parser.add_argument("options", nargs="*", default=["--quick"], help="of the demo")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    length = arguments.length or interrupt(arguments.options, 300).after
    print(f"corral demo {' '.join(arguments.options)}: {length:.1f} s")
    failed = 0
    for number in range(arguments.moments if arguments.at is None else 1):
        at = rng.uniform(0, 3 if number % 4 == 0 else length) if arguments.at is None else arguments.at
        again = rng.choice((0.0, 0.01, 0.1, 0.5)) if number % 3 == 2 else None
        ended = interrupt(arguments.options, at, again)
        step = [line for line in ended.said.splitlines() if line.startswith("[")][-1:]
        print(f"{number}: at {ended.after:.2f} s {step}, again {again}: status {ended.status} in {ended.ending:.2f} s")
        for what in ended.left:
            print(f"    LEFT {what}", flush=True)
        if "Traceback" in ended.said:
            print(ended.said)
        failed += bool(ended.left)
    print(f"{failed} moments left something")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
