"""Whole nodes in virtual time: the seeds that once failed, a few fresh ones, and that a seed replays."""

from pathlib import Path

import msgspec
import pytest

from corral.api.fence import FenceConfig
from corral.base.errors import ConfigurationError
from corral.base.ids import NO_VIEW
from corral.base.view import QuorumRecord
from corral.cman.state import first_state
from corral.cman.timing import Timing
from corral.cman.wire import RECORDS
from corral.node.config import ClusterConfig, NodeConfig
from corral.node.node import Node
from corral.sim import harness
from corral.sim.machine import USER
from corral.sim.simulation import Simulation
from tests.sim import nodes

SEEDS = Path(__file__).parent / "seeds.txt"


def test_a_calm_cluster_forms_and_works() -> None:
    outcome = harness.run(1, nodes.calm)
    assert outcome.result["operations"] > 100


def test_lock_workers_under_faults() -> None:
    for outcome in harness.run_seeds("nodes.locks", nodes.locks, SEEDS, fresh=3):
        assert outcome.result["operations"] > 100


def test_a_whole_cluster_replays() -> None:
    harness.replay(harness.fresh_seeds(1)[0], nodes.calm)


def test_a_node_whose_detect_is_not_what_its_state_promised_refuses_to_start() -> None:
    async def body(sim: Simulation) -> dict[str, int]:
        world = sim.machine(1, hosts=("n1",)).attach("corrald").world
        store = world.store("cman")
        record = QuorumRecord(NO_VIEW, ((1, 1),), 1, Timing(nodes.DETECT, nodes.RECOVER).lease_ns)
        await store.append([RECORDS.encode(written) for written in first_state(record)])
        before = await store.read()
        right = ClusterConfig(
            "corral", nodes.UUID, nodes.DETECT, nodes.RECOVER, (NodeConfig(1, "n1:7400", "n1"),), FenceConfig()
        )
        for detect in (nodes.DETECT // 2, 2 * nodes.DETECT):
            wrong = msgspec.structs.replace(right, detect_ns=detect, recover_ns=5 * detect)
            node = Node(world, wrong, 1, nodes.PATHS, uid=USER, log=lambda _: None)
            with pytest.raises(ConfigurationError, match="set `detect` back to the value it was made with"):
                await node.start()
            await node.close()
        assert await store.read() == before  # not even a new incarnation
        node = Node(world, right, 1, nodes.PATHS, uid=USER, log=lambda _: None)
        await node.start()
        await node.close()
        return {}

    harness.run(1, body)
