"""Lets a killed mount process end.

A process that is killed while one of its threads waits in the kernel for a page (an invalidation), whose request only
the process itself could have answered, never ends: the thread keeps /dev/fuse open, so the kernel does not abort the
connection, so the request is never given up. Nothing may be recovered until such a process is *gone*.

So each mount has a guardian, a process of its own that the kernel signals when the mount's main thread dies. If other
threads are then still there, it aborts the connection: every request fails, the threads end.

    python -m corral.fuse.guardian MOUNTPOINT PARENT_PID
"""

import ctypes
import os
import signal
import sys
import time
from typing import Final

PR_SET_PDEATHSIG: Final = 1
MNT_FORCE: Final = 1
PATIENCE_SECONDS: Final = 0.2  # in which a killed process usually ends by itself
TRIES: Final = 50

PARENT_DIED: Final = signal.SIGUSR1


def wait_for_parent(parent: int) -> bool:
    """True when it died, False when it told this process to end."""
    signals = {PARENT_DIED, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, {*signals, signal.SIGINT})
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, PARENT_DIED) != 0:
        return False
    if os.getppid() != parent:
        return True  # it died before we could ask to be told
    return signal.sigwait(signals) == PARENT_DIED


def is_stuck(pid: int) -> bool:
    """Whether threads other than the dead first one are still there."""
    try:
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def main(mountpoint: str, parent: int) -> None:
    if not wait_for_parent(parent):
        return
    for _ in range(TRIES):
        time.sleep(PATIENCE_SECONDS)
        if not is_stuck(parent):
            return
        # Aborts the connection even where the mount itself is in use and stays.
        ctypes.CDLL(None).umount2(os.fsencode(mountpoint), MNT_FORCE)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
