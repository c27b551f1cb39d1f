"""A participant of a node, spoken to by hand in the place of corrald."""

import asyncio
from typing import Any

import pytest

from corral.base.errors import ClusterError, NotMember
from corral.providers.ipc_wire import FROM_CORRALD, JoinRefused, LeftGroup, Refusal
from corral.providers.participant import Participant
from corral.sim.simulation import Simulation
from tests.unit.sim.rig import simulate

GROUP = "dlm:home"


class Rig:
    """`told` is what it says to corrald; it never opens a connection."""

    def __init__(self, sim: Simulation) -> None:
        world = sim.machines["n1"].attach("worker").world
        self.participant = Participant(world, "/run/c", "/state/p", lambda *_: Endpoint(), purpose="test")
        self.participant.comm = Endpoint()
        self.told: list[str] = []
        self.participant._tell = lambda message: self.told.append(type(message).__name__)  # type: ignore[method-assign]

    def hears(self, *messages: Any) -> None:
        self.participant.received([FROM_CORRALD.encode(message) for message in messages])

    async def registers(self) -> "asyncio.Task[None]":
        task = asyncio.ensure_future(self.participant.register(GROUP, 1, Service()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return task


class Service:
    def stop(self) -> None:
        pass


class Endpoint:
    address = "n1:1"

    def set_peer(self, *_: Any) -> None:
        raise AssertionError("there is none")

    forget = set_peer


def test_a_join_given_up_is_answered_before_the_next_is_asked() -> None:
    async def body(sim: Simulation) -> None:
        rig = Rig(sim)
        first = await rig.registers()
        first.cancel()
        second = await rig.registers()
        assert rig.told == ["Register", "Deregister"]
        rig.hears(LeftGroup(GROUP))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert rig.told == ["Register", "Deregister", "Register"]
        assert not second.done()  # the answer was to the first
        rig.hears(JoinRefused(GROUP, "no slot"))
        with pytest.raises(ClusterError, match="no slot"):
            await second

    simulate(body)


def test_what_follows_a_loss_in_one_breath_changes_nothing() -> None:
    async def body(sim: Simulation) -> None:
        rig = Rig(sim)
        task = await rig.registers()
        leaving = asyncio.ensure_future(rig.participant.leave(GROUP))
        await asyncio.sleep(0)
        rig.hears(Refusal("evicted: it hangs"), LeftGroup(GROUP))
        assert rig.participant.lost.result() == "evicted: it hangs"
        with pytest.raises(NotMember, match="it hangs"):
            await task
        with pytest.raises(NotMember, match="it hangs"):
            await leaving

    simulate(body)
