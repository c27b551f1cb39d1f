"""Message bodies: msgspec MessagePack arrays with an integer tag first (docs/format/wire.md).

Each engine's `wire.py` declares its messages as `Struct(frozen=True, array_like=True, gc=False, tag=N)` and builds one
`Codec` of them. Tags are append-only; fields are only ever appended, with a default.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Generic, TypeVar, Union

import msgspec

from corral.base.errors import PeerError

M = TypeVar("M")

MESSAGE_MAX: Final = 4 << 20  # bytes; a longer body is a peer's mistake


class Codec(Generic[M]):
    """Encodes and decodes one closed family of messages. Decoding checks types and sizes and raises PeerError."""

    def __init__(self, types: Sequence[type[Any]]) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Union[tuple(types)])  # noqa: UP007
        self.types: Final = tuple(types)

    def encode(self, message: M) -> bytes:
        return self._encoder.encode(message)

    def decode(self, payload: bytes | bytearray | memoryview) -> M:
        if len(payload) > MESSAGE_MAX:
            raise PeerError(f"message of {len(payload)} bytes exceeds {MESSAGE_MAX}")
        try:
            message: M = self._decoder.decode(payload)
        except (ValueError, RecursionError, OverflowError) as error:
            # DecodeError and ValidationError are ValueErrors, and so is text that is not UTF-8.
            raise PeerError(f"undecodable message: {error}") from None
        return message


BATCH_MAX: Final = 64  # messages in one payload
BATCH_BYTES: Final = 64 << 10  # of several messages; longer ones travel alone


class Batches(Generic[M]):
    """Several messages of one family in a payload: a MessagePack array of them, in order. What is decided together
    leaves together, for the price of one."""

    def __init__(self, types: Sequence[type[Any]]) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        message: Any = Union[tuple(types)]  # noqa: UP007
        batch: Any = Annotated[list[message], msgspec.Meta(min_length=1, max_length=BATCH_MAX)]
        self._codec: Codec[list[M]] = Codec((batch,))

    def encode(self, messages: Sequence[M]) -> list[bytes]:
        """As few payloads as hold them."""
        if len(messages) > BATCH_MAX:
            starts = range(0, len(messages), BATCH_MAX)
            return [payload for start in starts for payload in self.encode(messages[start : start + BATCH_MAX])]
        payload = self._encoder.encode(messages)
        if len(payload) > BATCH_BYTES and len(messages) > 1:
            return [self._encoder.encode((message,)) for message in messages]
        return [payload]

    def decode(self, payload: bytes | bytearray | memoryview) -> list[M]:
        """All of them or, with one that is wrong, PeerError."""
        return self._codec.decode(payload)
