"""Starts the guest: Debian's user-mode Linux as an ordinary process, with the host's files as its root."""

import json
import os
import shutil
import signal
import socket
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

LOOPBACK: Final = "127.0.0.1"
ADDRESSES: Final = ("10.0.0.1", "10.0.0.2")  # of two guests, between which a pair of sockets is the network
COROSYNC: Final = """\
totem {{
  version: 2
  cluster_name: oracle
  transport: udpu
  token: 60000
}}
nodelist {{
{nodes}}}
quorum {{
  provider: corosync_votequorum
  expected_votes: {count}
}}
logging {{
  to_stderr: yes
  to_syslog: no
  to_logfile: no
}}
"""
COROSYNC_NODE: Final = """\
  node {{
    ring0_addr: {address}
    nodeid: {number}
    name: node{number}
  }}
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


class Guests:
    """One or two guests, which play the runs handed over. `shared` is a directory of theirs: plan, record, logs."""

    def __init__(self, shared: Path, runs: Sequence[dict[str, Any]], count: int = 1) -> None:
        self.shared = shared
        self.count = count
        self.record = shared / "record.jsonl"
        addresses = ADDRESSES if count > 1 else (LOOPBACK,)
        nodes = "".join(COROSYNC_NODE.format(address=each, number=at) for at, each in enumerate(addresses, 1))
        (shared / "corosync.conf").write_text(COROSYNC.format(nodes=nodes, count=count))
        (shared / "plan.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
        self.processes: list[subprocess.Popen[bytes]] = []

    def command(self, node: int, network: int | None) -> list[str]:
        """How to start a guest. `network` is the socket, if any, that is its network device."""
        here = Path(__file__).parent
        command = [
            *(shutil.which(KERNEL, path=PATH) or KERNEL, f"mem={MEMORY}", "quiet", "noreboot"),
            *("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"init={here / 'guest.sh'}"),
            *("con=null", "con0=null,fd:1", f"uml_dir={self.shared}", f"umid=guest{node}"),
            *(f"SHARED={self.shared}", f"PYTHON={Path(sys.executable).resolve()}", f"DRIVER={here / 'driver.py'}"),
            *(f"NODE={node}", f"NODES={self.count}"),
        ]
        if network is not None:
            command.append(f"vec0:transport=fd,fd={network},mac=02:00:00:00:00:{node:02x}")
            command.append(f"ADDRESS={ADDRESSES[node - 1]}")
            command.append(f"OTHERS={','.join(ADDRESSES[1:]) if node == 1 else 'serve'}")
        return command

    def start(self, node: int, network: int | None) -> None:
        with (self.shared / f"console.{node}.log").open("wb") as console:
            process = subprocess.Popen(
                self.command(node, network),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env={**os.environ, "TMPDIR": str(MEMORY_DIRECTORY)},
                start_new_session=True,
                pass_fds=() if network is None else (network,),
            )
        self.processes.append(process)

    def __enter__(self) -> "Guests":
        if self.count == 1:
            self.start(1, None)
        else:
            for node, end in enumerate(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM), 1):
                with end:
                    self.start(node, end.fileno())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def records(self) -> Iterator[dict[str, Any]]:
        """The recorded runs as they come. Raises GuestFailed."""
        heard = time.monotonic()
        done = 0
        while True:
            running = any(process.poll() is None for process in self.processes)
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
        for node in range(1, self.count + 1):
            outcome = self.shared / f"outcome.{node}"
            said = outcome.read_text().strip() if outcome.exists() else f"it did not come up: console.{node}.log"
            if said != "done":
                raise GuestFailed(f"node {node}: {said}")
