"""The configuration file: what is right is read back the same, what is wrong is told in one sentence."""

from pathlib import Path

import pytest

from corral.api.fence import process_fencing
from corral.base.errors import ConfigurationError
from corral.base.time import SECOND
from corral.node.config import ClusterConfig, NodeConfig, load, parse, write

UUID = "11111111-2222-3333-4444-555555555555"
GOOD = f"""
[cluster]
name = "home"
uuid = "{UUID}"
detect = 0.5
[[node]]
id = 2
address = "127.0.0.1:7402"
[[node]]
id = 1
address = "127.0.0.1:7401"
[fence]
devices = [{{name = "process", agent = "process"}}]
[fence.nodes.1]
methods = [{{name = "kill", devices = ["process"]}}]
[fence.nodes.2]
methods = [{{name = "kill", devices = ["process"]}}]
"""


def test_recover_defaults_to_five_times_detect_and_nodes_are_sorted() -> None:
    config = parse(GOOD, "test")
    assert config.detect_ns == SECOND // 2
    assert config.recover_ns == 5 * SECOND // 2
    assert config.node_ids == (1, 2)


def test_a_written_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = ClusterConfig(
        "home",
        UUID,
        SECOND,
        5 * SECOND,
        (NodeConfig(1, "127.0.0.1:7401", "a"), NodeConfig(2, "[::1]:7402")),
        process_fencing((1, 2)),
    )
    path = tmp_path / "cluster.toml"
    write(config, path)
    assert load(path) == config


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('name = "home"', 'name = "ho me"', "cluster.name"),
        ('name = "home"', 'nam = "home"', "missing required field `name`|unknown field `nam`"),
        ("detect = 0.5", "detect = 0.01", "cluster.detect"),
        ("detect = 0.5", "detect = 0.5\nrecover = 0.6", "cluster.recover"),
        ("detect = 0.5", 'detect = "x"', "detect"),
        (UUID, "1234", "cluster.uuid"),
        ("id = 2", "id = 1", "1 twice"),
        ("id = 2", "id = 5000", "node.id"),
        ("127.0.0.1:7402", "127.0.0.1:7401", "twice"),
        ("127.0.0.1:7402", "127.0.0.1", "HOST:PORT"),
        ("127.0.0.1:7402", "127.0.0.1:99999", "HOST:PORT"),
        ("[fence.nodes.2]", "[fence.nodes.3]", "nodes.3"),
        ("[cluster]", "[cluster", "not TOML"),
    ],
)
def test_a_wrong_value_is_told_with_its_key(old: str, new: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told) as caught:
        parse(GOOD.replace(old, new, 1), "cluster.toml")
    assert str(caught.value).startswith("cluster.toml")
    assert "\n" not in str(caught.value) or "not TOML" in str(caught.value)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="corral up"):
        load(tmp_path / "none.toml")
