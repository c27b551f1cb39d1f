"""A power switch for simulated machines that speaks the FenceAgentAPI: the fence agent of whole-node runs.

    PowerSwitch(sim).install()              # World.process.run([PATH], b"action=off\\nplug=n2\\n", ...)

Its own network is separate: no partition reaches it. `off` answers only when nothing of the machine can act any more,
writes that outlive a power cut included, so its proof is POWERED. `works` False: it answers that it failed.
"""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from corral.base.time import MILLISECOND, SECOND
from corral.base.world import Completed, World

if TYPE_CHECKING:
    from corral.sim.machine import Machine
    from corral.sim.simulation import Simulation

PATH: Final = "/usr/sbin/fence_sim"
STATUS_OFF: Final = 2  # FenceAgentAPI: status of a plug that is off
METADATA: Final = b"""<?xml version="1.0" ?>
<resource-agent name="fence_sim" shortdesc="Power switch of the simulator">
<longdesc>Cuts and restores the power of simulated machines.</longdesc>
<parameters>
<parameter name="action" unique="0" required="1"><content type="string" default="reboot"/></parameter>
<parameter name="plug" unique="0" required="1"><content type="string"/></parameter>
</parameters>
<actions>
<action name="on" automatic="0"/>
<action name="off"/>
<action name="reboot"/>
<action name="status"/>
<action name="monitor"/>
<action name="metadata"/>
</actions>
</resource-agent>
"""


class PowerSwitch:
    """`took_ns`: how long it takes to switch, drawn up to twice that. `cuts` counts."""

    def __init__(self, sim: "Simulation", *, took_ns: int = 300 * MILLISECOND) -> None:
        self._sim = sim
        self._took_ns = took_ns
        self.works = True
        self.cuts = 0

    def install(self, path: str = PATH) -> None:
        self._sim.program(path, self)

    async def __call__(self, world: World, argv: Sequence[str], stdin: bytes) -> Completed:
        asked = dict(line.partition("=")[::2] for line in stdin.decode().splitlines())
        action = asked.get("action", "reboot")
        if action == "metadata":
            return Completed(0, METADATA, b"")
        await asyncio.sleep(self._took_ns * (1 + world.rng.random()) / SECOND)
        machine = self._machine(asked.get("plug", ""))
        if machine is None or not self.works:
            return Completed(1, b"", b"the switch does not answer\n" if machine else b"no such plug\n")
        if action in ("status", "monitor"):
            return Completed(0 if machine.powered or action == "monitor" else STATUS_OFF, b"", b"")
        if action in ("off", "reboot"):
            self.cuts += machine.powered
            machine.power_cut()
            await asyncio.sleep(self._sim.knobs.outlive / SECOND)
        if action in ("on", "reboot"):
            machine.boot()
        return Completed(0, b"", b"")

    def _machine(self, plug: str) -> "Machine | None":
        """By its name, or as `node<id>`."""
        for machine in self._sim.machines.values():
            if plug in (machine.name, f"node{machine.node}"):
                return machine
        return None
