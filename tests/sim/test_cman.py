"""Cman's simulation: fresh seeds hold, kept seeds hold, a seed replays, every planted bug is caught within 50 seeds."""

import os
import time
from random import SystemRandom

import pytest

from corral.base.time import MILLISECOND, SECOND
from tests.sim.cman_cluster import DETECT, TIMING, Cluster, Violation, run
from tests.sim.cman_plants import PLANTS, Plant

FRESH_SECONDS = float(os.environ.get("CORRAL_SIM_SECONDS", "4"))

# Seeds that failed once, with what they showed. The engines have changed since, so they are stories no more, but each
# stands for a kind of run that found something.
KEPT = {
    62: "a newcomer that stalled the members that refused it one by one never proposed the whole set",
    105: "a node without memory promised to itself before it heard that its incarnation was known",
    296: "a node without memory used the id of a quorate view of its earlier life",
    401: "a lost state directory made an incarnation fall; its heartbeats were dropped for good",
    492: "a member promised to a coordinator and proposed without it in the same breath",
    755: "a quorate view accepted below the newest known one left the node unaware that it was excluded",
    774: "a node that had gone on to a view of its own never told the coordinator of the old one",
    101045: "a node that stopped cleanly while still quiet took its next life's quiet away: two leases at once",
    201817: "leavers went on echoing after the end of their echoes had been asked for, and came back without quiet",
    501198: "a forgetful node that got its old incarnation again was taken for its earlier life",
}

NARROWED = {
    501198: {
        "kinds": ("fault_leave", "fault_crashes", "fault_partition", "fault_pause", "fault_state_loss"),
        "faults": 12,
    }
}


def test_fresh_seeds_hold_every_invariant() -> None:
    first = int(os.environ.get("CORRAL_SEED", "0")) or SystemRandom().randrange(1 << 40)
    end = time.process_time() + FRESH_SECONDS
    seed = first
    while time.process_time() < end:
        try:
            run(seed)
        except AssertionError as error:
            pytest.fail(f"CORRAL_SEED={seed} fails: {error}")
        seed += 1
    assert seed > first


@pytest.mark.parametrize("seed", sorted(KEPT), ids=lambda seed: f"{seed}")
def test_seeds_that_failed_once_hold(seed: int) -> None:
    run(seed, **NARROWED.get(seed, {}))  # type: ignore[arg-type]


def test_a_seed_replays() -> None:
    first, second = run(8), run(8)
    assert first == second
    assert first["installed"] > 0


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.plant.__name__)
def test_planted_bug_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant.plant(monkeypatch.setattr)
    for seed in range(50):
        try:
            run(seed, kinds=plant.kinds)
        except AssertionError as error:
            if str(error).startswith(f"{plant.caught_by}") and not str(error)[len(plant.caught_by) :][:1].isdigit():
                return
    pytest.fail(f"{plant.plant.__name__} was not caught by {plant.caught_by} in 50 seeds")


def whole_cluster(seed: int, size: int) -> Cluster:
    cluster = Cluster(seed, size)
    cluster.calm = True
    for node in cluster.nodes.values():
        node.start()
    assert cluster.run_until(10 * SECOND, cluster.whole)
    cluster.run_until(cluster.now + 2 * DETECT)
    return cluster


@pytest.mark.parametrize("size", [3, 5, 7])
def test_a_plain_crash_waits_no_longer_than_its_detection(size: int) -> None:
    """The survivors serve in the next active view about `detect` after the last heartbeat: the guard costs nothing."""
    for seed in range(5):
        cluster = whole_cluster(seed, size)
        victim = cluster.nodes[size]
        survivors = [node for node in cluster.nodes.values() if node is not victim]
        crashed_at = cluster.now
        victim.crash(zombies=True)
        victim.zombies = []  # their lease is still waited for; the checker would see them die with the machine

        def served(survivors: list = survivors, victim: int = victim.node) -> bool:  # type: ignore[type-arg]
            return all(
                node.serving() is not None and victim not in node.member.view.nodes and not node.member.stopped
                for node in survivors
            )

        assert cluster.run_until(crashed_at + 3 * DETECT, served), "no active view after the crash"
        # one heartbeat may be under way, one interval passes until the last link is noticed, then the agreement
        assert cluster.now - crashed_at <= DETECT + TIMING.heartbeat_ns + 60 * MILLISECOND


def test_the_first_view_takes_a_few_heartbeats_when_all_start_together() -> None:
    cluster = Cluster(3, 3)
    for node in cluster.nodes.values():
        node.start()
    assert cluster.run_until(SECOND, cluster.whole)
    assert cluster.now < 3 * TIMING.heartbeat_ns
    assert cluster.counts["installed"] == 3, "simultaneous boots make one view"


def test_nothing_happens_in_a_cluster_that_is_well() -> None:
    """No stop, no view, no lapse in a minute without faults."""
    cluster = whole_cluster(5, 5)
    before = dict(cluster.counts)
    cluster.trace = []
    cluster.run_until(cluster.now + 60 * SECOND)
    assert cluster.counts == before
    assert cluster.trace == []
    assert cluster.whole()


def test_a_violation_names_its_invariant() -> None:
    cluster = whole_cluster(1, 3)
    cluster.nodes[1].active = cluster.nodes[1].member.view.id._replace(epoch=99)  # type: ignore[union-attr]
    with pytest.raises(Violation, match=r"^CMAN-10: node 2 serves in"):
        cluster.check_serving(cluster.nodes[2])
