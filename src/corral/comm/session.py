"""One peer: numbered sessions over connections that come and go (DESIGN 5, comm).

The lower member id connects and numbers the sessions; the other accepts. A *session* outlives its connection: when that
breaks, both keep what is unacknowledged, the caller reconnects with HELLO(resume), the callee answers WELCOME, each
learns how much the other has and sends the rest again. A session ends, on each side on its own, exactly once:

    no connection for session_timeout · the reconnect is refused (nobody listens: `refused`) · the peer shows a newer
    incarnation or no longer knows the session · its queue passes the byte bound or stalls · the peer breaks the
    protocol, or closes it in order · drop

and the caller then opens the next one under a higher number. The callee never opens; while it misses the caller it
connects to say a HELLO too, the *summons*: that connection never carries a session, but shows whether anybody listens
there, and a caller that has not noticed the break of the connection named in it calls again.

    caller   idle ─Connect─► dialing ─connected, HELLO─► greeting ─WELCOME─► open ─broken or summoned─► idle
    callee   idle ─HELLO accepted, WELCOME─► open ─broken─► idle (summoning, until refused)

`alive` says whether a session exists, `connection` whether it has one now; the two vary independently.

Invariants:
  COMM-1  Within a session each message is delivered exactly once, in the order sent; what arrived is a prefix.
  COMM-2  PeerUp and PeerDown of a peer alternate, beginning with PeerUp; session numbers of a peer rise.
  COMM-3  Nothing of a session is delivered before its PeerUp or after its PeerDown.
  COMM-4  What is unacknowledged is bounded in bytes and age; past the bound the session ends with a reason.
  COMM-5  A peer is who its certificate, member id and ticket say, all three; no older incarnation replaces a newer.
  COMM-6  At most one connection carries a session, the one with the newest attempt.
  COMM-9  Honest members never look hostile to each other, whatever the network does to their connections.
  COMM-10 A deadline that was kept has moved: nobody is woken for ever.
(7 and 8 are the gate's.)

Numbers are authenticated by TLS, so a number out of order is a bug or an enemy with a certificate: the session ends.
"""

import hmac
from typing import Final, final

from corral.api.comm import PeerDown, PeerUp
from corral.base.errors import Busy, PeerError
from corral.base.ids import Incarnation, MemberId
from corral.base.time import FOREVER, Instant
from corral.comm import wire
from corral.comm.actions import Abandon, Action, Connect, Counters, Deliver, Limits, Outdated, Shut, Write
from corral.comm.handshake import Identity, check_welcome, hello_from, printable, welcome_from
from corral.comm.seal import Opener, Sealer, derive
from corral.comm.wire import Close, Hello, Refuse, Welcome
from corral.wire import frame
from corral.wire.codec import MESSAGE_MAX
from corral.wire.frame import ACK, CLOSE, DATA, HEADER, HELLO, MAGIC, REFUSE, USER_PORT_MIN, VERSION, WELCOME

_HEADER_SIZE: Final = HEADER.size
_PACK: Final = HEADER.pack
_UNPACK: Final = HEADER.unpack_from
COMPACT: Final = 1024  # acknowledged entries kept at the head of the queue before the list is cut


@final
class Shared:
    """What the sessions of one process have in common."""

    __slots__ = ("_attempt", "counters", "identity", "limits", "out")

    def __init__(self, identity: Identity, limits: Limits) -> None:
        self.identity = identity
        self.limits = limits
        self.out: list[Action] = []
        self.counters = Counters(self.out)
        self._attempt = 0

    def next_attempt(self) -> int:
        """Rises over the life of the process: orders its connections, numbers its sessions, names datagram keys."""
        self._attempt += 1
        return self._attempt


