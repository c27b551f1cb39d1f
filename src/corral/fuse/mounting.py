"""Mounting and unmounting: from a directory to an open /dev/fuse connection and back.

Root calls mount(2) itself; anybody else goes through the setuid program fusermount3, which mounts and passes the
opened device back over a socket pair. All functions block (a dead or hung mount makes even stat() wait), so `mount`
runs them in a thread: the loop must stay free to answer the requests they cause.

Every refusal is one sentence with its cause and the next step.
"""

import asyncio
import contextlib
import ctypes
import errno
import functools
import inspect
import os
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import msgspec

from corral.api.gfs import Filesystem, Notifier
from corral.base.errors import ClusterError
from corral.fuse.notify import KernelNotifier
from corral.fuse.session import Limits, Session

DEVICE: Final = "/dev/fuse"
SUBTYPE: Final = "fuse.corral"
FUSERMOUNT: Final = "fusermount3"
FUSERMOUNT_TIMEOUT_S: Final = 10.0

_MS_RDONLY: Final = 1
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MNT_FORCE: Final = 1
_MNT_DETACH: Final = 2

_libc: Final = ctypes.CDLL(None, use_errno=True)


class MountError(ClusterError):
    """It could not be mounted or unmounted."""


class Options(msgspec.Struct, frozen=True):
    """`allow_other` None: yes for root (a cluster filesystem is everybody's), no for an ordinary user."""

    source: str = "corral"  # what df and mount show as the device
    read_only: bool = False
    allow_other: bool | None = None
    suid: bool = False  # honour setuid bits found on it
    devices: bool = False  # honour device nodes found on it
    nonempty: bool = False  # mount over a directory that has entries
    limits: Limits = Limits()


DEFAULTS: Final = Options()


class Mounted(NamedTuple):
    """A line of /proc/self/mountinfo."""

    device: int  # st_dev minor: also the number of the FUSE connection
    path: str
    type: str
    source: str


