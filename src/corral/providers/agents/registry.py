"""Agent name -> Agent, one per device and, for programs, per use of it."""

from collections.abc import Mapping

from corral.api.fence import Agent, DeviceUse, FenceConfig
from corral.base.errors import ConfigurationError
from corral.base.ids import NodeId
from corral.base.world import World
from corral.providers.agents.dummy import DummyAgent
from corral.providers.agents.manual import ManualAgent
from corral.providers.agents.process import Identities, ProcessAgent
from corral.providers.agents.runner import Program, ProgramAgent


class Registry:
    """Built-in agents keep their state per device; a program's metadata is kept per program."""

    def __init__(
        self,
        world: World,
        config: FenceConfig,
        *,
        identities: Identities | None,
        machine_id: str,
        names: Mapping[NodeId, str],
    ) -> None:
        self._world = world
        self._config = config
        self._identities = identities
        self._machine_id = machine_id
        self._names = names
        self._built_in: dict[str, Agent] = {}
        self._programs: dict[str, Program] = {}

    def agent(self, use: DeviceUse) -> Agent:
        device = self._config.device(use.device)
        parameters = {**device.parameters, **use.parameters}
        if device.agent not in ("process", "manual", "dummy"):
            program = self.program(device.agent)
            return ProgramAgent(self._world, program, device, parameters, self._names)
        if device.name not in self._built_in:
            self._built_in[device.name] = self._make(device.agent, parameters)
        return self._built_in[device.name]

    def program(self, name: str) -> Program:
        if name not in self._programs:
            self._programs[name] = Program(self._world, name)
        return self._programs[name]

    def _make(self, name: str, parameters: Mapping[str, str]) -> Agent:
        if name == "manual":
            return ManualAgent()
        if name == "dummy":
            return DummyAgent(parameters.get("script", "ok"))
        if self._identities is None:
            raise ConfigurationError("agent process works only where corrald knows its peers' processes (`corral up`)")
        machine = parameters.get("machine", "")
        return ProcessAgent(self._world.process, self._identities, machine_id=self._machine_id, machine=machine)

    async def check(self) -> None:
        """Asks every configured program for its metadata and checks all uses of it. Raises ConfigurationError."""
        for node in sorted(self._config.nodes):
            for method in self._config.nodes[node].methods:
                for use in (use for group in method.groups for use in group):
                    agent = self.agent(use)
                    if isinstance(agent, ProgramAgent):
                        await agent.check(node, method.action)
