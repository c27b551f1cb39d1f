"""corrald's Unix socket: who may speak, what they may say, and the answers (docs/format/ipc.md).

A participant must run under corrald's uid; anyone who may open the socket (0660) may ask and watch. Every message is
checked before it is believed: a caller that sends what cannot be decoded, or speaks before `Attach`, is told why in one
sentence and disconnected.
"""

from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol, final

from corral.base.errors import ClusterError, PeerError
from corral.base.ids import MemberId
from corral.base.world import Connection, World
from corral.node.warden import Local, Log, Warden
from corral.providers.ipc_wire import (
    CLIENT,
    FROM_CORRALD,
    IPC_VERSION,
    PARTICIPANT,
    TO_CORRALD,
    Answer,
    Ask,
    Attach,
    Attached,
    Deregister,
    FromCorrald,
    Reach,
    Refusal,
    Register,
    StartDone,
    ToCorrald,
    ViewNow,
    Waits,
    Watch,
)

CALLERS_MAX: Final = 512
ASKING_MAX: Final = 64  # unanswered questions of one caller
UNREAD_MAX: Final = 16 << 20  # bytes a caller may leave unread

Answerer = Callable[[str, dict[str, Any]], Coroutine[Any, Any, Any]]


class Identity(Protocol):
    """What the node tells a newcomer."""

    def attached(self, member: MemberId | None, page_slot: int) -> Attached: ...


@final
class Door:
    def __init__(self, world: World, uid: int, warden: Warden, identity: Identity, answer: Answerer, log: Log) -> None:
        self.world: Final = world
        self.uid: Final = uid
        self.warden: Final = warden
        self.identity: Final = identity
        self.answer: Final = answer
        self.log: Final = log
        self.refused = 0
        self.callers: set[Caller] = set()
        self._view: ViewNow = ViewNow(None, False)

    def accept(self, connection: Connection) -> "Caller":
        caller = Caller(self, connection)
        if len(self.callers) >= CALLERS_MAX:
            caller.refuse(f"corrald serves at most {CALLERS_MAX} connections; close one first")
        else:
            self.callers.add(caller)
        return caller

    def view_changed(self, message: ViewNow) -> None:
        self._view = message
        for caller in list(self.callers):
            if caller.watching:
                caller.tell(message)

    @property
    def view(self) -> ViewNow:
        return self._view

    def close(self) -> None:
        for caller in list(self.callers):
            caller.connection.close()


@final
class Caller:
    """One connection: implements `ConnectionHandler`."""

    def __init__(self, door: Door, connection: Connection) -> None:
        self.connection = connection
        self.watching = False
        self._door = door
        self._attached = False
        self._closed = False
        self._local: Local | None = None
        self._asking = 0

    def tell(self, message: FromCorrald) -> None:
        if self._closed:
            return
        if self.connection.pending > UNREAD_MAX:
            self._door.log(f"a local caller does not read what it asked for ({UNREAD_MAX} bytes); it is disconnected")
            self._close()
            return
        self.connection.send([FROM_CORRALD.encode(message)])

    def refuse(self, reason: str) -> None:
        self._door.refused += 1
        self.tell(Refusal(reason))
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._door.callers.discard(self)
        self.connection.close()

    # -- ConnectionHandler

    def received(self, messages: list[bytes]) -> None:
        for payload in messages:
            if self._closed:
                return
            try:
                message = TO_CORRALD.decode(payload)
            except PeerError as error:
                self.refuse(f"this is not the language of corrald ({error}); use the same version of both")
                return
            self._handle(message)

    def broken(self, reason: str) -> None:
        self._closed = True
        self._door.callers.discard(self)
        if self._local is not None and not self._local.dying:
            self._door.warden.gone_away(self._local, reason)

    # -- what they say

    def _handle(self, message: ToCorrald) -> None:
        if isinstance(message, Attach):
            self._attach(message)
        elif not self._attached:
            self.refuse("the first message must be Attach")
        elif isinstance(message, Ask):
            self._ask(message)
        elif isinstance(message, Watch):
            self.watching = True
            self.tell(self._door.view)
        elif self._local is None:
            self.refuse("only a participant may take part in groups; attach as one")
        elif isinstance(message, StartDone):
            self._door.warden.start_done(self._local, message)
        elif isinstance(message, Reach):
            self._door.warden.reach(self._local, message)
        elif isinstance(message, Waits):
            self._door.warden.waits(self._local, message)
        elif isinstance(message, Register):
            self._register(self._local, message)
        else:
            assert isinstance(message, Deregister)
            self._door.warden.deregister(self._local, message)

    def _attach(self, message: Attach) -> None:
        if self._attached:
            self.refuse("attached already")
        elif message.version != IPC_VERSION:
            self.refuse(f"corrald speaks version {IPC_VERSION} of its socket's language, not {message.version}")
        elif message.role == CLIENT:
            self._attached = True
            self.tell(self._door.identity.attached(None, 0))
        elif message.role == PARTICIPANT:
            self._admit(message)
        else:
            self.refuse(f"unknown role {message.role!r}; it is {PARTICIPANT} or {CLIENT}")

    def _admit(self, message: Attach) -> None:
        credentials = self.connection.credentials
        if credentials is None or credentials.uid != self._door.uid:
            self.refuse(f"a participant must run under the uid of corrald ({self._door.uid})")
            return
        process = self._door.world.process.identify(credentials.pid)
        if process is None:
            self.refuse("the calling process is gone")
            return
        purpose = "".join(c for c in message.purpose if c.isprintable())[:64]
        admitted = self._door.warden.admit(self.connection, process, purpose)
        if isinstance(admitted, str):
            self.refuse(admitted)
            return
        self._local, slot = admitted
        self._attached = True
        self.watching = True
        self.tell(self._door.identity.attached(self._local.member, slot))
        self.tell(self._door.view)

    def _register(self, local: Local, message: Register) -> None:
        legal = 0 < len(message.group.encode()) <= 80 and message.group.isprintable()
        if not legal or not 1 <= message.level <= 3 or not 1 <= message.slots <= 4096:
            self.refuse("a group needs a printable name of 1 to 80 bytes, a level of 1 to 3 and 1 to 4096 slots")
        elif len(message.address) > 300 or len(message.ticket) > 64:
            self.refuse("the address or ticket of the join is too long")
        elif message.group in local.groups:
            self.refuse(f"it asks to join {message.group}, which it is in or has not left yet")
        else:
            self._door.warden.register(local, message)

    def _ask(self, message: Ask) -> None:
        if self._asking >= ASKING_MAX:
            self.tell(Answer(message.id, f"{ASKING_MAX} questions of this connection wait for answers; wait for one"))
            return
        self._asking += 1
        self._door.world.spawn(self._answer(message), f"answer {message.what}")

    async def _answer(self, message: Ask) -> None:
        try:
            body = await self._door.answer(message.what, message.arguments)
            self.tell(Answer(message.id, "", body))
        except ClusterError as error:
            self.tell(Answer(message.id, str(error)))
        finally:
            self._asking -= 1