def mounts() -> list[Mounted]:
    """Every mount of this namespace, later ones on top."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return [mounted for line in file if (mounted := _mountinfo(line)) is not None]


def _mountinfo(line: str) -> Mounted | None:
    left, separator, right = line.partition(" - ")
    fields, rest = left.split(), right.split()
    if not separator or len(fields) < 5 or len(rest) < 2:
        return None
    return Mounted(int(fields[2].split(":")[1]), _unescape(fields[4]), rest[0], _unescape(rest[1]))


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mounted_at(path: str) -> Mounted | None:
    """The topmost mount at this path, asked without touching it."""
    path = _absolute(path)
    found = None
    for mounted in mounts():
        if mounted.path == path:
            found = mounted
    return found


def _absolute(path: str) -> str:
    """Symbolic links in the parents resolved; the last component, perhaps a dead mount, is not touched."""
    head, tail = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(head), tail)


# --- dead mounts ---------------------------------------------------------------------------------------------------


def is_dead(path: str) -> bool:
    """Whether a FUSE mount is there whose server is gone ("Transport endpoint is not connected"). Only a FUSE mount is
    touched for that, so that no other filesystem's trouble can make this hang."""
    mounted = mounted_at(path)
    if mounted is None or not mounted.type.startswith("fuse"):
        return False
    try:
        os.stat(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def clear_dead(path: str) -> bool:
    """Detaches a dead corral mount; True when there was one. Another program's dead mount is only named."""
    if not is_dead(path):
        return False
    mounted = mounted_at(path)
    if mounted is None or mounted.type != SUBTYPE:
        kind = mounted.type if mounted else "mount"
        raise MountError(f"{path} is a dead {kind} of another program; remove it with: umount -l {path}")
    unmount(path, lazy=True)
    return True


# --- mounting ------------------------------------------------------------------------------------------------------


def check_mountpoint(path: str, options: Options) -> str:
    """The absolute path of a directory that can be mounted on; a dead mount of ours is cleared away first."""
    clear_dead(path)
    path = _absolute(path)
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        raise MountError(f"the mountpoint {path} does not exist; make it with: mkdir -p {path}") from None
    except OSError as error:
        raise MountError(f"the mountpoint {path} cannot be looked at ({error.strerror}); choose another") from None
    if not stat.S_ISDIR(mode):
        raise MountError(f"the mountpoint {path} is not a directory; choose or make one")
    mounted = mounted_at(path)
    if mounted is not None:
        raise MountError(
            f"{path} is already a mountpoint ({mounted.type} from {mounted.source}); unmount it with: umount {path}"
        )
    if not options.nonempty and os.listdir(path):
        raise MountError(f"the mountpoint {path} is not empty; empty it, choose another or allow it with nonempty")
    return path


def open_and_mount(path: str, options: Options) -> int:
    """The connection's device descriptor, non-blocking; the kernel's INIT waits to be read from it."""
    if not os.path.exists(DEVICE):
        raise MountError(
            f"there is no {DEVICE}; load the module with: sudo modprobe fuse (in a container pass --device {DEVICE})"
        )
    if os.geteuid() == 0:
        return _mount_as_root(path, options)
    return _mount_as_user(path, options)


def why_not_here(path: str) -> str:
    """Why nothing can be mounted on this empty directory, found by trying; "" when it can."""
    try:
        fd = open_and_mount(check_mountpoint(path, DEFAULTS), DEFAULTS)
    except MountError as error:
        return str(error)
    os.close(fd)
    unmount(path, lazy=True)
    return ""


def _mount_as_root(path: str, options: Options) -> int:
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise MountError(
            f"{DEVICE} cannot be opened ({error.strerror}); in a container pass --device {DEVICE}"
        ) from None
    flags = _MS_RDONLY if options.read_only else 0
    flags |= (0 if options.suid else _MS_NOSUID) | (0 if options.devices else _MS_NODEV)
    data = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions"
    data += f",max_read={options.limits.max_write}"
    if options.allow_other is not False:
        data += ",allow_other"
    source = options.source.encode()
    if _libc.mount(source, os.fsencode(path), SUBTYPE.encode(), ctypes.c_ulong(flags), data.encode()) == 0:
        return fd
    number = ctypes.get_errno()
    os.close(fd)
    raise MountError(_why_not_mounted(path, number))


def _why_not_mounted(path: str, number: int) -> str:
    if number == errno.EPERM:
        return f"mounting on {path} is not permitted; run it with CAP_SYS_ADMIN (in a container: --cap-add SYS_ADMIN)"
    if number == errno.ENODEV:
        return "this kernel has no FUSE; load the module with: sudo modprobe fuse"
    if number == errno.EBUSY:
        return f"{path} is busy; see who uses it with: fuser -vm {path}"
    return f"mounting on {path} failed ({os.strerror(number)}); see the kernel's log with: dmesg"


def _mount_as_user(path: str, options: Options) -> int:
    program = _fusermount("mounting")
    chosen = [
        "ro" if options.read_only else "rw",
        f"fsname={options.source.replace(',', '_')}",
        "subtype=corral",
        "default_permissions",
        f"max_read={options.limits.max_write}",
    ]
    if options.allow_other:
        chosen.append("allow_other")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        ours.settimeout(FUSERMOUNT_TIMEOUT_S)
        done = _run([program, "-o", ",".join(chosen), "--", path], commfd=theirs.fileno())
        theirs.close()
        if done.returncode:
            raise MountError(_fusermount_refusal("mount on", path, done.stderr))
        return _receive_descriptor(ours, path)


def _receive_descriptor(channel: socket.socket, path: str) -> int:
    try:
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
    except OSError:
        descriptors = []
    if not descriptors:
        raise MountError(f"{FUSERMOUNT} mounted {path} without handing over its device; reinstall the package fuse3")
    os.set_inheritable(descriptors[0], False)
    os.set_blocking(descriptors[0], False)
    return descriptors[0]


def _fusermount(purpose: str) -> str:
    program = shutil.which(FUSERMOUNT)
    if program is None:
        raise MountError(
            f"{purpose} as an ordinary user needs {FUSERMOUNT}; install it with: sudo apt-get install -y fuse3"
        )
    return program


def _run(argv: list[str], commfd: int | None = None) -> subprocess.CompletedProcess[bytes]:
    environment = dict(os.environ, LC_ALL="C")
    if commfd is not None:
        environment["_FUSE_COMMFD"] = str(commfd)
    try:
        return subprocess.run(
            argv,
            env=environment,
            pass_fds=() if commfd is None else (commfd,),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=FUSERMOUNT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MountError(f"{argv[0]} did not answer within {FUSERMOUNT_TIMEOUT_S:.0f} s; is the path hung?") from None


def _fusermount_refusal(action: str, path: str, output: bytes) -> str:
    said = " ".join(output.decode(errors="replace").split()) or "it gave no reason"
    hint = ""
    if "allow_other" in said:
        hint = "; write user_allow_other into /etc/fuse.conf or mount without allow_other"
    elif DEVICE in said:
        hint = f"; open it to everybody with: sudo chmod 666 {DEVICE}"
    return f"{FUSERMOUNT} could not {action} {path} ({said[:200]}){hint}"


# --- unmounting ----------------------------------------------------------------------------------------------------


def unmount(path: str, *, lazy: bool) -> None:
    """Not lazy: dirty mapped pages are written back and nobody uses it any more, else MountError. Lazy: the name is
    gone at once, open files live on until closed. No error when nothing is mounted there."""
    if os.geteuid() != 0:
        argv = [_fusermount("unmounting"), "-u", *(["-z"] if lazy else []), "--", path]
        done = _run(argv)
        if done.returncode and mounted_at(path) is not None:
            raise MountError(_fusermount_refusal("unmount", path, done.stderr))
        return
    if _libc.umount2(os.fsencode(path), _MNT_DETACH if lazy else 0) == 0:
        return
    number = ctypes.get_errno()
    if number == errno.EBUSY:
        raise MountError(f"{path} is in use; see by whom with: fuser -vm {path}")
    if number not in (errno.EINVAL, errno.ENOENT):
        raise MountError(f"{path} cannot be unmounted ({os.strerror(number)})")


def abort_connection(mounted: Mounted) -> None:
    """Every request, answered or not, fails at once and for ever; the name is detached. Never raises."""
    with contextlib.suppress(OSError), open(f"/sys/fs/fuse/connections/{mounted.device}/abort", "w") as control:
        control.write("1")
    now = mounted_at(mounted.path)
    if now is None or now.device != mounted.device:
        return  # unmounted, or another filesystem has taken the place
    if os.geteuid() == 0:
        _libc.umount2(os.fsencode(mounted.path), _MNT_FORCE | _MNT_DETACH)
    else:
        with contextlib.suppress(MountError):
            unmount(mounted.path, lazy=True)


# --- the door ------------------------------------------------------------------------------------------------------


class Mount:
    """A filesystem mounted and served. `async with` unmounts at the end."""

    def __init__(self, session: Session, mounted: Mounted) -> None:
        self.session = session
        self.path = mounted.path
        self.mounted = mounted

    async def run(self) -> None:
        """Until it is unmounted, by us or anybody; raises what ended it otherwise."""
        await self.session.run()

    async def unmount(self, *, lazy: bool = False) -> None:
        """Returns when the filesystem has committed and let go. Raises MountError when it is in use (not `lazy`)."""
        if not self.session.closed.done():
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, functools.partial(unmount, self.path, lazy=lazy))
        await self.session.run()

    async def abort(self, reason: str) -> None:
        """Withdraw: nothing is answered any more but EIO. Returns when the filesystem is destroyed; never raises."""
        self.session.withdraw(reason)
        await asyncio.wait([self.session.closed])

    async def __aenter__(self) -> "Mount":
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.session.closed.done():
            return
        try:
            await self.unmount()
        except MountError:
            await self.abort("the mount was in use when its server ended")


async def mount(
    make_filesystem: Callable[[Notifier], Filesystem | Awaitable[Filesystem]],
    mountpoint: str,
    options: Options = DEFAULTS,
    *,
    may_reply: Callable[[], bool] | None = None,
) -> Mount:
    """Mounts what `make_filesystem(notifier)` gives and serves it on the running loop. Returns when the kernel and we
    have agreed on a protocol. Raises MountError; the filesystem, if made, is destroyed then."""
    loop = asyncio.get_running_loop()
    path = await loop.run_in_executor(None, check_mountpoint, mountpoint, options)
    notifier = KernelNotifier(loop)
    made = make_filesystem(notifier)
    filesystem: Filesystem = await made if inspect.isawaitable(made) else made
    try:
        fd = await loop.run_in_executor(None, open_and_mount, path, options)
    except MountError:
        await filesystem.destroy()
        raise
    mounted = mounted_at(path) or Mounted(-1, path, SUBTYPE, options.source)
    session = Session(
        loop,
        filesystem,
        notifier,
        fd,
        options.limits,
        may_reply=may_reply,
        abort=functools.partial(abort_connection, mounted),
    )
    session.start()
    try:
        await session.ready
    except asyncio.CancelledError:
        session.withdraw("mounting was given up")
        await asyncio.wait([session.closed])
        raise
    return Mount(session, mounted)
