"""Attempts under way: what one is made of, and whether there is room for another."""

from collections.abc import Mapping
from typing import Final, final

from corral.api.fence import FenceConfig, Method
from corral.base.ids import NodeIncarnation
from corral.base.time import SECOND, Instant, Nanoseconds, from_seconds
from corral.fence.events import RunAttempt
from corral.fence.wire import TEXT_MAX

GRACE: Final[Nanoseconds] = 5 * SECOND  # a runner that does not answer this long after its timeout is given up


@final
class Attempt:
    """A RunAttempt that has not been answered. `live`: a success still counts (it was not given up by time).
    `abandoned`: the round it was begun in is over, so a failure says nothing any more."""

    __slots__ = (
        "abandoned",
        "action",
        "agents",
        "devices",
        "gives_up_at",
        "id",
        "live",
        "method",
        "proof",
        "started",
        "victim",
    )

    def __init__(
        self,
        id: int,
        victim: NodeIncarnation,
        method: str,
        action: str,
        proof: int,
        devices: tuple[str, ...],
        agents: str,
        started: Instant,
        gives_up_at: Instant,
    ) -> None:
        self.id = id
        self.victim = victim
        self.method = method
        self.action = action
        self.proof = proof
        self.devices = devices
        self.agents = agents
        self.started = started
        self.gives_up_at = gives_up_at
        self.live = True
        self.abandoned = False


def make_attempt(
    id: int, now: Instant, victim: NodeIncarnation, method: Method, action: str, config: FenceConfig
) -> tuple[Attempt, RunAttempt]:
    groups = method.groups
    devices = [config.device(use.device) for group in groups for use in group]
    timeout = sum(max(from_seconds(config.device(use.device).timeout) for use in group) for group in groups)
    attempt = Attempt(
        id,
        victim,
        method.name,
        action,
        config.proof_of(method),
        tuple(sorted({device.name for device in devices})),
        ", ".join(dict.fromkeys(device.agent for device in devices))[:TEXT_MAX],
        now,
        now + timeout + GRACE,
    )
    return attempt, RunAttempt(id, victim, method.name, groups, action, timeout)


def has_room_for(method: Method, attempts: Mapping[int, Attempt], config: FenceConfig) -> bool:
    """No more attempts at once than `concurrent`, and no device with more victims than its `limit`."""
    if len(attempts) >= config.concurrent:
        return False
    for group in method.groups:
        for use in group:
            limit = config.device(use.device).limit
            at_work = sum(use.device in attempt.devices for attempt in attempts.values())
            if limit and at_work >= limit:
                return False
    return True


def method_of(attempt: Attempt, config: FenceConfig) -> Method | None:
    fencing = config.nodes.get(attempt.victim.node)
    for method in fencing.methods if fencing is not None else ():
        if method.name == attempt.method:
            return method
    return None
