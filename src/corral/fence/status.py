"""What each victim waits for, in one sentence (`corral fence status`)."""

from typing import NamedTuple

from corral.api.fence import ANY_INCARNATION, VictimStatus
from corral.base.ids import NodeId
from corral.base.time import FOREVER, Instant, to_seconds
from corral.fence.attempt import Attempt
from corral.fence.victim import Victim


class Timings(NamedTuple):
    """What the sentences need beside the victim. `order` is () between rounds."""

    now: Instant
    me: NodeId
    order: tuple[NodeId, ...]


def describe(victim: Victim, attempt: Attempt | None, timings: Timings) -> VictimStatus:
    fencer = timings.order[victim.turn % len(timings.order)] if timings.order else 0
    return VictimStatus(
        victim=victim.incarnation,
        fencer=fencer,
        turn=victim.turn,
        method=attempt.method if attempt is not None else victim.remote,
        running=attempt is not None or victim.remote != "",
        failures=victim.failures,
        last_error=victim.last_error,
        waits_for=_sentence(victim, attempt, fencer, timings),
    )


def _sentence(victim: Victim, attempt: Attempt | None, fencer: NodeId, timings: Timings) -> str:
    node = victim.node
    if attempt is not None:
        spent = to_seconds(timings.now - attempt.started)
        return f"waiting for agent {attempt.agents} here to fence node {node} by {attempt.method}, {spent:.1f} s so far"
    if not timings.order:
        return f"node {node} must be fenced; waiting for a quorate view"
    if victim.remote:
        return f"waiting for node {fencer} to fence node {node} by {victim.remote}"
    if victim.waits_delay and victim.not_before >= FOREVER:
        return f"waiting for node {node} to join (post_join_delay is -1); or `corral fence ack {node}`"
    if timings.now < victim.not_before:
        left = to_seconds(victim.not_before - timings.now)
        if victim.waits_delay:
            why = (
                "has not joined since the cluster started"
                if victim.incarnation.incarnation == ANY_INCARNATION
                else "failed"
            )
            return f"node {node} {why}; it is fenced in {left:.1f} s unless it joins clean before"
        return (
            f"fencing node {node} failed ({victim.last_error}); next try in {left:.1f} s; "
            f"if you know that it is off: `corral fence ack {node}`"
        )
    if fencer != timings.me:
        return f"waiting for node {fencer} to fence node {node}"
    return f"waiting for a free fence device to fence node {node}"
