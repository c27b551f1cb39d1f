"""This process becomes a participant of the cluster and opens the filesystem for itself.

It takes one journal of the filesystem for as long as it has it open. corrald treats it as it treats a mount: when its
event loop stands still for `recover`, when it closes its connection without `close`, or when the node is fenced, the
whole process is killed, for only a process that is gone can write nothing any more.
"""

import asyncio
import logging
import os
from types import TracebackType
from typing import Any, final

from corral.api.gfs import Caller
from corral.base.errors import ClusterError
from corral.base.world import Disk
from corral.doors import connect, socket_path
from corral.files.gate import Gate
from corral.files.paths import Files
from corral.gfs.filesystem import GfsFilesystem
from corral.gfs.volume import Options
from corral.providers.endpoint import native_endpoint
from corral.providers.native_gfs import NativeMount
from corral.providers.participant import Participant
from corral.real import pki
from corral.real.world import RealWorld

log = logging.getLogger("corral.files")


@final
class Opening:
    """What `open_filesystem()` returns: `async with` it."""

    def __init__(self, device: str, socket: str) -> None:
        self._device = device
        self._socket = socket
        self._world: RealWorld
        self._participant: Participant
        self._disk: Disk | None = None
        self._native: NativeMount | None = None
        self._filesystem: GfsFilesystem
        self._gate: Gate | None = None

    async def __aenter__(self) -> Files:
        async with connect(self._socket) as cluster:
            paths: dict[str, Any] = await cluster.ask("paths")
        credentials = pki.load(paths["certificates"], paths["node"])
        self._world = RealWorld("/nonexistent", credentials, fatal=self._bug, guest=True)  # no state is kept
        self._participant = Participant(
            self._world, self._socket, paths["participants"], native_endpoint, purpose=f"files of {self._device}"
        )
        try:
            await self._participant.open()
            self._disk = await self._world.disk(self._device)
            self._native = NativeMount(self._world, self._participant, self._disk, Options(withdrawn=self._withdrawn))
            self._filesystem = await self._native.open(None)
        except BaseException as error:
            await asyncio.shield(self._let_go())
            if isinstance(error, ClusterError | OSError):
                reason = error.strerror if isinstance(error, OSError) else ""
                raise ClusterError(f"{self._device} cannot be opened: {reason or error}") from None
            raise
        self._participant.lost.add_done_callback(lambda lost: self._filesystem.withdraw(lost.result()))
        self._gate = Gate(self._participant.may_act, self._participant.identity.detect_ns // 20)
        if self._filesystem.withdrawn is not None:
            self._gate.lose(self._filesystem.withdrawn)
        return Files(self._filesystem, Caller(os.geteuid(), os.getegid(), os.getpid()), self._gate)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(self._close())

    async def _close(self) -> None:
        """Everything durable, the journal clean, the groups left."""
        try:
            assert self._native is not None
            await self._native.close()
        finally:
            await self._let_go()

    async def _let_go(self) -> None:
        self._participant.close()
        if self._disk is not None:
            self._disk.close()
        await self._world.close()

    def _withdrawn(self, reason: str) -> None:
        log.error("the filesystem is given up: %s", reason)
        if self._gate is not None:
            self._gate.lose(reason)

    def _bug(self, error: BaseException, where: str) -> None:
        """A guest in somebody else's process: it does not end it, but trusts itself no more."""
        log.critical("a bug in corral, in %s: %s", where, error, exc_info=error)
        if self._native is not None and self._native.filesystem is not None:
            self._native.filesystem.withdraw(f"a bug in corral, in {where}: {error}")


def open_filesystem(device: str | os.PathLike[str], socket: str | os.PathLike[str] | None = None) -> Opening:
    """The filesystem on `device`, a block device or an image, through the corrald whose Unix socket is at `socket`, by
    default $CORRAL_SOCKET, else /run/corral/corrald.sock. Raises ClusterError with a sentence when it cannot be had."""
    return Opening(os.path.abspath(os.fspath(device)), socket_path(socket))
