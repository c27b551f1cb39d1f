"""Fence agents against the real thing: processes that are killed, programs that keep the FenceAgentAPI or do not."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corral.api.fence import Device, DeviceUse, FenceConfig, Method, NodeFencing
from corral.base.ids import NodeIncarnation
from corral.base.time import SECOND
from corral.base.world import ProcessId
from corral.fence.events import AttemptDone, CancelAttempt, RunAttempt
from corral.providers.agents.service import FenceAgents
from corral.real.world import RealWorld
from tests.unit.real.support import Bench, eventually, on_loop

VICTIM = NodeIncarnation(3, 7)
METADATA = Path(__file__).parents[1] / "unit" / "fence" / "metadata" / "fence_dummy.xml"

HEAD = f"""#!{sys.executable} -S
import os, sys, time
asked = dict(line.rstrip().split("=", 1) for line in sys.stdin)
if asked["action"] == "metadata":
    sys.stdout.write(open({str(METADATA)!r}).read())
    sys.exit(0)
here = os.path.dirname(os.path.abspath(__file__))
"""


@pytest.fixture
def sleepers() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Three processes that would run for an hour; whatever a test left of them is killed and reaped."""
    started = [subprocess.Popen(["sleep", "3600"]) for _ in range(3)]
    yield started
    for process in started:
        process.kill()
        process.wait()


class Node:
    """The service on a real World, and its answers."""

    def __init__(self, world: RealWorld, device: Device, **extra: Any) -> None:
        self.config = FenceConfig(devices=[device], nodes={3: NodeFencing([Method("m", [device.name])])})
        self.answers: asyncio.Queue[AttemptDone] = asyncio.Queue()
        self.agents = FenceAgents(world, self.config, self.answers.put_nowait, **extra)
        self._use = DeviceUse(device.name)
        self._next = 1

    def begin(self) -> int:
        attempt, self._next = self._next, self._next + 1
        self.agents.handle(RunAttempt(attempt, VICTIM, "m", ((self._use,),), "off", 20 * SECOND))
        return attempt

    async def off(self) -> AttemptDone:
        attempt = self.begin()
        answer = await self.answers.get()
        assert answer.attempt == attempt
        return answer


def script(directory: Path, body: str) -> str:
    path = directory / "agent"
    path.write_text(HEAD + body)
    path.chmod(0o700)
    return str(path)


def identified(world: RealWorld, process: "subprocess.Popen[bytes]") -> ProcessId:
    identity = world.process.identify(process.pid)
    assert identity is not None
    return identity


# --- process ---------------------------------------------------------------------------------------------------------


def test_process_kills_every_process_of_the_victim_and_no_other(
    tmp_path: Path, sleepers: list["subprocess.Popen[bytes]"]
) -> None:
    async def body(bench: Bench) -> None:
        world = bench.world()
        victims = [identified(world, process) for process in sleepers[:2]]
        node = Node(world, Device("process", "process"), identities=lambda victim: victims)
        answer = await node.off()
        assert (answer.ok, answer.text) == (True, "")
        assert all(world.process.is_gone(victim) for victim in victims)
        assert not world.process.is_gone(identified(world, sleepers[2]))

    on_loop(tmp_path, body)
    assert [process.poll() for process in sleepers] == [-signal.SIGKILL, -signal.SIGKILL, None]


def test_process_kills_a_stopped_process(tmp_path: Path, sleepers: list["subprocess.Popen[bytes]"]) -> None:
    async def body(bench: Bench) -> None:
        world = bench.world()
        os.kill(sleepers[0].pid, signal.SIGSTOP)
        victims = [identified(world, sleepers[0])]
        assert (await Node(world, Device("process", "process"), identities=lambda victim: victims).off()).ok

    on_loop(tmp_path, body)
    assert sleepers[0].poll() == -signal.SIGKILL


def test_process_leaves_a_reused_pid_alone(tmp_path: Path, sleepers: list["subprocess.Popen[bytes]"]) -> None:
    """A newer process under the pid of one of the victim's: another start time, so the victim's is gone."""

    async def body(bench: Bench) -> None:
        world = bench.world()
        now = identified(world, sleepers[0])
        before = now._replace(start=now.start - 1)
        assert (await Node(world, Device("process", "process"), identities=lambda victim: [before]).off()).ok

    on_loop(tmp_path, body)
    assert sleepers[0].poll() is None


def test_process_believes_nothing_about_another_boot(tmp_path: Path, sleepers: list["subprocess.Popen[bytes]"]) -> None:
    async def body(bench: Bench) -> None:
        world = bench.world()
        elsewhere = identified(world, sleepers[0])._replace(boot_id="11111111-2222-3333-4444-555555555555")
        answer = await Node(world, Device("process", "process"), identities=lambda victim: [elsewhere]).off()
        assert not answer.ok
        assert "cannot reach another machine" in answer.text

    on_loop(tmp_path, body)
    assert sleepers[0].poll() is None


