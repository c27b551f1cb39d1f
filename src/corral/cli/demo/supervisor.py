"""Runs the story in a process of its own and leaves nothing behind, however it ends: well, badly, or interrupted at any
moment.

Nothing is remembered of what was started, for a signal can come between a start and its note. What is left is asked of
the kernel instead: every process the story started, and theirs, is a descendant of this one (as a subreaper it
inherits orphans); every mount lies in its directory; so does every socket and file. Signals only set a flag here, and
they do not reach the story, which has a session of its own.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, final

from corral.base.errors import ClusterError
from corral.cli.layout import Layout
from corral.cli.localcluster import LocalCluster
from corral.fuse.mounting import Mounted, abort_connection, mounts

PR_SET_CHILD_SUBREAPER: Final = 36
WHERE: Final = "/var/tmp"  # where TMPDIR does not say; /tmp may be memory, which takes no O_DIRECT
END_SECONDS: Final = 30.0  # for what was killed to be gone
GRACE_SECONDS: Final = 5.0  # for what the story ended in good order to be gone
POLL_SECONDS: Final = 0.02
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED: Final = "interrupted"


class Outcome(NamedTuple):
    rows: list[tuple[str, str]]
    failed: str  # what failed, "" for nothing


@final
class _Signals:
    """While in its body, signals are noted and wake whoever waits for `fd`."""

    def __init__(self) -> None:
        self.noted = False
        self.fd, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def _note(self, _number: int, _frame: Any) -> None:
        self.noted = True
        with contextlib.suppress(OSError):
            os.write(self._waker, b"!")

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        # What whoever started us chose to ignore stays ignored: nohup, or the background of a shell.
        chosen = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in chosen}
        try:
            yield
        finally:
            # Once interrupted, all that is left to do is to say so and exit: one more signal has nothing to end.
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self.noted else handler)
            os.close(self.fd)
            os.close(self._waker)


def run(options: list[str], tell: Callable[[str], None], keep: Path | None) -> Outcome:
    """`options` are the story's. Logs go to `keep` when a check fails. Raises ClusterError when something is left that
    cannot be ended."""
    signals = _Signals()
    with signals.caught():
        if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise ClusterError("this kernel has no child subreapers; use Linux 3.4 or newer")
        directory = Path(tempfile.mkdtemp(prefix="corral-demo-", dir=os.environ.get("TMPDIR") or WHERE))
        try:
            outcome = _run_story(directory, options, signals)
            if outcome.failed and outcome.failed != INTERRUPTED and keep is not None:
                _keep_logs(directory, keep, tell)
        finally:
            _end_all(directory)
    return outcome


def _run_story(directory: Path, options: list[str], signals: _Signals) -> Outcome:
    results, theirs = os.pipe()
    story = subprocess.Popen(
        [sys.executable, "-m", "corral.cli.demo.story", str(directory), str(theirs), *options],
        stdin=subprocess.DEVNULL,
        pass_fds=(theirs,),
        start_new_session=True,
    )
    os.close(theirs)
    try:
        said = _read_results(results, signals)
        if signals.noted:
            story.kill()  # before its pipe is closed: it is not to complain
            story.wait()
    finally:
        os.close(results)
    if signals.noted:
        return Outcome(_rows(said), INTERRUPTED)
    status = story.wait()
    if status or not said or said[-1][0] != "end":
        return Outcome(_rows(said), f"the story ended with status {status} before its end")
    failed = said[-1][1]
    if not failed and (left := _left_behind(directory, GRACE_SECONDS)):
        failed = f"after a clean shutdown there was still {left}"
    return Outcome(_rows(said), failed)


def _read_results(results: int, signals: _Signals) -> list[list[str]]:
    """Until the story has ended, or a signal came."""
    content = b""
    while not signals.noted:
        ready, _, _ = select.select([results, signals.fd], [], [])
        if results in ready:
            data = os.read(results, 1 << 16)
            if not data:
                break
            content += data
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def _rows(said: list[list[str]]) -> list[tuple[str, str]]:
    return [(words[1], words[2]) for words in said if words[0] == "row"]


def _keep_logs(directory: Path, keep: Path, tell: Callable[[str], None]) -> None:
    layout = Layout(directory / "cluster")
    if layout.config.exists():
        LocalCluster(layout, layout.load(), tell).keep_logs(keep)


# --- what is left ----------------------------------------------------------------------------------------------------


def _end_all(directory: Path) -> None:
    """No process, mount, socket or file of the story is left. Raises ClusterError naming what would not end."""
    if left := _left_behind(directory, END_SECONDS, force=True):
        raise ClusterError(f"{left} would not end; end it, then remove {directory}")
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        raise ClusterError(f"{directory} could not be removed; remove it")


def _left_behind(directory: Path, seconds: float, *, force: bool = False) -> str:
    """What is still there after that time; "" as soon as nothing is. With `force` all is ended."""
    deadline = time.monotonic() + seconds
    while True:
        _reap()
        processes = _descendants(os.getpid())
        mounted = _mounts_in(directory)
        if not processes and not mounted:
            return ""
        if time.monotonic() > deadline:
            named = [f"process {pid} ({_command(pid)})" for pid in processes] + [f"mount {one.path}" for one in mounted]
            return ", ".join(named)
        if force:
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            # Also those that lived a moment ago: who waits in a mount ends only when that does.
            for one in mounted:
                abort_connection(one)
        time.sleep(POLL_SECONDS)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _descendants(ancestor: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (parent := _parent(int(name))):
            children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    pending = [ancestor]
    while pending:
        born = children.get(pending.pop(), [])
        found += born
        pending += born
    return sorted(found)


def _parent(pid: int) -> int:
    """0 when it has gone meanwhile."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0
    return int(stat[stat.rindex(")") + 2 :].split()[1])


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "gone"


def _mounts_in(directory: Path) -> list[Mounted]:
    return [one for one in mounts() if one.path.startswith(f"{directory}/")]
