"""corral: cluster services for Linux. What an application needs is here; each name is loaded when it is first used."""

from typing import TYPE_CHECKING, Any

from corral.api.dlm import CR, CW, EX, NL, PR, PW
from corral.base.errors import (
    Busy,
    Cancelled,
    ClusterError,
    ConfigurationError,
    Deadlock,
    FenceError,
    LockLost,
    NoQuorum,
    NotMember,
    ProviderError,
    TimedOut,
    WouldBlock,
)

if TYPE_CHECKING:
    from corral import recipes, sync
    from corral.doors import connect, local
    from corral.files import open_filesystem
    from corral.node.node import Node

__version__ = "0.1.0"

__all__ = [
    "CR",
    "CW",
    "EX",
    "NL",
    "PR",
    "PW",
    "Busy",
    "Cancelled",
    "ClusterError",
    "ConfigurationError",
    "Deadlock",
    "FenceError",
    "LockLost",
    "NoQuorum",
    "Node",
    "NotMember",
    "ProviderError",
    "TimedOut",
    "WouldBlock",
    "compiled",
    "connect",
    "local",
    "open_filesystem",
    "recipes",
    "sync",
]


def compiled() -> bool:
    """Whether the engines of this installation are compiled, as in a wheel, or pure Python: the same, only slower."""
    from importlib.util import find_spec

    spec = find_spec("corral.dlm.resource")
    return spec is not None and spec.origin is not None and not spec.origin.endswith(".py")


def __getattr__(name: str) -> Any:
    # A daemon that imports corral.base must not pay for doors it does not open.
    import importlib

    if name in ("connect", "local"):
        value = getattr(importlib.import_module("corral.doors"), name)
    elif name == "open_filesystem":
        value = importlib.import_module("corral.files").open_filesystem
    elif name in ("recipes", "sync"):
        value = importlib.import_module(f"corral.{name}")
    elif name == "Node":
        value = importlib.import_module("corral.node.node").Node
    else:
        raise AttributeError(f"module 'corral' has no attribute {name!r}")
    globals()[name] = value
    return value
