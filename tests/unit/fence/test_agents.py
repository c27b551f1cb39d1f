"""Agents and the service that runs them, over a fake World in virtual time."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from corral.api.fence import Device, DeviceUse, FenceConfig, Method, NodeFencing
from corral.base.errors import ConfigurationError, FenceError
from corral.base.ids import NodeIncarnation
from corral.base.time import SECOND
from corral.base.world import Completed, ProcessId
from corral.fence.events import AttemptDone, CancelAttempt, RunAttempt
from corral.providers.agents.process import ProcessAgent
from corral.providers.agents.service import FenceAgents
from tests.unit.fence.fake_world import BOOT, FakeWorld, in_virtual_time

VICTIM = NodeIncarnation(3, 7)
METADATA = Path(__file__).parent / "metadata"
OK = Completed(0, b"", b"")


# --- process ---------------------------------------------------------------------------------------------------------


def process_agent(world: FakeWorld, listed: list[ProcessId] | None, **machines: str) -> ProcessAgent:
    return ProcessAgent(world.process, lambda victim: listed, **machines)  # type: ignore[arg-type]


def refused(agent: Any, action: str = "off") -> str:
    with pytest.raises(FenceError) as caught:
        in_virtual_time(getattr(agent, action)(VICTIM))
    return str(caught.value)


def test_process_kills_all_and_sees_them_gone() -> None:
    world = FakeWorld()
    corrald, mount = ProcessId(30, 5, BOOT), ProcessId(31, 6, BOOT)
    world.process.alive = {corrald, mount}
    agent = process_agent(world, [corrald, mount])
    assert in_virtual_time(agent.status(VICTIM)) is True
    in_virtual_time(agent.off(VICTIM))
    assert not world.process.alive
    assert in_virtual_time(agent.status(VICTIM)) is False


def test_process_also_kills_what_comes_to_light_meanwhile() -> None:
    world = FakeWorld()
    first, second = ProcessId(30, 5, BOOT), ProcessId(31, 6, BOOT)
    world.process.alive = {first, second}
    known = [first]

    def identities(victim: NodeIncarnation) -> list[ProcessId]:
        listed = list(known)
        known[:] = [first, second]
        return listed

    in_virtual_time(ProcessAgent(world.process, identities).off(VICTIM))  # type: ignore[arg-type]
    assert not world.process.alive


def test_process_refuses_what_it_cannot_know_or_reach() -> None:
    world = FakeWorld()
    elsewhere = [ProcessId(30, 5, "other-boot")]
    assert "nothing is known" in refused(process_agent(world, None))
    assert "cannot reach another machine" in refused(process_agent(world, elsewhere))
    assert "machine m2" in refused(process_agent(world, [], machine_id="m1", machine="m2"))
    assert "corral node start 3" in refused(process_agent(world, []), "on")
    assert world.process.killed == []


def test_an_earlier_boot_of_this_very_machine_is_gone() -> None:
    world = FakeWorld()
    elsewhere = [ProcessId(30, 5, "other-boot")]
    in_virtual_time(process_agent(world, elsewhere, machine_id="m1", machine="m1").off(VICTIM))
    assert world.process.killed == []


def test_process_never_kills_its_own_corrald() -> None:
    world = FakeWorld()
    with pytest.raises(AssertionError, match="FENCE-2"):
        in_virtual_time(process_agent(world, [world.process.me]).off(VICTIM))


# --- the service -----------------------------------------------------------------------------------------------------


class Service:
    """Runs attempts of one node's methods and keeps the answers."""

    def __init__(self, devices: list[Device], **extra: Any) -> None:
        self.world = FakeWorld()
        names = [device.name for device in devices]
        self.config = FenceConfig(devices=devices, nodes={3: NodeFencing([Method("m", names)])})
        self.answers: list[AttemptDone] = []
        self.agents = FenceAgents(self.world, self.config, self.answers.append, **extra)  # type: ignore[arg-type]

    def program(self, path: str, main: Any) -> None:
        self.world.process.programs[path] = main

    def attempt(self, *groups: tuple[str, ...], action: str = "off", timeout: float = 100) -> RunAttempt:
        uses = tuple(tuple(DeviceUse(name) for name in group) for group in groups)
        return RunAttempt(1, VICTIM, "m", uses, action, round(timeout * SECOND))

    def run(self, *groups: tuple[str, ...], action: str = "off", timeout: float = 100) -> AttemptDone:
        async def body() -> None:
            self.agents.handle(self.attempt(*groups, action=action, timeout=timeout))
            await asyncio.sleep(2 * timeout)

        in_virtual_time(body())
        assert len(self.answers) == 1
        return self.answers.pop()


