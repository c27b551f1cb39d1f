"""Agent `dummy`: does nothing, with scripted outcomes, for tests. It proves nothing about a real machine.

Parameter `script`: words separated by commas, one per action asked of this device, the last one repeating: `ok`,
`fail`, `hang` (until cancelled or timed out).
"""

import asyncio
from typing import Final

from corral.api.fence import POWERED
from corral.base.errors import ConfigurationError, FenceError
from corral.base.ids import NodeIncarnation

WORDS: Final = ("ok", "fail", "hang")


class DummyAgent:
    proof = POWERED

    def __init__(self, script: str = "ok") -> None:
        self._script = [word.strip() for word in script.split(",")]
        for word in self._script:
            if word not in WORDS:
                raise ConfigurationError(f"agent dummy: script has {word!r}; it knows {', '.join(WORDS)}")
        self._off: set[NodeIncarnation] = set()
        self.actions: list[tuple[str, NodeIncarnation]] = []

    async def off(self, victim: NodeIncarnation) -> None:
        await self._act("off", victim)
        self._off.add(victim)

    async def on(self, victim: NodeIncarnation) -> None:
        await self._act("on", victim)
        self._off.discard(victim)

    async def status(self, victim: NodeIncarnation) -> bool | None:
        return victim not in self._off

    async def _act(self, action: str, victim: NodeIncarnation) -> None:
        word = self._script[min(len(self.actions), len(self._script) - 1)]
        self.actions.append((action, victim))
        if word == "hang":
            await asyncio.get_running_loop().create_future()
        if word == "fail":
            raise FenceError(f"agent dummy was told to fail to switch node {victim.node} {action}")
