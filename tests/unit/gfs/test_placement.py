"""Where new dinodes and blocks go: nodes that work side by side stay out of each other's resource groups."""

from random import Random
from typing import Any

from tests.sim.gfs_nodes import ME, Cluster
from tests.unit.gfs.world import World

from corral.api.gfs import ROOT
from corral.gfs.filesystem import GfsFilesystem
from corral.gfs.glock import EX, RGRP

O_WRONLY = 1
FILES = 100


def make_files(filesystem: GfsFilesystem, directory: int, prefix: bytes, run: Any) -> list[int]:
    """Numbers of their dinodes."""
    numbers = []
    for each in range(FILES):
        entry, opened = run(filesystem.create(directory, b"%s%d" % (prefix, each), 0o644, O_WRONLY, ME))
        write = filesystem.write(
            entry.ino, opened.handle, 0, b"x" * 5000, append=False, from_cache=False, kill_suidgid=False
        )
        run(write)
        run(filesystem.release(entry.ino, opened.handle, None))
        numbers.append(entry.ino)
    return numbers


def two_nodes() -> tuple[World, Cluster, list[GfsFilesystem]]:
    world = World()
    cluster = Cluster(world, Random(1))
    cluster.min_hold_ns = 0
    world.run(cluster.begin(2))
    return world, cluster, [node.filesystem for node in cluster.nodes]


def groups_of(filesystem: GfsFilesystem, numbers: list[int]) -> set[int]:
    return {filesystem.rgrp_of(number).index for number in numbers}


def test_each_node_fills_groups_of_its_own_though_the_directories_lie_together() -> None:
    world, cluster, (one, two) = two_nodes()
    first = world.run(one.mkdir(ROOT, b"first", 0o755, ME)).ino
    second = world.run(one.mkdir(ROOT, b"second", 0o755, ME)).ino
    made = [make_files(one, first, b"a", world.run), make_files(two, second, b"b", world.run)]
    assert not groups_of(one, made[0]) & groups_of(two, made[1])
    for filesystem, numbers in ((one, made[0]), (two, made[1])):
        for group in groups_of(filesystem, numbers):
            assert filesystem.locks.table.get(RGRP, filesystem.rgrps[group].number).state == EX
    world.run(cluster.unmount())
    world.run(cluster.check())


def test_nodes_that_take_turns_in_one_directory_fill_their_clusters_one_after_the_other() -> None:
    world, cluster, (one, two) = two_nodes()
    made: list[list[int]] = [[], []]
    for turn in range(5):
        for filesystem, numbers in ((one, made[0]), (two, made[1])):
            for each in range(10):
                entry = world.run(filesystem.mknod(ROOT, b"%d.%d.%d" % (filesystem.slot, turn, each), 0, 0, ME))
                numbers.append(entry.ino)
    assert not groups_of(one, made[0]) & groups_of(two, made[1])
    for filesystem, numbers in ((one, made[0]), (two, made[1])):
        clusters = {(number - filesystem.rgrp_of(number).data0) // 64 for number in numbers}
        assert len(clusters) <= 2, "each turn opened a cluster of its own"
    world.run(cluster.unmount())
    world.run(cluster.check())
