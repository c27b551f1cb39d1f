"""Every timer of the cluster, derived from the two inputs `detect` and `recover` (DESIGN 5, Words).

`detect` is how long a silent link counts as up; `recover` bounds a round, a stalled participant and a flapping link.
All other lengths follow from them here and nowhere else, and `table()` prints them for `corral status --timing`.

The lease: L = detect - heartbeat - rho * detect. A peer's newest counter is first echoed at most one heartbeat after it
came, and services wait L(1 + rho) after that echo; the sum stays below `detect`, so a plain crash, which is noticed
`detect` after the last heartbeat, waits no longer than its detection.

rho bounds how much faster one node's CLOCK_BOOTTIME may run than another's. The kernel lets NTP change the rate by
500 ppm and crystals differ by some 100 ppm, so two nodes differ by less than 1,300 ppm; 5,000 leaves room for a chrony
whose `maxslewrate` is at most 2,000. A chrony that may slew faster (its default) must be limited on cluster nodes.
"""

from typing import Final, final

from corral.base.errors import ConfigurationError
from corral.base.time import MILLISECOND, Nanoseconds

RHO_PPM: Final = 5_000
MILLION: Final = 1_000_000

DETECT_MIN: Final = 50 * MILLISECOND  # below this a loop turn on a busy machine is longer than a heartbeat
DETECT_MAX: Final = 600_000 * MILLISECOND
HEARTBEATS_PER_DETECT: Final = 10
RECOVER_PER_DETECT: Final = 5


def guard_of(lease_ns: Nanoseconds) -> Nanoseconds:
    """L(1 + rho), rounded up: a lease of L on any node's clock has ended when this has passed on mine."""
    return lease_ns + (lease_ns * RHO_PPM + MILLION - 1) // MILLION


@final
class Timing:
    """The derived lengths, nanoseconds all."""

    __slots__ = (
        "detect_ns",
        "form_ns",
        "guard_ns",
        "heartbeat_ns",
        "lease_ns",
        "patience_ns",
        "phase_ns",
        "recover_ns",
        "retry_ns",
        "settle_ns",
    )

    def __init__(
        self,
        detect_ns: Nanoseconds,
        recover_ns: Nanoseconds = 0,
        heartbeats_per_detect: int = HEARTBEATS_PER_DETECT,
    ) -> None:
        """`recover_ns` 0 means the default, 5 x detect."""
        if not DETECT_MIN <= detect_ns <= DETECT_MAX:
            raise ConfigurationError(
                f"detect is {detect_ns / MILLISECOND:g} ms; it must be between {DETECT_MIN // MILLISECOND} and "
                f"{DETECT_MAX // MILLISECOND} ms"
            )
        recover_ns = recover_ns or RECOVER_PER_DETECT * detect_ns
        if recover_ns < 2 * detect_ns:
            raise ConfigurationError(
                f"recover is {recover_ns / MILLISECOND:g} ms; it must be at least twice detect "
                f"({detect_ns / MILLISECOND:g} ms)"
            )
        self.detect_ns: Final = detect_ns
        self.recover_ns: Final = recover_ns
        self.heartbeat_ns: Final = detect_ns // heartbeats_per_detect
        self.lease_ns: Final = detect_ns - self.heartbeat_ns - detect_ns * RHO_PPM // MILLION
        self.guard_ns: Final = guard_of(self.lease_ns)
        self.settle_ns: Final = 2 * self.heartbeat_ns
        self.form_ns: Final = detect_ns
        self.phase_ns: Final = detect_ns
        self.retry_ns: Final = self.heartbeat_ns
        self.patience_ns: Final = 2 * detect_ns

    def back_off_ns(self, attempt: int, node: int) -> Nanoseconds:
        """How long the `attempt`-th failed agreement in a row waits: doubled each time up to `detect`, and a little
        different on every node, so that two coordinators do not meet again."""
        return min(self.retry_ns << min(attempt, 8), self.detect_ns) + (node % 32) * (self.retry_ns // 32)

    def table(self) -> list[tuple[str, Nanoseconds, str]]:
        """Name, length and meaning of every timer, for `corral status --timing`."""
        return [
            ("detect", self.detect_ns, "a link without a heartbeat or an echo for this long is down"),
            ("recover", self.recover_ns, "bounds a round, a stalled participant and a flapping link"),
            ("heartbeat", self.heartbeat_ns, "interval of heartbeats to every peer"),
            ("lease", self.lease_ns, "services may act this long after the sending of a heartbeat a quorum has echoed"),
            ("guard", self.guard_ns, "services of a new view wait this long after the last echo to a lost member"),
            ("quiet", self.guard_ns, "after a start that no clean stop preceded a node neither votes nor echoes"),
            ("settle", self.settle_ns, "a node that appeared waits this long for others that appear with it"),
            ("form", self.form_ns, "the first view waits this long for configured nodes not seen yet"),
            ("phase", self.phase_ns, "a member that does not answer in an agreement for this long is asked again"),
            ("retry", self.retry_ns, "first pause after a failed agreement; doubled up to detect"),
            ("patience", self.patience_ns, "a coordinator that proposes nothing for this long is passed over"),
        ]
