"""The `[fence]` table: what is accepted, and the sentence when it is not."""

import tomllib
from typing import Any

import pytest

from corral.api.fence import (
    KILLED,
    MANUAL,
    POWERED,
    DeviceUse,
    check_fencing,
    parse_fencing,
    process_fencing,
)
from corral.base.errors import ConfigurationError

GOOD = """
post_join_delay = 30
[[devices]]
name = "pdu"
agent = "fence_apc"
parameters = { ip = "10.0.0.9", username = "apc", password = "hunter2" }
[[devices]]
name = "ping"
agent = "fence_heuristics_ping"
proof = "none"
[[devices]]
name = "operator"
agent = "manual"
[[nodes.1.methods]]
name = "power"
devices = ["ping", [{ device = "pdu", parameters = { plug = "1" } }]]
[[nodes.1.methods]]
name = "by hand"
devices = ["operator"]
[nodes.2]
delay = 5
[[nodes.2.methods]]
name = "power"
devices = [{ device = "pdu", parameters = { plug = "2" } }]
action = "reboot"
"""


def parse(text: str) -> Any:
    return parse_fencing(tomllib.loads(text), [1, 2])


def test_a_whole_table() -> None:
    config = parse(GOOD)
    power, by_hand = config.nodes[1].methods
    assert power.groups == ((DeviceUse("ping"),), (DeviceUse("pdu", {"plug": "1"}),))
    assert config.proof_of(power) == POWERED, "a gate proves nothing and weakens nothing"
    assert config.proof_of(by_hand) == MANUAL
    assert config.proofs_of(1) == {POWERED, MANUAL}
    assert config.nodes[2].delay == 5


def test_the_default_of_a_local_cluster() -> None:
    config = process_fencing([3, 1, 2])
    check_fencing(config, [1, 2, 3])
    assert config.proofs_of(2) == {KILLED}


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "post_join_delay = 30",
            "post_join_delay = -2",
            "post_join_delay: expected -1 (wait for ever) or 0 to 3600 seconds, got -2",
        ),
        ("post_join_delay = 30", "post_join_dealy = 30", "unknown field `post_join_dealy`"),
        ("post_join_delay = 30", "retry_delay = 0", "retry_delay: expected more than 0"),
        ("post_join_delay = 30", "concurrent = 0", "concurrent: expected 1 to 64, got 0"),
        ('name = "ping"', 'name = "pdu"', "'pdu' twice"),
        ('"manual"', '"../manual"', "devices.operator.agent: expected process, manual, dummy, or a program's name"),
        ('proof = "none"', 'proof = "quantum"', "devices.ping.proof: expected one of none, powered"),
        (
            'agent = "manual"',
            'agent = "manual"\nproof = "powered"',
            "devices.operator.proof: expected manual for manual",
        ),
        ('agent = "manual"', 'agent = "manual"\ntimeout = 0', "devices.operator.timeout"),
        ('ip = "10.0.0.9"', 'action = "reboot"', "parameters other than action and nodename"),
        ('ip = "10.0.0.9"', 'ip = "a\\nb=c"', "devices.pdu.parameters.ip: expected one line"),
        ('ip = "10.0.0.9"', '"i p" = "1"', "names of letters"),
        ("nodes.2", "nodes.7", "nodes.7: expected one of the configured nodes [1, 2], got 7"),
        ('devices = ["operator"]', 'devices = ["opreator"]', "expected one of operator, pdu, ping, got 'opreator'"),
        ('devices = ["operator"]', 'devices = ["operator", "pdu"]', "'manual' alone in its method"),
        ('devices = ["operator"]', 'devices = ["ping"]', "at least one device that proves something"),
        ('devices = ["operator"]', "devices = []", "at least one device"),
        ('name = "by hand"', 'name = "power"', "'power' twice"),
        ('action = "reboot"', 'action = "explode"', "action: expected off or reboot, got 'explode'"),
        (
            'agent = "fence_apc"',
            'agent = "fence_scsi"\nproof = "keyed"',
            "power.action: expected off for a device that only",
        ),
        ("delay = 5", 'delay = "5"', "Expected `float`, got `str` - at `$.nodes[...].delay`"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, sentence: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigurationError) as caught:
        parse(GOOD.replace(old, new))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_node_without_a_method_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="node 2 has no method"):
        parse(GOOD[: GOOD.index("[nodes.2]")])


def test_a_password_is_never_shown() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(GOOD.replace('"hunter2"', '"hunter2\\n"'))
    assert "hunter2" not in str(caught.value)
