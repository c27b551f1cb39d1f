"""Stories of broken networks, with real processes: every node in a network namespace of its own, one shared disk.

The promise is that of test_stories.py. What is more here: a node that is cut off but alive has stopped by itself, by
its lease, before the others take over. To see that it was not the fence agent which stopped it, fencing waits for a
time (`post_fail_delay`) that is long against the lease.
"""

import time
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from corral.node.config import ClusterConfig
from tests.integration.netns import Network
from tests.integration.stories import DETECT, RECOVER, Mounted, Work, until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.netns]

FENCE_DELAY = 3 * DETECT
PATIENT = 2  # the node that is not fenced before it has had the time to come back
PATIENT_DELAY = 6 * RECOVER


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    network = Network(3)
    try:
        yield network
    finally:
        network.close()


@pytest.fixture(scope="module")
def made(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    def apart(config: ClusterConfig) -> ClusterConfig:
        nodes = tuple(replace(entry, address=network.address(entry.id)) for entry in config.nodes)
        each = dict(config.fence.nodes)
        each[PATIENT] = replace(each[PATIENT], delay=PATIENT_DELAY)
        return replace(config, nodes=nodes, fence=replace(config.fence, nodes=each, post_fail_delay=FENCE_DELAY))

    mounted = Mounted(tmp_path_factory.mktemp("partitions") / "c", change=apart, enter=network.enter)
    try:
        yield mounted
    finally:
        mounted.end()
        for node in mounted.config.node_ids:
            assert not mounted.cluster.mounts.is_mounted(node)
            assert not mounted.cluster.participants(node)


@pytest.fixture
def mounted(made: Mounted, network: Network) -> Iterator[Mounted]:
    network.heal()
    made.restore()
    yield made
    network.heal()


def now() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def when(mounted: Mounted, node: int, since: int, kind: str, *words: str) -> int:
    """When that node first said so, CLOCK_BOOTTIME in nanoseconds."""

    def said() -> int | None:
        for at, what, text in mounted.ask(node, "history", since=since):
            if what == kind and all(word in text for word in words):
                return int(at)
        return None

    return int(until(said, f"node {node} to say: {' '.join(words)}"))


def cut_off_stops_first(mounted: Mounted, work: Work, cut_off: int, survivor: int, since: int) -> None:
    """Nothing was done on the cut-off node any more from well before it was fenced, and so from before the others took
    over. All its applications heard of an error."""
    fenced = when(mounted, survivor, since, "fence", f"node {cut_off} fenced")
    active = when(mounted, survivor, since, "active", "is active")
    assert fenced < active
    work.stopped(cut_off)
    last = max(work.writers.acknowledged.at[f"n{cut_off}{kind}"][-1] for kind in "cl")
    assert last < fenced - FENCE_DELAY * 1e9 / 2, "it went on until it was killed"


def comes_back(mounted: Mounted, network: Network, node: int) -> None:
    network.heal()
    mounted.start(node)
    for other in mounted.config.node_ids:
        mounted.wait(other, [1, 2, 3])
    mounted.mount_again(node)


def test_a_node_that_hears_nobody_but_is_heard_stops_and_is_fenced(mounted: Mounted, network: Network) -> None:
    with mounted.work() as work:
        since = now()
        network.cut([1, 2], 3)
        mounted.wait(1, [1, 2])
        cut_off_stops_first(mounted, work, 3, 1, since)
        work.goes_on(1, 2)
        comes_back(mounted, network, 3)
        work.check(3)


def test_a_node_that_is_heard_by_nobody_but_hears_stops_and_is_fenced(mounted: Mounted, network: Network) -> None:
    with mounted.work() as work:
        since = now()
        for other in (1, 2):
            network.cut([3], other)
        mounted.wait(1, [1, 2])
        cut_off_stops_first(mounted, work, 3, 2, since)
        work.goes_on(1, 2)
        comes_back(mounted, network, 3)
        work.check(3)


@pytest.mark.parametrize("alone", [1, 3])  # 1 coordinates while it is there
def test_a_node_without_quorum_stops_is_fenced_and_joins_when_the_network_is_whole(
    mounted: Mounted, network: Network, alone: int
) -> None:
    others = [node for node in mounted.config.node_ids if node != alone]
    with mounted.work() as work:
        since = now()
        part(network, alone, others)
        mounted.wait(others[0], others)
        cut_off_stops_first(mounted, work, alone, others[1], since)
        work.goes_on(*others)
        epoch = mounted.status(others[0])["epoch"]
        mounted.start(alone)  # while it is still alone
        until(lambda: mounted.status(alone)["members"] == [alone], "the lonely node to see that it is alone")
        time.sleep(2 * DETECT)
        status = mounted.status(alone)
        assert (status["members"], status["quorate"], status["active"]) == ([alone], False, False)
        assert mounted.status(others[0])["epoch"] == epoch
        comes_back(mounted, network, alone)
        work.goes_on(*others)
        work.check(alone)


def part(network: Network, alone: int, others: list[int]) -> None:
    network.cut(others, alone)
    for other in others:
        network.cut([alone], other)


def test_a_node_that_is_back_before_it_is_fenced_ends_its_mount_and_joins_clean(
    mounted: Mounted, network: Network
) -> None:
    with mounted.work() as work:
        since = now()
        before = mounted.status(PATIENT)["incarnation"]
        old = mounted.mount_process(PATIENT)
        part(network, PATIENT, [1, 3])
        mounted.wait_view(1, [1, 3])
        network.heal()
        assert mounted.wait(PATIENT, [1, 2, 3])["incarnation"] > before
        when(mounted, 1, since, "fence", f"node {PATIENT}", "fencing averted")
        assert old is not None
        assert mounted.mount_process(PATIENT) is None
        work.stopped(PATIENT)
        work.goes_on(1, 3)
        mounted.mount_again(PATIENT)
        work.check(PATIENT)


@pytest.mark.parametrize(
    ("pairs", "loser"),
    [
        # 1 makes the files, so most of their locks have their master there: each of the others needs to talk to it.
        pytest.param([(1, 3)], 3, id="a tie"),
        pytest.param([(1, 2), (1, 3)], 1, id="one reaches nobody"),
    ],
)
def test_of_two_mounts_that_cannot_talk_one_is_evicted_and_the_others_go_on(
    mounted: Mounted, network: Network, pairs: list[tuple[int, int]], loser: int
) -> None:
    others = [node for node in mounted.config.node_ids if node != loser]
    with mounted.work() as work:
        since = now()
        epoch = mounted.status(1)["epoch"]
        before = {node: mounted.mount_process(node) for node in others}
        for one, other in pairs:
            network.cut_participants(one, other)
        until(lambda: mounted.mount_process(loser) is None, f"the mount of node {loser} to be evicted", 8 * RECOVER)
        assert any("is evicted" in line and "could not talk" in line for line in mounted.told(loser, since))
        work.stopped(loser)
        work.goes_on(*others)
        assert {node: mounted.mount_process(node) for node in others} == before  # never both
        assert mounted.status(1)["epoch"] == epoch  # the daemons hear each other: nobody is fenced
        network.heal()
        mounted.mount_again(loser)
        work.goes_on(*others)
        work.check(loser)


def test_two_nodes_between_which_only_heartbeats_pass_part(mounted: Mounted, network: Network) -> None:
    with mounted.work() as work:
        network.cut_sessions(1, 3)
        mounted.wait(1, [1, 2])
        work.stopped(3)
        work.goes_on(1, 2)
        comes_back(mounted, network, 3)
        work.check(3)
