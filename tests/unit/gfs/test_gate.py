"""The recovery gate: what a dead node's locks protected is read only when its journal has been replayed (GFS-13)."""

from random import Random

from tests.sim.gfs_nodes import Cluster
from tests.unit.gfs.world import World

from corral.api.gfs import ROOT, Caller
from corral.gfs import format as fmt
from corral.gfs.glock import SH

SOMEBODY = Caller(0, 0, 1)


def test_looking_for_unlinked_files_waits_for_the_replay_of_another_death() -> None:
    world = World()
    cluster = Cluster(world, Random(1))
    world.run(cluster.begin(3))
    _, survivor, victim = cluster.nodes
    entry, _ = world.run(victim.filesystem.create(ROOT, b"file", 0o100644, 2, SOMEBODY))
    world.run(victim.filesystem.journal.commit())  # durable in the journal; the bitmap in its place is older
    world.spawn(survivor.filesystem.scan_unlinked(), "look for unlinked files")
    failed = cluster.kill(victim)
    world.settle()
    world.run(cluster.recover(failed, joined=[]))
    world.settle()
    rgrp = survivor.filesystem.rgrp_of(entry.ino)
    world.run(survivor.filesystem.hold_rgrp(rgrp, SH))
    assert rgrp.state(entry.ino) == fmt.DINODE_STATE


def test_what_a_dead_node_counted_is_added_once_everybody_may_go_on() -> None:
    world = World()
    cluster = Cluster(world, Random(2))
    world.run(cluster.begin(3))
    first, second, victim = cluster.nodes
    before = world.run(first.filesystem.statfs())
    for number in range(5):
        world.run(victim.filesystem.create(ROOT, b"file%d" % number, 0o100644, 2, SOMEBODY))
    world.run(victim.filesystem.journal.commit())
    failed = cluster.kill(victim)
    world.run(cluster.recover(failed, joined=[]))
    world.settle()
    for node in (first, second):
        assert world.run(node.filesystem.statfs()).blocks_free == before.blocks_free - 5
        assert not node.filesystem.recovery.leaves_work


def test_an_unmount_behind_a_shut_gate_leaves_its_counts_to_the_next_owner() -> None:
    world = World()
    cluster = Cluster(world, Random(3))
    world.run(cluster.begin(2))
    first, second = cluster.nodes
    world.run(first.filesystem.create(ROOT, b"file", 0o100644, 2, SOMEBODY))
    change = first.filesystem.free_change
    first.filesystem.stop()
    world.run(first.filesystem.destroy())
    world.run(first.mount())
    world.run(cluster.recover([], joined=[first]))
    assert first.filesystem.free_change == change
    assert second.filesystem.withdrawn is None


def test_a_missing_file_of_a_dead_slot_stops_nobody() -> None:
    world = World()
    cluster = Cluster(world, Random(4))
    world.run(cluster.begin(3))
    world.settle()
    first, _, victim = cluster.nodes
    del first.filesystem.system[b"statfs_change%d" % victim.slot]
    failed = cluster.kill(victim)
    world.run(cluster.recover(failed, joined=[]))
    world.settle()
    assert first.filesystem.counts["tidying_failed"] == 1
    assert not first.filesystem.recovery.leaves_work
    world.run(first.filesystem.create(ROOT, b"file", 0o100644, 2, SOMEBODY))
