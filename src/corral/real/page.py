"""A small shared mapping (DESIGN 4, the shared page).

Its creator always makes a new file and renames it into place: a page of an earlier life, still mapped by somebody, can
then never come alive again. The file is fully allocated first, so that no later touch of it can fail. Mode 0640: the
uid of corrald reads and writes, light clients of its group read.
"""

import errno
import mmap
import os

PAGE_MODE = 0o640


def map_page(path: str, size: int, *, create: bool) -> memoryview:
    """Writable where the file's mode lets this process write, else read-only. Raises OSError with a sentence."""
    if create:
        fd = _create(path, size)
        writable = True
    else:
        fd, writable = _open(path)
    try:
        found = os.fstat(fd).st_size
        if found < size:
            raise OSError(errno.EINVAL, f"{path} has {found} bytes where {size} are expected: is it a shared page?")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED, protection))
    finally:
        os.close(fd)


def _create(path: str, size: int) -> int:
    temporary = f"{path}.new"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, PAGE_MODE)
    try:
        os.fchmod(fd, PAGE_MODE)
        os.posix_fallocate(fd, 0, size)
        os.rename(temporary, path)
    except OSError as error:
        os.close(fd)
        os.unlink(temporary)
        raise OSError(error.errno, f"cannot make the shared page {path}: {error.strerror}") from None
    return fd


def _open(path: str) -> tuple[int, bool]:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC), True
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
