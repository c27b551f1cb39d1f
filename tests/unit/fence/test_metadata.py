"""What programs of the FenceAgentAPI say of themselves: real ones read, hostile ones refused."""

from pathlib import Path

import pytest

from corral.base.errors import ConfigurationError
from corral.providers.agents.metadata import DEPTH_MAX, ELEMENTS_MAX, SIZE_MAX, parse_metadata

FIXTURES = Path(__file__).parent / "metadata"
NAMES = sorted(path.stem for path in FIXTURES.glob("*.xml"))


def read(name: str):
    return parse_metadata((FIXTURES / f"{name}.xml").read_bytes(), name)


def document(inside: str) -> bytes:
    return f'<resource-agent name="x">{inside}</resource-agent>'.encode()


def test_there_are_fixtures() -> None:
    assert len(NAMES) == 15


@pytest.mark.parametrize("name", NAMES)
def test_every_real_agent_is_read(name: str) -> None:
    metadata = read(name)
    assert metadata.name == name
    assert "off" in metadata.actions
    assert all(
        parameter.type in ("string", "boolean", "integer", "second", "select")
        for parameter in metadata.parameters.values()
    )


def test_what_is_read_of_one() -> None:
    apc = read("fence_apc")
    assert apc.parameters["ip"].obsoletes == "ipaddr"
    assert apc.parameters["ip"].required
    assert apc.parameters["action"].default == "reboot"
    assert apc.names_victim_by == "plug"
    ipmi = read("fence_ipmilan")
    assert ipmi.parameters["auth"].options == ("md5", "password", "none")
    assert ipmi.parameters["auth"].description == "IPMI Lan Auth type."
    assert read("fence_kdump").actions >= {"off", "monitor"}
    assert "status" not in read("fence_kdump").actions


def check(agent: str, given: dict[str, str], action: str = "off") -> str:
    """The sentence, or "" when all is well."""
    try:
        read(agent).check(given, action=action, where="device d")
    except ConfigurationError as error:
        return str(error)
    return ""


def test_a_configuration_is_checked_against_it() -> None:
    good = {"ip": "10.0.0.9", "username": "apc"}
    assert check("fence_apc", good) == ""
    assert check("fence_apc", {"ipaddr": "10.0.0.9", "login": "apc"}) == "", "old names count"
    assert check("fence_apc", {"ip": "10.0.0.9"}) == "device d: agent fence_apc needs parameter username"
    assert check("fence_apc", {**good, "usernme": "x"}).endswith("no parameter usernme; did you mean username?")
    assert "it knows action" in check("fence_kdump", {"zzzzzzzz": "1"})
    assert check("fence_ipmilan", {"auth": "sha1"}).endswith("must be one of md5, password, none")
    assert check("fence_ipmilan", {"ipport": "x"}).endswith("must be a whole number")
    assert check("fence_ipmilan", {"delay": "soon"}).endswith("must be a number of seconds")
    assert check("fence_ipmilan", {"lanplus": "perhaps"}).endswith("true, yes")
    assert check("fence_ipmilan", {"lanplus": "1", "delay": "2.5", "ipport": "623"}) == ""
    assert "has no action on" in check("fence_kdump", {}, "reboot")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "no XML"),
        (b"hello", "no XML"),
        (b"<resource-agent>", "no XML"),
        (b"\xff\xfe\x00", "no XML"),
        (b'<?xml version="1.0" encoding="klingon"?><resource-agent/>', "lists no actions"),
        (b"<agent/>", "begins with <agent>"),
        (b"<" + b"a" * 5000 + b"/>", "begins with <" + "a" * 400 + ">"),
        (document(""), "lists no actions"),
        (b'<!DOCTYPE r SYSTEM "file:///etc/passwd"><resource-agent/>', "document type"),
        (b'<!DOCTYPE r [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><resource-agent>&b;</resource-agent>', "document type"),
        (document("<a>" * DEPTH_MAX + "</a>" * DEPTH_MAX), "nested too deep"),
        (document("<a/>" * ELEMENTS_MAX), "too many elements"),
        (document(" " * SIZE_MAX), "longer than 256 KiB"),
        (document("&undefined;"), "no XML"),
    ],
)
def test_hostile_documents_are_refused_with_a_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_metadata(data, "x")
    assert sentence in str(caught.value)


def test_an_agent_without_off_cannot_fence() -> None:
    metadata = parse_metadata(document('<actions><action name="on"/></actions>'), "x")
    with pytest.raises(ConfigurationError, match="no action off"):
        metadata.check({}, action="off", where="device d")