# --- programs --------------------------------------------------------------------------------------------------------

HONEST = """
state = os.path.join(here, "power")
if asked["action"] == "status":
    sys.exit(2 if os.path.exists(state) else 0)
if asked["action"] == "off":
    open(state, "w").write(asked["nodename"])
"""


def run(tmp_path: Path, body: str, **device: Any) -> AttemptDone:
    answers: list[AttemptDone] = []
    path = script(tmp_path, body)

    async def main(bench: Bench) -> None:
        answers.append(await Node(bench.world(), Device("d", path, **device)).off())

    on_loop(tmp_path, main)
    return answers[0]


def test_an_honest_program(tmp_path: Path) -> None:
    assert run(tmp_path, HONEST).ok
    assert (tmp_path / "power").read_text() == "node3"


def test_a_program_that_lies(tmp_path: Path) -> None:
    answer = run(tmp_path, "sys.exit(0)")
    assert (answer.ok, answer.text.endswith("but its status says that node 3 is on")) == (False, True)


def test_a_program_that_fails(tmp_path: Path) -> None:
    answer = run(tmp_path, "sys.stderr.write('Unable to connect\\n'); sys.exit(1)")
    assert (answer.ok, answer.text) == (False, f"{tmp_path}/agent off: failed with status 1: Unable to connect")


def test_a_program_that_kills_itself(tmp_path: Path) -> None:
    assert run(tmp_path, "os.kill(os.getpid(), 9)").text.endswith("off: killed by signal 9")


def test_a_program_that_prints_megabytes_of_garbage(tmp_path: Path) -> None:
    body = "for _ in range(64): os.write(1, os.urandom(1 << 16)); os.write(2, bytes(range(256)) * 256)\nsys.exit(1)"
    answer = run(tmp_path, body)
    assert not answer.ok
    assert answer.text.isprintable()
    assert len(answer.text) < 1024


def test_a_program_that_does_not_read_and_closes_everything(tmp_path: Path) -> None:
    body = "os.close(0); os.close(1); os.close(2); os._exit(1)"
    assert run(tmp_path, body).text == f"{tmp_path}/agent off: failed with status 1"


def test_a_program_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    path.write_text("no interpreter line")
    path.chmod(0o700)
    answers: list[AttemptDone] = []

    async def main(bench: Bench) -> None:
        answers.append(await Node(bench.world(), Device("d", str(path))).off())
        path.chmod(0o600)
        answers.append(await Node(bench.world(), Device("d", str(path))).off())
        path.unlink()
        answers.append(await Node(bench.world(), Device("d", str(path))).off())

    on_loop(tmp_path, main)
    texts = [answer.text for answer in answers]
    assert "cannot be started: Exec format error" in texts[0]
    assert "cannot be started: Permission denied" in texts[1]
    assert "install it" in texts[2]


HANG = """
import subprocess
child = subprocess.Popen(["sleep", "3600"])
open(os.path.join(here, "child.tmp"), "w").write(str(child.pid))
os.rename(os.path.join(here, "child.tmp"), os.path.join(here, "child"))
time.sleep(3600)
"""


def no_such_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"


@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_a_program_that_hangs_is_killed_with_its_children(tmp_path: Path, how: str) -> None:
    path = script(tmp_path, HANG)

    async def main(bench: Bench) -> None:
        node = Node(bench.world(), Device("d", path, timeout=1.5 if how == "timeout" else 60))
        attempt = node.begin()
        if how == "cancel":
            await eventually((tmp_path / "child").exists)
            node.agents.handle(CancelAttempt(attempt))
        answer = await node.answers.get()
        assert not answer.ok
        assert answer.text in (
            "stopped",
            "device d did not answer within 1.5 s",
            f"{path} off: did not end within 1.5 s and was killed",
        )
        child = int((tmp_path / "child").read_text())
        await eventually(lambda: no_such_process(child))

    on_loop(tmp_path, main)


def test_a_password_is_not_to_be_seen_in_the_process_list(tmp_path: Path) -> None:
    body = """
seen = open("/proc/self/cmdline").read() + open("/proc/self/environ").read()
sys.stderr.write("refused " + asked["password"])
sys.exit(7 if asked["password"] in seen else 1)
"""
    answer = run(tmp_path, body, parameters={"password": "correct-horse"})
    assert answer.text == f"{tmp_path}/agent off: failed with status 1: refused ***"
