"""Runs the fence engine's attempts: groups of devices in order, those of a group at once, all within the timeout.

Every RunAttempt is answered by exactly one AttemptDone, whatever the agent does: one that does not end when it is told
to is left behind after STOP_WITHIN, and the answer says so.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

from corral.api.fence import DeviceUse, FenceConfig
from corral.base.errors import ClusterError, FenceError
from corral.base.ids import NodeId, NodeIncarnation
from corral.base.time import Seconds, to_seconds
from corral.base.world import World
from corral.fence.events import AttemptDone, CancelAttempt, RunAttempt
from corral.fence.wire import TEXT_MAX
from corral.providers.agents.process import Identities
from corral.providers.agents.registry import Registry

STOP_WITHIN: Final[Seconds] = 2.0  # of the engine's grace: after this an agent counts as unstoppable


class FenceAgents:
    """`feed` takes the answers. `names` maps nodes to what devices call them (default "nodeN"). `wanted(victim)` is
    asked just before each device works: False means that the victim has rejoined in the meantime."""

    def __init__(
        self,
        world: World,
        config: FenceConfig,
        feed: Callable[[AttemptDone], None],
        *,
        identities: Identities | None = None,
        machine_id: str = "",
        names: Mapping[NodeId, str] | None = None,
        wanted: Callable[[NodeIncarnation], bool] | None = None,
    ) -> None:
        self._world = world
        self._config = config
        self._feed = feed
        self._wanted = wanted
        self.registry: Final = Registry(world, config, identities=identities, machine_id=machine_id, names=names or {})
        self._attempts: dict[int, tuple[asyncio.Future[None], asyncio.Task[Any]]] = {}

    def handle(self, event: RunAttempt | CancelAttempt) -> None:
        """What the engine emitted. Never raises, never waits."""
        if isinstance(event, RunAttempt):
            stop = self._world.future()
            name = f"fence: node {event.victim.node} {event.action} by {event.method}"
            self._attempts[event.attempt] = stop, self._world.spawn(self._answer(event, stop), name)
        elif event.attempt in self._attempts:
            _resolve(self._attempts[event.attempt][0])

    async def close(self) -> None:
        """Stops every attempt and waits until each has been answered."""
        attempts = list(self._attempts.values())
        for stop, _task in attempts:
            _resolve(stop)
        if attempts:
            await asyncio.wait([task for _stop, task in attempts])

    async def _answer(self, event: RunAttempt, stop: "asyncio.Future[None]") -> None:
        # A future stops it, not a cancelled task: a task cancelled before its first step would never answer.
        work = asyncio.ensure_future(self._work(event))
        timeout = to_seconds(event.timeout_ns)
        try:
            await asyncio.wait((work, stop), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the World closes: nobody is left to be answered
            work.cancel()
            raise
        if work.done():
            ok, text = _outcome(work)
        else:
            ok, text = False, "stopped" if stop.done() else f"no answer within {timeout:g} s"
            if not await _end(work):
                text += ", and the agent could not be stopped"
        del self._attempts[event.attempt]
        self._feed(AttemptDone(event.attempt, ok, text[:TEXT_MAX], self._world.wall_seconds()))

    async def _work(self, event: RunAttempt) -> None:
        for group in event.groups:
            if len(group) == 1:
                await self._device(event, group[0])
                continue
            try:
                async with asyncio.TaskGroup() as tasks:
                    for use in group:
                        tasks.create_task(self._device(event, use))
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None

    async def _device(self, event: RunAttempt, use: DeviceUse) -> None:
        if event.action == "off" and self._wanted is not None and not self._wanted(event.victim):
            raise FenceError(f"node {event.victim.node} has joined again: not fenced any more")
        device = self._config.device(use.device)
        agent = self.registry.agent(use)
        action = agent.off if event.action == "off" else agent.on
        try:
            async with asyncio.timeout(device.timeout):
                await action(event.victim)
        except TimeoutError:
            raise FenceError(f"device {device.name} did not answer within {device.timeout:g} s") from None


def _outcome(work: "asyncio.Future[None]") -> tuple[bool, str]:
    error = work.exception()
    if error is None:
        return True, ""
    if isinstance(error, ClusterError | OSError):
        return False, str(error) or type(error).__name__
    raise error  # ours: the node stops, and is fenced


async def _end(work: "asyncio.Future[None]") -> bool:
    work.cancel()
    await asyncio.wait((work,), timeout=STOP_WITHIN)
    if work.done() and not work.cancelled():
        work.exception()  # a late outcome counts for nothing; asked for so that asyncio does not complain
    return work.done()


def _resolve(stop: "asyncio.Future[None]") -> None:
    if not stop.done():
        stop.set_result(None)
