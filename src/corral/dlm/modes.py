"""The lock manager's tables: which modes go together, which conversions may queue behind, how values move.

All are data, indexed by mode; every rule that asks "may these two?" asks here. Modes, flags and their numbers are those
of `corral.api.dlm`, which are those of Linux `dlmconstants.h`. Source: OpenVMS lock manager, Linux `fs/dlm/lock.c`,
features 1.5. The legality checks return 0 or a negative errno, because they run on hot paths and on peers' input.
"""

from typing import Final

from corral.api.dlm import (
    ALTCW,
    ALTPR,
    CANCEL,
    CONVDEADLK,
    CONVERT,
    CW,
    EX,
    EXPEDITE,
    FORCEUNLOCK,
    IV,
    IVVALBLK,
    NL,
    NOQUEUE,
    PR,
    PW,
    QUECVT,
    VALBLK,
)
from corral.base.ids import NAME_MAX

ENOENT: Final = -2
EAGAIN: Final = -11
ENOMEM: Final = -12
EBUSY: Final = -16
EEXIST: Final = -17
EINVAL: Final = -22
EDEADLK: Final = -35
ENOTEMPTY: Final = -39
ENOTCONN: Final = -107
ETIMEDOUT: Final = -110

FLAGS_ALL: Final = 0x7FFFF
UNLOCK_FLAGS: Final = CANCEL | VALBLK | IVVALBLK | FORCEUNLOCK

# COMPATIBLE[asked][held]; symmetrical.       NL     CR     CW     PR     PW     EX
COMPATIBLE: Final[tuple[tuple[bool, ...], ...]] = (
    (True, True, True, True, True, True),  # NL
    (True, True, True, True, True, False),  # CR
    (True, True, True, False, False, False),  # CW
    (True, True, False, True, False, False),  # PR
    (True, True, False, False, False, False),  # PW
    (True, False, False, False, False, False),  # EX
)

# QUECVT_LEGAL[granted][asked]: a conversion that may be told to queue behind others. Only rising ones.
QUECVT_LEGAL: Final[tuple[tuple[bool, ...], ...]] = (
    (False, True, True, True, True, True),  # NL
    (False, False, True, True, True, True),  # CR
    (False, False, False, True, True, True),  # CW
    (False, False, True, False, True, True),  # PR
    (False, False, False, False, False, True),  # PW
    (False, False, False, False, False, False),  # EX
)

READ: Final = 1  # the resource's value goes to the caller
WRITE: Final = 0  # the caller's value goes to the resource
NOTHING: Final = -1

# VALUE_TRANSFER[granted + 1][asked]: row 0 is a new lock. Note PW -> EX, which reads, and PW -> PW, which writes.
VALUE_TRANSFER: Final[tuple[tuple[int, ...], ...]] = (
    (READ, READ, READ, READ, READ, READ),  # new
    (READ, READ, READ, READ, READ, READ),  # NL
    (NOTHING, READ, READ, READ, READ, READ),  # CR
    (NOTHING, NOTHING, READ, READ, READ, READ),  # CW
    (NOTHING, NOTHING, NOTHING, READ, READ, READ),  # PR
    (WRITE, WRITE, WRITE, WRITE, WRITE, READ),  # PW
    (WRITE, WRITE, WRITE, WRITE, WRITE, WRITE),  # EX
)


def is_middle(granted: int, asked: int) -> bool:
    """PR <-> CW: neither is the higher, so an outcome that was not heard leaves the granted mode unknown."""
    return (granted == PR and asked == CW) or (granted == CW and asked == PR)


def is_down(granted: int, asked: int) -> bool:
    """A conversion that a master always grants at once: whatever is compatible with `granted` is with `asked`."""
    return asked <= granted and not is_middle(granted, asked)


def alternative(asked: int, flags: int) -> int:
    """The mode that ALTPR or ALTCW tries when `asked` is not to be had; IV: none."""
    if flags & ALTPR and asked != PR:
        return PR
    if flags & ALTCW and asked != CW:
        return CW
    return IV


def least(granted: int, asked: int, flags: int) -> int:
    """What a holder still has for sure while a master may or may not have done its conversion. IV: PR or CW."""
    if is_down(granted, asked):
        return asked
    if flags & CONVDEADLK:
        return NL
    other = alternative(asked, flags)
    if is_middle(granted, asked) or is_middle(granted, other):
        return IV
    return other if granted == PW and other != IV else granted


def check_request(name: bytes, mode: int, flags: int) -> int:
    """Is this a legal new request? 0 or -EINVAL."""
    if not 0 < len(name) <= NAME_MAX or not NL <= mode <= EX:
        return EINVAL
    if flags & ~FLAGS_ALL or flags & (CANCEL | CONVERT | QUECVT | CONVDEADLK | FORCEUNLOCK):
        return EINVAL
    if flags & EXPEDITE and (mode != NL or flags & NOQUEUE):
        return EINVAL
    return 0


def check_conversion(mode: int, flags: int) -> int:
    """Is this a legal conversion of some lock? 0 or -EINVAL. What is illegal here is so of a busy lock as well."""
    if not NL <= mode <= EX:
        return EINVAL
    if flags & ~FLAGS_ALL or flags & (CANCEL | EXPEDITE | FORCEUNLOCK):
        return EINVAL
    if flags & CONVDEADLK and flags & NOQUEUE:
        return EINVAL
    return 0


def check_convert(granted: int, mode: int, flags: int) -> int:
    """Is this a legal conversion of an idle lock in mode `granted`? 0 or -EINVAL. A busy one is EBUSY before this."""
    if flags & QUECVT and (granted == IV or not NL <= mode <= EX or not QUECVT_LEGAL[granted][mode]):
        return EINVAL
    return check_conversion(mode, flags)


def check_unlock(flags: int) -> int:
    """Is this a legal unlock (or cancel)? 0 or -EINVAL."""
    if flags & ~UNLOCK_FLAGS or (flags & CANCEL and flags & FORCEUNLOCK):
        return EINVAL
    return 0