def dummies(**scripts: str) -> Service:
    return Service([Device(name, "dummy", {"script": script}, timeout=10) for name, script in scripts.items()])


def test_all_devices_must_succeed_in_order() -> None:
    assert dummies(a="ok", b="ok").run(("a",), ("b",)).ok
    service = dummies(a="fail", b="ok")
    answer = service.run(("a",), ("b",))
    assert (answer.ok, answer.text) == (False, "agent dummy was told to fail to switch node 3 off")
    assert service.agents.registry.agent(DeviceUse("b")).actions == []  # type: ignore[attr-defined]


def test_a_group_works_at_once_and_fails_whole() -> None:
    assert dummies(a="ok", b="ok").run(("a", "b")).ok
    assert not dummies(a="hang", b="fail").run(("a", "b")).ok


def test_a_script_goes_on_from_attempt_to_attempt() -> None:
    service = dummies(a="fail,fail,ok")
    assert [service.run(("a",)).ok for _ in range(4)] == [False, False, True, True]


def test_a_timeout_is_a_failure() -> None:
    service = dummies(a="hang")
    assert service.run(("a",)).text == "device a did not answer within 10 s"
    assert service.run(("a",), timeout=3).text == "no answer within 3 s"


@pytest.mark.parametrize("at_once", [True, False])
def test_cancel_is_answered_also_before_the_first_step(at_once: bool) -> None:
    service = dummies(a="hang")

    async def body() -> None:
        service.agents.handle(service.attempt(("a",)))
        if not at_once:
            await asyncio.sleep(1)
        service.agents.handle(CancelAttempt(1))
        service.agents.handle(CancelAttempt(2))
        await asyncio.sleep(1)

    in_virtual_time(body())
    assert [(answer.attempt, answer.ok, answer.text) for answer in service.answers] == [(1, False, "stopped")]


def test_close_answers_everything() -> None:
    service = dummies(a="hang")

    async def body() -> None:
        await service.agents.close()
        service.agents.handle(service.attempt(("a",)))
        await service.agents.close()

    in_virtual_time(body())
    assert len(service.answers) == 1


def test_an_agent_that_cannot_be_stopped_is_left_behind() -> None:
    service = Service([Device("a", "fence_x")])

    async def stubborn(lines: dict[str, str]) -> Completed:
        while True:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                continue

    service.program("/usr/sbin/fence_x", stubborn)

    async def body() -> None:
        service.agents.handle(service.attempt(("a",)))
        await asyncio.sleep(1)
        service.agents.handle(CancelAttempt(1))
        await asyncio.sleep(5)

    in_virtual_time(body())
    assert service.answers[0].text == "stopped, and the agent could not be stopped"


def test_a_victim_that_came_back_is_left_alone() -> None:
    service = Service([Device("a", "dummy")], wanted=lambda victim: False)
    assert service.run(("a",)).text == "node 3 has joined again: not fenced any more"


def test_manual_says_what_to_do() -> None:
    assert "`corral fence ack 3`" in Service([Device("a", "manual")]).run(("a",)).text


def test_process_needs_to_know_the_processes() -> None:
    assert "corral up" in Service([Device("a", "process")]).run(("a",)).text


# --- programs --------------------------------------------------------------------------------------------------------


