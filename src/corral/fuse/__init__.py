"""A door: serves a `corral.api.gfs.Filesystem` to the Linux kernel over /dev/fuse (DESIGN 5, FUSE).

protocol.py    what the kernel sends: numbers, layouts, the decoder      replies.py   what we send: bytes of answers
device.py      the descriptor and the buffers                            operations.py  opcode → Filesystem → payload
session.py     the loop: drive, answer, suspend, interrupt, freeze       notify.py    cache invalidation, own threads
mounting.py    mount(2) or fusermount3, dead mounts, unmount, `mount()`

mounted = await fuse.mount(lambda notifier: Gfs(..., notifier), "/mnt/home")
await mounted.run()                      # until somebody unmounts it
"""

from corral.fuse.mounting import Mount, MountError, Options, clear_dead, is_dead, mount, mounted_at, unmount
from corral.fuse.notify import KernelNotifier
from corral.fuse.session import Limits, Session, Statistics, WaitingRequest, Withdrawn

__all__ = [
    "KernelNotifier",
    "Limits",
    "Mount",
    "MountError",
    "Options",
    "Session",
    "Statistics",
    "WaitingRequest",
    "Withdrawn",
    "clear_dead",
    "is_dead",
    "mount",
    "mounted_at",
    "unmount",
]
