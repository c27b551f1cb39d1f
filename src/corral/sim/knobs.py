"""The numbers that make a simulated world kind or nasty. `Knobs()` is a good day; `Knobs.drawn(rng)` varies per run."""

from random import Random

from corral.base.time import MICROSECOND, MILLISECOND, SECOND


class Knobs:
    """All times in nanoseconds. A pair (low, high) is a range; most draws fall near its low end."""

    def __init__(self) -> None:
        self.latency_low = 40 * MICROSECOND
        self.latency_high = 2 * MILLISECOND
        self.loopback_low = 8 * MICROSECOND
        self.loopback_high = 80 * MICROSECOND
        self.ns_per_byte = 1  # a connection's bandwidth: 1 GB/s
        self.datagram_loss = 0.0  # on links between machines
        self.datagram_repeat = 0.0
        self.datagram_backlog = 512  # datagrams the kernel keeps for a process that does not read
        self.user_timeout = 15 * SECOND  # unacknowledged data breaks a connection after this (TCP_USER_TIMEOUT)
        self.connect_timeout = 5 * SECOND
        self.retry_first = 200 * MILLISECOND
        self.retry_last = 1600 * MILLISECOND
        self.window = 256 << 10  # bytes that socket buffers take from a sender whose peer does not read
        self.drift_ppm = 100  # a clock's rate differs from true time by at most so many millionths
        self.disk_low = 60 * MICROSECOND
        self.disk_high = 4 * MILLISECOND
        self.disk_bytes_per_second = 1 << 30
        self.flush_low = 300 * MICROSECOND
        self.flush_high = 12 * MILLISECOND
        self.disk_cache = 64 << 20  # bytes a device holds unflushed before it writes the oldest down by itself
        self.outlive = 20 * MILLISECOND  # how long a write can still land after its machine lost power
        self.store_low = 200 * MICROSECOND
        self.store_high = 8 * MILLISECOND
        self.exit_low = 50 * MICROSECOND  # from SIGKILL to the end of the last thread without I/O
        self.exit_high = 3 * MILLISECOND
        self.boot = 3 * SECOND
        self.pid_max = 32768

    @classmethod
    def drawn(cls, rng: Random) -> "Knobs":
        """A world drawn from the seed: each property is usually as in `Knobs()`, now and then far worse."""
        knobs = cls()
        if rng.random() < 0.3:
            knobs.latency_high *= rng.choice((5, 20, 50))
        if rng.random() < 0.2:
            knobs.ns_per_byte = rng.choice((10, 100))
        if rng.random() < 0.3:
            knobs.datagram_loss = rng.choice((0.001, 0.01, 0.05))
        if rng.random() < 0.3:
            knobs.datagram_repeat = rng.choice((0.001, 0.02))
        if rng.random() < 0.3:
            knobs.store_high *= rng.choice((4, 16))
        if rng.random() < 0.3:
            knobs.disk_high *= rng.choice((4, 16))
            knobs.flush_high *= rng.choice((4, 16))
        if rng.random() < 0.5:
            knobs.drift_ppm = 2_490  # between two clocks nearly 5,000: all that rho allows (cman/timing.py)
        if rng.random() < 0.2:
            knobs.pid_max = 64  # pids are reused soon
        if rng.random() < 0.3:
            knobs.user_timeout = rng.choice((1, 2, 5, 60)) * SECOND
        return knobs


def skewed(rng: Random, low: int, high: int) -> int:
    """Mostly near `low`, sometimes up to `high`: the shape of latencies."""
    x = rng.random()
    x *= x
    return low + int((high - low) * x * x * x)
