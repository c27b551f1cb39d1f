"""Starts the guest: Debian's user-mode Linux as an ordinary process, with the host's files as its root."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

KERNEL: Final = "linux.uml"
PROGRAMS: Final = {KERNEL: "user-mode-linux", "corosync": "corosync", "dlm_controld": "dlm-controld"}
MODULES: Final = Path("/usr/lib/uml/modules")
LIBRARIES: Final = Path("/usr/lib")
MEMORY: Final = "192M"
MEMORY_DIRECTORY: Final = Path("/dev/shm")  # the guest's memory is a file here
SILENCE_SECONDS: Final = 180  # a guest that has said nothing for so long hangs
PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"

COROSYNC: Final = """\
totem {
  version: 2
  cluster_name: oracle
  transport: udpu
  token: 60000
}
nodelist {
  node {
    ring0_addr: 127.0.0.1
    nodeid: 1
    name: one
  }
}
quorum {
  provider: corosync_votequorum
  expected_votes: 1
}
logging {
  to_stderr: yes
  to_syslog: no
  to_logfile: no
}
"""


class GuestFailed(Exception):
    """The guest did not do its work; the message says why."""


def missing() -> str:
    """What keeps the guest from running here; empty if nothing does."""
    packages = sorted(package for program, package in PROGRAMS.items() if not shutil.which(program, path=PATH))
    if not any(LIBRARIES.glob("*/libdlm_lt.so.3")):
        packages.append("libdlm3")
    if packages:
        return f"these Debian packages are not installed: {' '.join(packages)}"
    if not any(MODULES.glob("*/kernel/fs/dlm/dlm.ko")):
        return f"there is no dlm module under {MODULES}"
    if not os.access(MEMORY_DIRECTORY, os.W_OK | os.X_OK):
        return f"{MEMORY_DIRECTORY}, where the guest's memory goes, is not writable"
    return ""


class Guest:
    """Plays the runs handed over, and ends. `shared` is a directory of its own, which keeps plan, record and logs."""

    def __init__(self, shared: Path, runs: Sequence[dict[str, Any]]) -> None:
        self.shared = shared
        self.record = shared / "record.jsonl"
        (shared / "corosync.conf").write_text(COROSYNC)
        (shared / "plan.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
        here = Path(__file__).parent
        self.command = [
            *(shutil.which(KERNEL, path=PATH) or KERNEL, f"mem={MEMORY}", "quiet", "noreboot"),
            *("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"init={here / 'guest.sh'}"),
            *("con=null", "con0=null,fd:1", f"uml_dir={shared}", "umid=guest"),
            *(f"SHARED={shared}", f"PYTHON={Path(sys.executable).resolve()}", f"DRIVER={here / 'driver.py'}"),
        ]

    def __enter__(self) -> "Guest":
        with (self.shared / "console").open("wb") as console:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env={**os.environ, "TMPDIR": str(MEMORY_DIRECTORY)},
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def records(self) -> Iterator[dict[str, Any]]:
        """The recorded runs as they come. Raises GuestFailed."""
        heard = time.monotonic()
        done = 0
        while True:
            running = self.process.poll() is None
            text = self.record.read_bytes()[done:] if self.record.exists() else b""
            whole = text[: text.rfind(b"\n") + 1]
            for line in whole.splitlines():
                yield json.loads(line)
            done += len(whole)
            if whole:
                heard = time.monotonic()
            elif not running:
                break
            elif time.monotonic() - heard > SILENCE_SECONDS:
                raise GuestFailed(f"nothing heard for {SILENCE_SECONDS} s")
            else:
                time.sleep(0.2)
        outcome = self.shared / "outcome"
        said = outcome.read_text().strip() if outcome.exists() else "it did not come up: console"
        if said != "done":
            raise GuestFailed(said)
