"""corral without asyncio: the same calls, blocking, from any thread.

    with corral.sync.connect() as cluster:
        space = cluster.lockspace("orders")
        with space.lock("invoice-42", corral.EX, timeout=5) as held:
            held.token, held.value

    with corral.sync.open_filesystem("/dev/sdb") as files, files.open("log", os.O_WRONLY | os.O_CREAT) as file:
        file.append(b"one more\n")

One event loop runs in a thread of its own; every call here hands a coroutine to it and waits, so any number of threads
may share one object. An interrupted wait (KeyboardInterrupt) takes its request back, and what came meanwhile as well;
an interrupted unlock or close goes on. A call from within a callback (`on_block`) would wait for itself; it is refused
with RuntimeError.

A body cannot be cancelled from outside in a plain thread: losing a lock's guarantee raises LockLost when the body is
left, and `held.valid` tells it at once.

loop.py      the thread and the way into it
locks.py     `Cluster`, `Space`, `Held`: `connect`, `local`
files.py     `Files`, `File`: `open_filesystem`
"""

from corral.sync.files import File, Files, open_filesystem
from corral.sync.locks import Cluster, Held, Space, connect, local

__all__ = ["Cluster", "File", "Files", "Held", "Space", "connect", "local", "open_filesystem"]
