import pytest

from corral.real.address import parse, unparse


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:7010", ("127.0.0.1", 7010)),
        ("node-3.example:0", ("node-3.example", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_reads_host_and_port(address: str, parts: tuple[str, int]) -> None:
    assert parse(address) == parts


@pytest.mark.parametrize(
    "address", ["", ":", "host", "host:", ":80", "host:65536", "host:-1", "host:٣", "::1:80", "host:" + "9" * 5000]
)
def test_refuses_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="address"):
        parse(address)


def test_writes_what_it_reads() -> None:
    assert unparse(("127.0.0.1", 1)) == "127.0.0.1:1"
    assert unparse(("::1", 1, 0, 0)) == "[::1]:1"
    assert parse(unparse(("::1", 1, 0, 0))) == ("::1", 1)
