"""The demo's applications: processes on the nodes whose answers and acknowledgements come over pipes."""

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Final, final

from corral.base.world import ProcessId
from corral.cli.demo.checks import Acknowledged, Failed
from corral.real.process import boot_id, start_time


def start(reach: Sequence[str], job: str, *rest: str) -> "subprocess.Popen[bytes]":
    """`reach`: what worker.py is told about how to reach the files of a node."""
    return subprocess.Popen(
        [sys.executable, "-m", "corral.cli.demo.worker", *reach, job, *rest],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def result(process: "subprocess.Popen[bytes]", who: str, seconds: float) -> int:
    """Waits for its end and returns how much it did. Raises Failed with what it said."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Failed(f"{who} has not ended after {seconds:g} s") from None
    lines = output.decode(errors="replace").strip().splitlines() or [""]
    words = lines[-1].split()
    if words[:1] == ["done"]:
        return int(words[1])
    if words[:1] == ["stopped"]:
        raise Failed(f"{who} stopped: {' '.join(words[1:-1])}")
    raise Failed(f"{who} ended with status {process.returncode}: {lines[-1]}")


@final
class Writers:
    """Applications that write all the time, each acknowledgement taken as it comes."""

    def __init__(self) -> None:
        self.acknowledged = Acknowledged()
        self.processes: Final[dict[str, subprocess.Popen[bytes]]] = {}
        self._selector = selectors.DefaultSelector()
        self._tails: dict[str, bytes] = {}

    def start(self, name: str, reach: Sequence[str], job: str, *rest: str) -> None:
        process = start(reach, job, *rest)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self.processes[name] = process
        self._tails[name] = b""
        self._selector.register(process.stdout, selectors.EVENT_READ, name)

    def read_for(self, seconds: float) -> None:
        """Takes acknowledgements until the time is over or every writer has ended."""
        end = time.monotonic() + seconds
        while self._selector.get_map() and (left := end - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                self._take(key.data, key.fileobj)

    def _take(self, name: str, stream: Any) -> None:
        data = stream.read()
        if data == b"":
            self._selector.unregister(stream)
            stream.close()
            return
        lines = (self._tails[name] + (data or b"")).split(b"\n")
        self._tails[name] = lines.pop()
        for line in lines:
            self.acknowledged.take(name, line.decode("utf-8", "replace"))

    def identities(self, *names: str) -> list[ProcessId]:
        """Of those that live."""
        chosen = [self.processes[name] for name in names]
        return [ProcessId(p.pid, start_time(p.pid) or 0, boot_id()) for p in chosen if p.poll() is None]

    def still_running(self, seconds: float) -> list[str]:
        """Those that have not ended in that time: a process that closed its pipe still needs a moment to exit."""
        end = time.monotonic() + seconds
        while True:
            running = sorted(name for name, process in self.processes.items() if process.poll() is None)
            if not running or time.monotonic() > end:
                return running
            time.sleep(0.05)

    def kill(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()

    def end(self) -> None:
        for process in self.processes.values():
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._selector.close()
