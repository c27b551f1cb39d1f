"""Three nodes, three mounts, applications that make system calls through the kernel's caches."""

from corral.sim import harness
from tests.sim import mounts


def test_a_calm_cluster_keeps_every_acknowledged_byte() -> None:
    outcome = harness.run(3, mounts.calm)
    assert outcome.result["operations"] > 200
    assert outcome.result["mounts"] == 3
