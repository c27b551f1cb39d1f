"""The caller's side of corrald's Unix socket: ask, watch, and know when it is gone."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final, final

from corral.api.cman import ViewChanged
from corral.base.errors import Busy, ClusterError, NotMember, PeerError
from corral.base.view import View
from corral.base.world import Connection, World
from corral.providers.ipc_wire import (
    CLIENT,
    FROM_CORRALD,
    IPC_VERSION,
    TO_CORRALD,
    Answer,
    Ask,
    Attach,
    Attached,
    Refusal,
    ToCorrald,
    ViewNow,
    Watch,
)

CHANGES_MAX: Final = 1024  # view changes a slow watcher may be behind


@final
class CorraldClient:
    """One connection. Implements `ConnectionHandler`; every method is for the loop that opened it."""

    def __init__(self, world: World, socket: str) -> None:
        self._world = world
        self._socket = socket
        self._connection: Connection | None = None
        self._attached: asyncio.Future[Attached] = world.future()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._next = 0
        self._watchers: list[asyncio.Queue[ViewChanged | None]] = []
        self._now = ViewNow(None, False)
        self._first_view: asyncio.Future[None] = world.future()
        self.gone: asyncio.Future[str] = world.future()
        """Resolves with the reason when the connection is over."""
        self.identity: Attached

    async def open(self) -> None:
        """Raises ClusterError when no corrald answers there or it refuses."""
        try:
            self._connection = await self._world.local.connect(self._socket, self)
        except OSError as error:
            raise ClusterError(
                f"no corrald answers at {self._socket} ({error.strerror or error}); "
                "start it, or name another socket with --socket or CORRAL_SOCKET"
            ) from None
        self._tell(Attach(IPC_VERSION, CLIENT))
        self._tell(Watch())
        self.identity = await self._attached
        await self._first_view

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    @property
    def view(self) -> View | None:
        return self._now.view

    @property
    def active(self) -> bool:
        return self._now.active

    async def ask(self, what: str, **arguments: Any) -> Any:
        """One question or command. Raises ClusterError with corrald's sentence."""
        if self.gone.done():
            raise NotMember(self.gone.result())
        self._next += 1
        answer: asyncio.Future[Any] = self._world.future()
        self._answers[self._next] = answer
        self._tell(Ask(self._next, what, arguments))
        return await answer

    async def watch(self) -> AsyncIterator[ViewChanged]:
        """The present view and every change; ends when corrald goes away. A watcher too slow for `CHANGES_MAX` changes
        gets Busy instead of a gap."""
        queue: asyncio.Queue[ViewChanged | None] = asyncio.Queue(CHANGES_MAX)
        self._watchers.append(queue)
        try:
            if self._now.view is not None:
                yield ViewChanged(self._now.view, self._now.active)
            while (change := await queue.get()) is not None:
                yield change
            if not self.gone.done():
                raise Busy(f"this watcher was more than {CHANGES_MAX} view changes behind; read faster")
        finally:
            if queue in self._watchers:
                self._watchers.remove(queue)

    # -- ConnectionHandler

    def received(self, messages: list[bytes]) -> None:
        for payload in messages:
            try:
                message = FROM_CORRALD.decode(payload)
            except PeerError as error:
                self._end(f"corrald sent what this version does not understand ({error})")
                return
            if isinstance(message, Answer):
                self._answer(message)
            elif isinstance(message, ViewNow):
                self._view(message)
            elif isinstance(message, Attached):
                if not self._attached.done():
                    self._attached.set_result(message)
            elif isinstance(message, Refusal):
                self._end(message.reason)

    def broken(self, reason: str) -> None:
        self._end(f"the connection to corrald at {self._socket} broke: {reason}")

    # -- leaves

    def _tell(self, message: ToCorrald) -> None:
        assert self._connection is not None
        self._connection.send([TO_CORRALD.encode(message)])

    def _answer(self, message: Answer) -> None:
        answer = self._answers.pop(message.id, None)
        if answer is None or answer.done():
            return
        if message.error:
            answer.set_exception(ClusterError(message.error))
        else:
            answer.set_result(message.body)

    def _view(self, message: ViewNow) -> None:
        self._now = message
        if not self._first_view.done():
            self._first_view.set_result(None)
        if message.view is None:
            return
        for queue in list(self._watchers):
            if queue.qsize() >= CHANGES_MAX - 1:
                self._watchers.remove(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(ViewChanged(message.view, message.active))

    def _end(self, reason: str) -> None:
        if self.gone.done():
            return
        self.gone.set_result(reason)
        for future in (self._attached, self._first_view):
            if not future.done():
                future.set_exception(ClusterError(reason))
                future.exception()  # whoever opens awaits one of them; the other must not complain
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(NotMember(reason))
        self._answers.clear()
        for queue in self._watchers:
            if not queue.full():
                queue.put_nowait(None)
        self.close()
