"""The one tree of errors a user of corral can meet.

A peer's mistake never raises through an engine: it is counted and the message dropped (`PeerError` lives inside
`decode` only). Our own mistakes are asserts that stop the node: a stopped node gets fenced, a wrong one corrupts.
"""


class ClusterError(Exception):
    """Anything the cluster could not do, with a sentence that says why and what to do next."""


class Busy(ClusterError):
    """A bounded queue is full: retry later."""


class WouldBlock(ClusterError):
    """NOQUEUE or `wait=False`, and the lock is not to be had now."""


class TimedOut(ClusterError, TimeoutError):
    """The timeout of a request ran out; the message says what it was waiting for."""


class Deadlock(ClusterError):
    """Granting would close a cycle of conversions; this request was chosen to fail."""


class Cancelled(ClusterError):
    """The request was cancelled by its owner through another handle (not by cancelling the task)."""


class LockLost(ClusterError):
    """The guarantee of a lock is gone for good; whatever it protected may be in other hands."""


class NoQuorum(ClusterError):
    """The partition this node is in may not decide."""


class NotMember(ClusterError):
    """This process is not (any more) a member of the cluster or group."""


class FenceError(ClusterError):
    """A fence action failed or could not be verified."""


class ProviderError(ClusterError):
    """A stack of providers does not give the guarantee that a service above it needs."""


class ConfigurationError(ClusterError):
    """The configuration is wrong; the message names file, key and the accepted values."""


class PeerError(Exception):
    """Bytes from outside that are not what they should be. Raised by decoders, never passes an engine."""
