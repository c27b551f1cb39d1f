"""A door: the shared filesystem from an application's asyncio code, without the kernel (no FUSE, no mount).

    async with corral.open_filesystem("/dev/sdb") as files:      # through this node's corrald
        await files.mkdir("reports")
        async with files.open("reports/today", os.O_RDWR | os.O_CREAT) as file:
            await file.flock()
            await file.pwrite(b"12 orders", 0)
            await file.fsync()                                   # durable, and seen by every node

paths.py     calls by path over the contract of `api/gfs.py`: `Files`, `File`
gate.py      an answer leaves only while the lease runs
opening.py   the process becomes a participant of the cluster: `open_filesystem`
"""

from corral.files.opening import Opening, open_filesystem
from corral.files.paths import File, Files

__all__ = ["File", "Files", "Opening", "open_filesystem"]
