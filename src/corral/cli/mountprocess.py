"""The process behind a mount: participant, filesystem and FUSE session of one node (`corral gfs mount`).

It ends when it is unmounted, on SIGTERM (after unmounting), or when it may not act any more; then its pages are
dropped, the mount is detached and the journal is left to the others.
"""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from typing import Any, Final

from corral.api.gfs import Filesystem, Notifier
from corral.base.errors import ClusterError
from corral.cli.localcluster import ask
from corral.fuse.mounting import Mount, Options, mount
from corral.gfs.volume import Options as GfsOptions
from corral.providers.endpoint import native_endpoint
from corral.providers.native_gfs import NativeMount
from corral.providers.participant import Participant
from corral.real import pki
from corral.real.run import Stopped, run
from corral.real.world import RealWorld

UNMOUNT_SECONDS: Final = 30.0

log = logging.getLogger("corral.mount")


async def serve(world: RealWorld, socket: str, participants: str, device: str, mountpoint: str) -> str:
    """Until it is unmounted; returns "" then, or why this mount may not go on."""
    participant = Participant(world, socket, participants, native_endpoint, purpose=f"mount {mountpoint}")
    await participant.open()
    withdrawn: asyncio.Future[str] = world.future()

    def withdraw(reason: str) -> None:
        if not withdrawn.done():
            withdrawn.set_result(reason)

    disk = await world.disk(device)
    native = NativeMount(world, participant, disk, GfsOptions(withdrawn=withdraw))

    async def make(notifier: Notifier) -> Filesystem:
        try:
            return await native.open(notifier)
        except ClusterError as error:
            raise ClusterError(f"{device} cannot be mounted: {error}") from None

    mounted: Mount | None = None
    guardian = subprocess.Popen(  # noqa: ASYNC220 (nothing is served yet that it could hold up)
        [sys.executable, "-m", "corral.fuse.guardian", mountpoint, str(os.getpid())],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        mounted = await mount(make, mountpoint, Options(source=device), may_reply=participant.may_act)
        log.info("mounted %s on %s", device, mountpoint)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _tell_waiting, mounted, native)
        reason = await _until_over(mounted, native, participant, withdrawn)
        if reason:
            log.error("the mount of %s ended: %s", mountpoint, reason)
        return reason
    except ClusterError as error:
        log.error("%s", error)
        raise
    finally:
        # Said before: corrald kills whoever lets go of it with something to recover.
        guardian.terminate()
        participant.close()
        disk.close()


def _tell_waiting(mounted: Mount, native: NativeMount) -> None:
    """SIGUSR1: what this mount waits for goes to its log."""
    for line in mounted.session.waiting():
        log.info("request: %s", line)
    if native.filesystem is not None:
        for held in native.filesystem.glock_dump(40):
            log.info("glock: %s", held)
        log.info("statistics: %s", native.filesystem.statistics())


async def _until_over(
    mounted: Mount, native: NativeMount, participant: Participant, withdrawn: "asyncio.Future[str]"
) -> str:
    served = asyncio.ensure_future(mounted.run())
    try:
        await asyncio.wait((served, participant.lost, withdrawn), return_when=asyncio.FIRST_COMPLETED)
        for over in (participant.lost, withdrawn):
            if over.done():
                await mounted.abort(over.result())
                await asyncio.wait((served,))
                _why_ended(served)  # the session says the same
                return over.result()
        await native.close()
        return _why_ended(served)
    except asyncio.CancelledError:
        # SIGTERM: as `umount` would, and by force when somebody still uses it.
        async with mounted:
            pass
        await asyncio.wait((served,), timeout=UNMOUNT_SECONDS)
        if served.done():
            _why_ended(served)  # by our own force, if by any
        await native.close()
        return ""


def _why_ended(served: "asyncio.Future[None]") -> str:
    """Empty after an unmount, else the sentence. Raises what is our own bug."""
    error = served.exception()
    if error is None:
        return ""
    if isinstance(error, ClusterError):
        return str(error)
    raise error


def main(socket: str, device: str, mountpoint: str) -> None:
    """Runs in the foreground; exits with a sentence when it cannot."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    paths: dict[str, Any] = asyncio.run(ask(socket, "paths"))
    credentials = pki.load(paths["certificates"], paths["node"])

    async def body(world: RealWorld) -> str:
        return await serve(world, socket, paths["participants"], device, mountpoint)

    try:
        reason = run(body, state_directory="/nonexistent", credentials=credentials)
    except OSError as error:
        raise ClusterError(f"{device} cannot be mounted: {error.strerror or error}") from None
    except Stopped as error:
        raise ClusterError(f"{error}; the log has the details") from None
    except asyncio.CancelledError:
        sys.exit(1)
    if reason:
        raise ClusterError(f"the mount of {mountpoint} ended: {reason}")
