"""Certificates: what is made can be loaded; everything wrong is a sentence that names the file and the next step."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from corral.base.errors import ConfigurationError
from corral.base.ids import NODE_MAX
from corral.real import pki
from corral.real.identity import names_of, node_uri, parse_node_uri
from tests.unit.real.support import authority


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A private copy of a cluster's credentials that a test may spoil."""
    shutil.copytree(authority("home"), tmp_path / "pki")
    return tmp_path / "pki"


def test_loads_what_it_made(home: Path) -> None:
    credentials = pki.load(home, 2)
    assert (credentials.cluster, credentials.node) == ("home", 2)


def test_keys_are_private_from_the_start(home: Path) -> None:
    for name in ("ca.key", "node-1.key"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("cluster", ["home", "a b/c", "zwölf", "50%", "x" * 64])
@pytest.mark.parametrize("node", [1, NODE_MAX])
def test_the_uri_brings_back_what_went_in(cluster: str, node: int) -> None:
    assert parse_node_uri(node_uri(cluster, node)) == (cluster, node)


@pytest.mark.parametrize(
    "uri",
    ["", "corral://", "corral://home/node/", "corral://home/node/0", f"corral://home/node/{NODE_MAX + 1}",
     "corral://home/node/1/2", "corral://home/nodes/1", "https://home/node/1", "corral://home/node/-1",
     "corral://home/node/+1", "corral://home/node/1 ", "corral://home/node/٣", "corral://home/node/" + "9" * 5000],
)  # fmt: skip
def test_other_uris_are_nobody(uri: str) -> None:
    assert parse_node_uri(uri) is None


def test_a_certificate_with_two_identities_is_nobody() -> None:
    names = (("URI", node_uri("home", 1)), ("URI", node_uri("home", 2)))
    assert names_of({"subjectAltName": names}) is None
    assert names_of({"subjectAltName": names[:1]}) == ("home", 1)
    assert names_of({}) is None


def test_never_overwrites(home: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"ca\.(key|crt) exists already"):
        pki.create_authority(home, "home")
    with pytest.raises(ConfigurationError, match=r"node-1\.(key|crt) exists already"):
        pki.create_node(home, 1)


def spoil(home: Path, what: str) -> None:
    if what == "missing":
        (home / "node-1.crt").unlink()
    elif what == "garbage":
        (home / "node-1.crt").write_bytes(b"\x00 not a certificate")
    elif what == "garbage key":
        (home / "node-1.key").write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    elif what == "other key":
        shutil.copyfile(home / "node-2.key", home / "node-1.key")
    elif what == "other node":
        shutil.copyfile(home / "node-2.key", home / "node-1.key")
        shutil.copyfile(home / "node-2.crt", home / "node-1.crt")
    elif what == "other authority":
        shutil.copyfile(Path(authority("home", 1)) / "ca.crt", home / "ca.crt")
    elif what == "open key":
        (home / "node-1.key").chmod(0o640)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("missing", r"node-1\.crt is missing .*: copy it here"),
        ("garbage", r"node-1\.crt does not hold the certificate of node 1 .*: restore it"),
        ("garbage key", r"node-1\.key does not hold the key of node 1 .*: restore it"),
        ("other key", r"node-1\.key is not the key of .*node-1\.crt: make a new one"),
        ("other node", r"node-1\.crt does not name node 1 of cluster 'home': make a new one"),
        ("other authority", r"node-1\.crt was not signed by .*ca\.crt: make a new one"),
        ("open key", r"node-1\.key is open to others \(mode 0640\): run chmod 600"),
    ],
)
def test_says_what_is_wrong_and_what_to_do(home: Path, what: str, sentence: str) -> None:
    spoil(home, what)
    with pytest.raises(ConfigurationError, match=sentence) as raised:
        pki.load(home, 1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("cluster", ["", "x" * 65, "ö" * 33, "a\nb", "a\0b"])
def test_refuses_names_no_cluster_can_have(tmp_path: Path, cluster: str) -> None:
    with pytest.raises(ConfigurationError, match="cluster name"):
        pki.create_authority(tmp_path, cluster)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("node", [0, -1, NODE_MAX + 1])
def test_refuses_ids_no_node_can_have(home: Path, node: int) -> None:
    with pytest.raises(ConfigurationError, match="node id"):
        pki.create_node(home, node)
