"""Agent `manual`: an operator makes sure that the node is off and says so. Proof: MANUAL, a recorded word.

The word does not come through here: `corral fence ack` goes to the engine of any member (ManualAck). This agent only
says what is waited for. It fails at once instead of waiting, because a node on which an agent works may not join, and a
node that comes back clean is the other way to end the wait.
"""

from corral.api.fence import MANUAL
from corral.base.errors import FenceError
from corral.base.ids import NodeIncarnation


class ManualAgent:
    proof = MANUAL

    async def off(self, victim: NodeIncarnation) -> None:
        node = victim.node
        raise FenceError(f"waiting for an operator: make sure that node {node} is off, then `corral fence ack {node}`")

    async def on(self, victim: NodeIncarnation) -> None:
        raise FenceError(f"node {victim.node} was fenced by hand; it is switched on by hand")

    async def status(self, victim: NodeIncarnation) -> bool | None:
        return None