class Machine:
    """A power switch with the FenceAgentAPI; `lies` reports success and does nothing."""

    def __init__(self, metadata: str = "fence_apc", *, lies: bool = False, status: int | None = None) -> None:
        self.on = True
        self.lies = lies
        self.status = status
        self.metadata = metadata
        self.asked: list[dict[str, str]] = []

    async def main(self, lines: dict[str, str]) -> Completed:
        self.asked.append(lines)
        action = lines["action"]
        if action == "metadata":
            return Completed(0, (METADATA / f"{self.metadata}.xml").read_bytes(), b"")
        if action == "status":
            return Completed(self.status if self.status is not None else 0 if self.on else 2, b"", b"")
        if not self.lies:
            self.on = action == "on"
        return OK


PDU = Device("pdu", "fence_apc", {"ip": "10.0.0.9", "username": "u", "password": "hunter2"}, timeout=20)


def switch(machine: Machine, device: Device = PDU, **extra: Any) -> Service:
    service = Service([device], **extra)
    service.program("/usr/sbin/fence_apc", machine.main)
    return service


def test_off_is_confirmed_by_status() -> None:
    machine = Machine()
    assert switch(machine).run(("pdu",)).ok
    assert [lines["action"] for lines in machine.asked] == ["metadata", "off", "status"]


def test_a_program_that_lies_is_caught() -> None:
    answer = switch(Machine(lies=True)).run(("pdu",))
    assert answer.text == "fence_apc reported success, but its status says that node 3 is on"
    answer = switch(Machine(status=1)).run(("pdu",))
    assert "its status cannot confirm it: failed with status 1" in answer.text


def test_a_program_without_status_and_a_gate_are_not_asked() -> None:
    machine = Machine("fence_kdump", lies=True)
    assert switch(machine).run(("pdu",)).ok
    gate = Machine(lies=True)
    assert switch(gate, Device("pdu", "fence_apc", proof="none")).run(("pdu",)).ok


def test_the_victim_is_named_by_nodename_and_plug() -> None:
    machine = Machine()
    switch(machine, names={3: "rack1-c"}).run(("pdu",))
    assert machine.asked[1] == {
        **PDU.parameters,
        "action": "off",
        "nodename": "rack1-c",
        "plug": "rack1-c",
    }
    machine = Machine()
    switch(machine, Device("pdu", "fence_apc", {"port": "7"})).run(("pdu",))
    assert machine.asked[1] == {"action": "off", "nodename": "node3", "port": "7"}


def test_a_password_is_neither_in_argv_nor_in_what_we_say() -> None:
    async def talkative(lines: dict[str, str]) -> Completed:
        return Completed(1, b"", b"first\n" + f"login with {lines.get('password')} refused\x1b[31m\n".encode())

    service = Service([PDU])
    service.program("/usr/sbin/fence_apc", talkative)
    answer = service.run(("pdu",))
    assert answer.text == "fence_apc off: failed with status 1: login with *** refused?[31m"
    assert {argv for argv, _ in service.world.process.ran} == {"/usr/sbin/fence_apc"}


def test_a_missing_program_is_named_with_what_to_install() -> None:
    assert "install it, e.g. package fence-agents" in Service([PDU]).run(("pdu",)).text
    assert "there is no fence agent /opt/x:" in Service([Device("d", "/opt/x")]).run(("d",)).text


def test_a_hanging_program_is_a_failure() -> None:
    async def hang(lines: dict[str, str]) -> Completed:
        await asyncio.sleep(10**6)
        return OK

    service = Service([PDU])
    service.program("/usr/sbin/fence_apc", hang)
    assert service.run(("pdu",)).text == "device pdu did not answer within 20 s"
    assert [stdin for _, stdin in service.world.process.ran][:1] == [b"action=metadata\n"]
    assert b"action=off" in service.world.process.ran[1][1], (
        "an agent that says nothing of itself is tried all the same"
    )


def test_the_configuration_is_checked_with_the_programs() -> None:
    def check(device: Device) -> Coroutine[Any, Any, None]:
        return switch(Machine(), device).agents.registry.check()

    in_virtual_time(check(PDU))
    with pytest.raises(ConfigurationError, match="node 3, device pdu: agent fence_apc needs parameter username"):
        in_virtual_time(check(Device("pdu", "fence_apc", {"ip": "10.0.0.9"})))
    with pytest.raises(ConfigurationError, match="there is no fence agent"):
        in_virtual_time(check(Device("pdu", "fence_zzz")))
