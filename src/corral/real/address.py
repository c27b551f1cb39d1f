"""Addresses are `host:port`; an IPv6 host stands in brackets: `[::1]:7010`."""

from typing import Any


def parse(address: str) -> tuple[str, int]:
    """Raises ValueError with a sentence."""
    host, colon, port = address.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
        raise ValueError(f"address {address[:100]!r} is not host:port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"address {address!r}: an IPv6 host needs brackets, [{host}]:{port}")
    if not host:
        raise ValueError(f"address {address!r} has no host; to listen everywhere say 0.0.0.0 or [::]")
    return host, int(port)


def unparse(name: Any) -> str:
    """Of what a socket calls its own or its peer's name."""
    host, port = name[0], name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
