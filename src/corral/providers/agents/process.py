"""Agent `process`: nodes that are processes of one machine (`corral up`) are fenced by killing them. Proof: KILLED.

What it is told. `identities(victim)` names every process that was seen of that incarnation: its corrald (from its
hello) and its participants (from their ordered joins), each as pid, start time and boot id; None when nothing is known
of it. For a victim of incarnation 0 (a node missing when the cluster first formed) it is everything that is known of
any life of that node that is over. Nothing is needed from the victim.

What it may conclude. A pid means something only under the kernel it was read from, so the boot id must be this one.
Another boot id is either an earlier boot of this machine, then the process is gone, or another machine, then this agent
can neither reach it nor know; a boot id alone cannot tell which. They are told apart by machine identity: the device's
parameter `machine` says on which machine (its /etc/machine-id) all nodes run; only when that is this machine does
another boot id count as gone. Without the parameter it is an error, and a `machine` that is not this one always is.
"""

from collections.abc import Callable
from typing import Final

from corral.api.fence import KILLED
from corral.base.errors import FenceError
from corral.base.ids import NodeIncarnation
from corral.base.world import Processes, ProcessId

Identities = Callable[[NodeIncarnation], list[ProcessId] | None]

SWEEPS_MAX: Final = 8  # times that killing may bring processes to light that were not known before


class ProcessAgent:
    """Kills exactly the victim incarnation's processes: a newer incarnation has other pids or start times."""

    proof = KILLED

    def __init__(self, process: Processes, identities: Identities, *, machine_id: str = "", machine: str = "") -> None:
        self._process = process
        self._identities = identities
        self._machine_id = machine_id
        self._machine = machine

    async def off(self, victim: NodeIncarnation) -> None:
        seen: set[ProcessId] = set()
        for _sweep in range(SWEEPS_MAX):
            listed = self._reachable(victim)
            if seen.issuperset(listed):
                break
            seen.update(listed)
            for process in listed:
                self._process.kill(process)
            for process in listed:
                await self._process.wait_gone(process)
        else:
            raise FenceError(f"new processes of node {victim.node} came up while it was being killed")
        left = [process.pid for process in sorted(seen) if not self._process.is_gone(process)]
        if left:
            raise FenceError(f"processes {left} of node {victim.node} are still there after SIGKILL")

    async def on(self, victim: NodeIncarnation) -> None:
        raise FenceError(f"agent process cannot start node {victim.node}: use `corral node start {victim.node}`")

    async def status(self, victim: NodeIncarnation) -> bool | None:
        return not all(self._process.is_gone(process) for process in self._reachable(victim))

    def _reachable(self, victim: NodeIncarnation) -> list[ProcessId]:
        """The victim's processes under this kernel, sorted. Raises FenceError when there may be others elsewhere."""
        if self._machine and self._machine != self._machine_id:
            raise FenceError(f"node {victim.node} runs on machine {self._machine}; agent process reaches only this one")
        listed = self._identities(victim)
        if listed is None:
            raise FenceError(
                f"nothing is known of the processes of node {victim.node}, so they cannot be killed: "
                f"if you know that it is off, `corral fence ack {victim.node}`"
            )
        me = self._process.me
        assert me not in listed, "FENCE-2"
        here = sorted(process for process in listed if process.boot_id == me.boot_id)
        if len(here) < len(listed) and not self._machine:
            raise FenceError(
                f"node {victim.node} ran under another kernel than this one: agent process cannot reach another "
                f"machine (if it is this one, before a reboot, set the device's parameter `machine`)"
            )
        return here
