"""A lockspace with one member: no peers, no lease to keep, running from the start."""

from typing import Final

from corral.api.dlm import VALUE_SIZE
from corral.base.ids import MemberId
from corral.base.time import FOREVER, Instant, Nanoseconds
from corral.base.view import Round, Slotted
from corral.dlm.engine import LockspaceEngine
from corral.dlm.events import Finish, Start
from corral.dlm.space import TOSS_NS

ALONE: Final = MemberId(1, 1, 0)


def solo(
    now: Instant,
    name: str,
    value_size: int = VALUE_SIZE,
    *,
    toss_ns: Nanoseconds = TOSS_NS,
    warn_ns: Nanoseconds = 0,
    me: MemberId = ALONE,
) -> LockspaceEngine:
    engine = LockspaceEngine(me, name, value_size, lease_until=FOREVER, toss_ns=toss_ns, warn_ns=warn_ns)
    engine.step(now, Start(Round(1, name, (Slotted(me, 0),), (), (me,), ())))
    engine.step(now, Finish(1))
    engine.ready()
    return engine