@final
class SessionEngine:
    """One peer. `deadline` is when `tick` wants to be called, at the latest; it may be early, never late."""

    __slots__ = (
        "_ack_at",
        "_acked",
        "_address",
        "_age_at",
        "_age_marks",
        "_attempt",
        "_attempt_at",
        "_backoff",
        "_bytes_received",
        "_bytes_sent",
        "_greeting",
        "_greeting_at",
        "_half",
        "_head",
        "_lost_at",
        "_openers",
        "_received",
        "_received_acked",
        "_retry_at",
        "_sealer",
        "_seen_attempt",
        "_sent",
        "_shared",
        "_ticket",
        "_unacked",
        "_unacked_bytes",
        "alive",
        "announced",
        "caller",
        "connection",
        "deadline",
        "peer",
        "session",
    )

    def __init__(self, shared: Shared, peer: MemberId, address: str, ticket: bytes) -> None:
        me = shared.identity.me
        self._shared = shared
        self.peer = peer  # incarnation 0: a corrald whose incarnation is not known yet
        self._address = address
        self._ticket = ticket
        self.caller = (me.node, me.serial) < (peer.node, peer.serial)
        self.session = 0
        self.alive = False
        self.announced = 0  # the session whose PeerUp the runner has told; until then nobody may send into it
        self.connection = 0
        self.deadline: Instant = FOREVER
        # Connecting.
        self._attempt = 0  # outstanding Connect
        self._attempt_at: Instant = FOREVER
        self._greeting = 0  # connection that said HELLO and waits for the answer
        self._greeting_at: Instant = FOREVER
        self._half = b""
        self._seen_attempt = 0  # the newest of the caller's attempts, on the callee's side
        self._retry_at: Instant = FOREVER
        self._backoff = shared.limits.backoff_min_ns
        self._lost_at: Instant = FOREVER  # when a session without a connection ends
        # The session's two directions.
        self._sent = 0
        self._acked = 0
        self._unacked: list[bytes] = []
        self._head = 0  # entries of _unacked before it are acknowledged
        self._unacked_bytes = 0
        self._received = 0
        self._received_acked = 0
        self._bytes_sent = 0
        self._bytes_received = 0
        self._ack_at: Instant = FOREVER
        self._age_at: Instant = FOREVER
        self._age_marks = (0, 0)  # _sent at the last check and at the one before
        self._sealer: Sealer | None = None
        self._openers: list[Opener] = []

    # --- state that the runner and statistics look at ---------------------------------------------------------------

    @property
    def queued_frames(self) -> int:
        return self._sent - self._acked

    @property
    def queued_bytes(self) -> int:
        return self._unacked_bytes

    @property
    def address(self) -> str:
        return self._address

    @property
    def sealer(self) -> Sealer | None:
        return self._sealer

    def opener(self, key_id: int) -> Opener | None:
        for opener in self._openers:
            if opener.key_id == key_id:
                return opener
        return None

    def count(self, counters: Counters) -> None:
        """Adds the living session's traffic; the sums of those that ended are in the shared counters already."""
        counters.frames_sent += self._sent
        counters.bytes_sent += self._bytes_sent
        counters.frames_received += self._received
        counters.bytes_received += self._bytes_received

    def owns(self, connection: int) -> bool:
        return connection in (self.connection, self._greeting)

    # --- sending ------------------------------------------------------------------------------------------------------

    def pack(self, port: int, round_id: int, payload: bytes) -> bytes | None:
        """Numbers a message and keeps it until acknowledged. The frame is to be queued on `connection` at once when
        there is one. None: the queue is over its bound and the session has to end (COMM-4). Raises Busy (user ports).
        """
        length = len(payload)
        assert length <= MESSAGE_MAX, "messages are bounded by their engines' design"
        assert self.alive
        size = self._unacked_bytes + length + _HEADER_SIZE
        limits = self._shared.limits
        if port >= USER_PORT_MIN and size > limits.user_queue_bytes:
            raise Busy(f"{self._unacked_bytes} bytes to member {self.peer} are not acknowledged yet")
        if size > limits.queue_bytes:
            return None
        self._sent = sequence = self._sent + 1
        received = self._received
        message: bytes = (
            _PACK(MAGIC, VERSION, DATA, port, 0, length, round_id, sequence, received, self.session) + payload
        )
        self._unacked.append(message)
        self._unacked_bytes = size
        self._received_acked = received
        self._bytes_sent += length
        return message

    def _acknowledged(self, ack: int) -> bool:
        """Drops what the peer has. False: it claims what was never sent."""
        count = ack - self._acked
        if count <= 0:
            return True  # frames of before the last reconnect repeat older numbers
        if ack > self._sent:
            return False
        unacked = self._unacked
        head = self._head
        size = self._unacked_bytes
        for index in range(head, head + count):
            size -= len(unacked[index])
            unacked[index] = b""
        self._acked = ack
        self._unacked_bytes = size
        head += count
        if head == len(unacked):
            unacked.clear()
            head = 0
        elif head >= COMPACT and head * 2 >= len(unacked):
            del unacked[:head]
            head = 0
        self._head = head
        return True

    # --- receiving ----------------------------------------------------------------------------------------------------

    def receive(self, now: Instant, messages: list[bytes]) -> None:
        """All that one wakeup brought on the session's connection."""
        out = self._shared.out
        peer = self.peer
        session = self.session
        received = self._received
        size = 0
        run: list[bytes] = []
        run_port = run_round = -1
        problem = ""
        for message in messages:
            if len(message) < _HEADER_SIZE:
                problem = f"frame of {len(message)} bytes is shorter than its header"
                break
            magic, version, kind, port, _, length, round_id, sequence, ack, of_session = _UNPACK(message)
            if (
                kind != DATA
                or of_session != session
                or magic != MAGIC
                or version != VERSION
                or length != len(message) - _HEADER_SIZE
                or length > MESSAGE_MAX
            ):
                self._received = received
                problem = self._receive_other(now, message)
                if problem or not self.alive:
                    break
                continue
            if sequence != received + 1:
                if 0 < sequence <= received:
                    self._shared.counters.duplicates += 1
                    continue
                problem = f"frame {sequence} after {received}"
                break
            if ack != self._acked:
                if ack == self._sent:  # all of it: what an answer to the last message says
                    self._unacked.clear()
                    self._head = self._unacked_bytes = 0
                    self._acked = ack
                elif not self._acknowledged(ack):
                    problem = f"frame acknowledges {ack} of {self._sent}"
                    break
            received = sequence
            size += length
            if port == run_port and round_id == run_round:
                run.append(message[_HEADER_SIZE:])
            else:
                run = [message[_HEADER_SIZE:]]
                run_port = port
                run_round = round_id
                out.append(Deliver(peer, port, round_id, run))
        self._bytes_received += size
        if not self.alive or self.session != session:
            return
        self._received = received
        if problem:
            self._offend(now, problem)
        elif received - self._received_acked >= self._shared.limits.ack_frames:
            self._send_ack()
        elif received != self._received_acked and self._ack_at == FOREVER:
            self._ack_at = now + self._shared.limits.ack_delay_ns
            self._wake(self._ack_at)

    def _receive_other(self, now: Instant, message: bytes) -> str:
        """ACK and CLOSE, and whatever else an open connection must not carry: '' or what is wrong with it."""
        try:
            other = frame.parse(message)
            body = wire.body_of(other) if other.kind == CLOSE else None
        except PeerError as error:
            return str(error)
        if other.session != self.session:
            return f"frame of session {other.session} in session {self.session}"
        if other.kind == ACK:
            if len(other.body):
                return "an ACK with a body"
            return "" if self._acknowledged(other.ack) else f"ACK of {other.ack} of {self._sent}"
        if isinstance(body, Close):
            self._end(now, f"the peer ended the session: {printable(body.reason)}", say=None)
            return ""
        return f"frame kind {other.kind} on an open connection"

    def _send_ack(self) -> None:
        self._ack_at = FOREVER
        self._received_acked = self._received
        header = frame.pack_header(ACK, 0, 0, 0, self._received, self.session, 0)
        self._shared.out.append(Write(self.connection, [header]))

    # --- ending -------------------------------------------------------------------------------------------------------

    def end(self, now: Instant, code: int, reason: str) -> None:
        """Ends the session by our own decision and tells the peer why, if it can be told."""
        self._end(now, reason, say=code)

    def _offend(self, now: Instant, problem: str) -> None:
        """The peer broke the protocol on an open connection."""
        self._shared.counters.reject("protocol error in a session", self.peer.node, problem)
        self._end(now, f"protocol error: {problem}", say=wire.CLOSE_PROTOCOL)

    def _end(self, now: Instant, reason: str, *, say: int | None, refused: bool = False) -> None:
        if not self.alive:
            return
        out = self._shared.out
        if self.connection:
            if say is not None:
                body = Close(say, reason[: wire.REASON_MAX])
                out.append(Write(self.connection, [wire.control(CLOSE, self.session, self._received, body)]))
            out.append(Shut(self.connection))
            self.connection = 0
        self._drop_greeting()  # a greeting that would resume this session must not
        self.alive = False
        self.announced = 0
        self.count(self._shared.counters)
        self._bytes_sent = self._bytes_received = 0
        self._lost_at = self._ack_at = self._age_at = FOREVER
        self._sent = self._acked = self._received = self._received_acked = self._head = self._unacked_bytes = 0
        self._unacked.clear()
        self._sealer = None
        self._openers.clear()
        out.append(PeerDown(self.peer, self.session, reason, refused))
        if not self._attempt and (self.caller or not refused):
            limits = self._shared.limits
            self._backoff = limits.backoff_min_ns if self.caller else limits.backoff_max_ns
            self._retry(now)

    def forget(self, now: Instant, code: int, reason: str) -> None:
        """The peer is no longer wanted: nothing is tried any more."""
        self.end(now, code, reason)
        if self._attempt:
            self._shared.out.append(Abandon(self._attempt))
            self._attempt = 0
        self._drop_greeting()
        self._attempt_at = self._retry_at = self.deadline = FOREVER

    # --- connecting ---------------------------------------------------------------------------------------------------

    def start(self, now: Instant) -> None:
        """The caller calls; the callee summons it later, in case it takes a dead connection for a living one."""
        if self.caller:
            self._dial(now)
        else:
            self._backoff = self._shared.limits.backoff_max_ns
            self._retry(now)

    def readdress(self, now: Instant, address: str, ticket: bytes) -> None:
        """The peer is to be found elsewhere or under another ticket; a living session is not touched."""
        if (address, ticket) == (self._address, self._ticket):
            return
        self._address = address
        self._ticket = ticket
        self._backoff = self._shared.limits.backoff_min_ns
        if self._attempt:
            self._shared.out.append(Abandon(self._attempt))
            self._attempt = 0
            self._attempt_at = FOREVER
            self._retry(now)

    def _dial(self, now: Instant) -> None:
        self._retry_at = FOREVER
        self._attempt = self._shared.next_attempt()
        self._attempt_at = now + self._shared.limits.handshake_ns
        self._wake(self._attempt_at)
        self._shared.out.append(Connect(self._attempt, self._address, self.peer.node))

    def _retry(self, now: Instant) -> None:
        """Try again after the back-off, which doubles up to a bound that is lower while a session hangs on it."""
        limits = self._shared.limits
        self._backoff = min(self._backoff, limits.reconnect_max_ns if self.alive else limits.backoff_max_ns)
        self._retry_at = now + self._backoff
        self._backoff *= 2
        self._wake(self._retry_at)

    def connected(self, now: Instant, attempt: int, connection: int, half: bytes) -> bool:
        """An attempt succeeded. False: nobody wanted it any more; the runner closes it."""
        if attempt != self._attempt:
            return False
        self._attempt = 0
        self._attempt_at = FOREVER
        self._greeting = connection
        self._greeting_at = now + self._shared.limits.handshake_ns
        self._half = half
        self._wake(self._greeting_at)
        if self.caller:
            self._seen_attempt = attempt
        peer = self.peer
        target = peer if self.alive or peer.serial else peer._replace(incarnation=0)
        resume = self.session if self.alive else 0
        hello = hello_from(self._shared.identity, target, self._seen_attempt, resume, self._received, half)
        self._shared.out.append(Write(connection, [wire.control(HELLO, 0, 0, hello)]))
        return True

    def connect_failed(self, now: Instant, attempt: int, refused: bool, reason: str) -> None:
        if attempt != self._attempt:
            return
        self._attempt = 0
        self._attempt_at = FOREVER
        if refused and self.alive:
            self._end(now, f"the reconnect was refused: {reason}", say=None, refused=True)
        elif self.caller or not refused:
            self._retry(now)  # a caller that is not there has no connection to be wrong about

    def broken(self, now: Instant, connection: int, reason: str) -> None:
        """The connection is gone; the session, if it carried one, lives on for session_timeout."""
        if connection == self._greeting:
            self._greeting = 0
            self._greeting_at = FOREVER
            self._retry(now)
        elif connection == self.connection:
            self.connection = 0
            self._ack_at = FOREVER
            self._lost_at = now + self._shared.limits.session_timeout_ns
            self._wake(self._lost_at)
            self._backoff = self._shared.limits.backoff_min_ns
            if not self._attempt and not self._greeting:
                self._dial(now)

    def _drop_greeting(self) -> None:
        if self._greeting:
            self._shared.out.append(Shut(self._greeting))
            self._greeting = 0
            self._greeting_at = FOREVER

    # --- the caller's half of the handshake -----------------------------------------------------------------------

    def answered(self, now: Instant, messages: list[bytes]) -> None:
        """First frames on the greeting connection; what follows a WELCOME is received at once."""
        connection = self._greeting
        try:
            first = frame.parse(messages[0])
            if first.kind not in (WELCOME, REFUSE):
                raise PeerError(f"frame kind {first.kind} instead of WELCOME or REFUSE")
            body = wire.body_of(first)
            if isinstance(body, Welcome):
                if not self.caller:
                    raise PeerError("WELCOME to a summons")
                session = self.session if self.alive else self._seen_attempt
                if first.session != session:
                    raise PeerError(f"WELCOME to session {first.session} in answer to {session}")
                known = self.peer if self.alive or self.peer.serial else self.peer._replace(incarnation=0)
                check_welcome(self._shared.identity, known, self._ticket, self._seen_attempt, session, body)
                if not self.alive and body.received:
                    raise PeerError("WELCOME to a new session that has received already")
        except PeerError as error:
            self._shared.counters.reject("wrong answer to a hello", self.peer.node, str(error))
            self._drop_greeting()
            self._retry(now)
            return
        if isinstance(body, Refuse):
            self._refused(now, body)
            return
        if body.me.incarnation < self.peer.incarnation:
            # The last words of a process whose successor we have met already.
            self._shared.counters.reject("answer of a stale incarnation", self.peer.node, f"{body.me.incarnation}")
            self._drop_greeting()
            self._retry(now)
            return
        assert isinstance(body, Welcome)
        self._greeting = 0
        self._greeting_at = FOREVER
        if self.alive and body.session == self.session:
            if not self._acked <= body.received <= self._sent:
                self._shared.out.append(Shut(connection))
                self._offend(now, f"WELCOME acknowledges {body.received} of {self._sent}")
                return
            self._take(now, connection, self._half, body.key_half)
            self._resume(body.received)
        else:
            self._learn(now, body.me)
            self.session = body.session
            self._take(now, connection, self._half, body.key_half)
            self._begin(now)
        if len(messages) > 1:
            self.receive(now, messages[1:])

    def _refused(self, now: Instant, body: Refuse) -> None:
        """REFUSE: is the session over, and is anybody of that name still there?"""
        text = wire.REFUSALS.get(body.code, f"code {body.code}")
        peer = self.peer
        self._shared.out.append(Shut(self._greeting))
        self._greeting = 0
        self._greeting_at = FOREVER
        summons_heard = body.code == wire.REFUSE_SIDE and not self.caller
        if not summons_heard and body.code not in (wire.REFUSE_WAIT, wire.REFUSE_SESSION, wire.REFUSE_TARGET):
            self._shared.counters.reject(f"hello refused: {text}", peer.node, printable(body.reason))
        same_place = (body.me.node, body.me.serial) == (peer.node, peer.serial)
        if body.code == wire.REFUSE_INCARNATION and same_place and not peer.serial:
            self._outdated(body.known)
        if same_place and not peer.serial and body.me.incarnation > peer.incarnation:
            self._learn(now, body.me)
        elif body.code == wire.REFUSE_TARGET and not same_place:
            # Another process of that node listens there now: whoever had the address does not any more.
            self._end(now, f"member {body.me} listens at the address of {peer}", say=None, refused=True)
        elif self.alive and not summons_heard:
            self._end(now, f"the peer does not know the session: {text}", say=None)
        if self._retry_at == FOREVER:
            self._retry(now)

    def _outdated(self, known: Incarnation) -> None:
        """A node of the cluster, by its certificate, has met a later incarnation of this node."""
        me = self._shared.identity.me
        if me.serial == 0 and me.incarnation < known <= wire.KNOWN_MAX:
            self._shared.out.append(Outdated(self.peer.node, known))

    def _learn(self, now: Instant, peer: MemberId) -> None:
        """The corrald of this node shows its incarnation, which may be a newer one (COMM-5: never an older)."""
        assert peer.incarnation >= self.peer.incarnation, "COMM-5"
        if peer != self.peer:
            self._end(now, f"the peer restarted as incarnation {peer.incarnation}", say=None)
            self.peer = peer
            if not self.caller:
                self._seen_attempt = 0  # a new process counts its attempts, and so its sessions, anew
                self.session = 0

    # --- the callee's half -----------------------------------------------------------------------------------------

    def judge(self, hello: Hello) -> int:
        """0, or the REFUSE code for a hello whose cluster, version and certificate are in order. Changes nothing."""
        known = self.peer
        if not hmac.compare_digest(hello.ticket, self._ticket):
            return wire.REFUSE_TICKET
        if hello.me.incarnation < known.incarnation:
            return wire.REFUSE_INCARNATION
        if self.caller:
            return wire.REFUSE_SIDE
        newer = hello.me.incarnation > known.incarnation
        if hello.attempt <= (0 if newer else self._seen_attempt):
            return wire.REFUSE_ATTEMPT
        if not hello.resume:
            return 0
        if newer or not self.alive or hello.resume != self.session:
            return wire.REFUSE_SESSION
        if not self._acked <= hello.received <= self._sent:
            return wire.REFUSE_PROTOCOL
        return 0

    def summoned(self, now: Instant, hello: Hello) -> None:
        """The callee misses us: it was refused with SIDE, and we call again unless we did already."""
        assert self.caller
        if hello.me.incarnation > self.peer.incarnation:
            self._learn(now, hello.me)
        elif self.connection and hello.attempt == self._seen_attempt:
            connection = self.connection
            self._shared.out.append(Shut(connection))
            self.broken(now, connection, "the peer lost it")
        if not (self.connection or self._attempt or self._greeting):
            self._dial(now)

    def accept(self, now: Instant, connection: int, hello: Hello, half: bytes) -> None:
        """A hello that `judge` found good: this connection carries the session from here on (COMM-6)."""
        assert not self.caller
        if hello.me != self.peer:
            self._learn(now, hello.me)
        self._seen_attempt = hello.attempt
        if hello.resume:
            if self.connection:
                self._shared.out.append(Shut(self.connection))
                self.connection = 0
        else:
            self._end(now, "the peer opened a new session", say=None)
            assert hello.attempt > self.session, "COMM-2"
            self.session = hello.attempt
        identity = self._shared.identity
        welcome = welcome_from(identity, hello.attempt, self.session, self._received, half)
        self._shared.out.append(Write(connection, [wire.control(WELCOME, self.session, self._received, welcome)]))
        self._take(now, connection, hello.key_half, half)
        if hello.resume:
            self._resume(hello.received)
        else:
            self._begin(now)

    # --- both halves --------------------------------------------------------------------------------------------------

    def _take(self, now: Instant, connection: int, caller_half: bytes, callee_half: bytes) -> None:
        """The handshake is done: the connection is the session's, and new keys seal its datagrams."""
        if self._attempt:
            self._shared.out.append(Abandon(self._attempt))
            self._attempt = 0
        self._drop_greeting()
        self.connection = connection
        self._attempt_at = self._retry_at = self._lost_at = FOREVER
        self._backoff = self._shared.limits.backoff_min_ns
        me = self._shared.identity.me
        key_id = self._seen_attempt
        self._sealer = Sealer(derive(caller_half, callee_half, self.caller), key_id, me.node, me.serial)
        opener = Opener(derive(caller_half, callee_half, not self.caller), key_id)
        self._openers = [opener, *self._openers[:1]]
        self._shared.counters.welcomed(self.peer.node)

    def _begin(self, now: Instant) -> None:
        assert not self.alive, "COMM-2"
        self.alive = True
        limits = self._shared.limits
        self._age_marks = (0, 0)
        self._age_at = now + limits.stall_ns // 2
        self._wake(self._age_at)
        self._shared.counters.sessions += 1
        self._shared.out.append(PeerUp(self.peer, self.session))

    def _resume(self, peer_received: int) -> None:
        """Send again what the peer does not have. Their acks are as old as they are, which harms nobody."""
        self._acknowledged(peer_received)
        self._received_acked = self._received  # the handshake told
        again = self._unacked[self._head :]
        self._shared.counters.resends += len(again)
        if again:
            self._shared.out.append(Write(self.connection, again))

    # --- time ---------------------------------------------------------------------------------------------------------

    def _wake(self, when: Instant) -> None:
        if when < self.deadline:
            self.deadline = when

    def tick(self, now: Instant) -> None:
        limits = self._shared.limits
        if now >= self._attempt_at:
            self._shared.out.append(Abandon(self._attempt))
            self._attempt = 0
            self._attempt_at = FOREVER
            self._retry(now)
        if now >= self._greeting_at:
            self._shared.counters.reject(
                "hello unanswered", self.peer.node, f"for {limits.handshake_ns // 1_000_000} ms"
            )
            self._drop_greeting()
            self._retry(now)
        if now >= self._lost_at:
            self._end(now, f"no connection for {limits.session_timeout_ns // 1_000_000} ms", say=None)
        if now >= self._ack_at:
            self._ack_at = FOREVER
            if self._received != self._received_acked and self.connection:
                self._send_ack()
        if now >= self._age_at:
            self._check_age(now)
        if now >= self._retry_at:
            self._retry_at = FOREVER
            if not (self._attempt or self._greeting or self.connection):
                self._dial(now)
        self.deadline = min(
            self._attempt_at, self._greeting_at, self._lost_at, self._ack_at, self._age_at, self._retry_at
        )

    def _check_age(self, now: Instant) -> None:
        """Twice per stall time: what was sent before the check before last must be acknowledged by now (COMM-4)."""
        before, last = self._age_marks
        if self._acked < before:
            self.end(now, wire.CLOSE_STALLED, f"{self.queued_frames} messages are not acknowledged in time")
            return
        self._age_marks = (last, self._sent)
        self._age_at = now + self._shared.limits.stall_ns // 2
