"""Random values of declared types, with a taste for edges, and bytes that are nearly right."""

from collections.abc import Callable, Mapping
from random import Random
from typing import Any, Final

import msgspec
from msgspec import inspect

INTERESTING: Final = (
    0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 31, 63, 64, 127, 128, 255, 256, 4095, 4096, 65535, 65536, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 32, 1 << 53, 1 << 60, (1 << 63) - 1, (1 << 64) - 1, -1, -2, -128, -(1 << 31), -(1 << 63),
)  # fmt: skip
TEXTS: Final = ("", "a", "fence", "dlm:home", "power", "\0", "../../etc/passwd", "é" * 20, "x" * 64, "x" * 300, "\n")
BLOBS: Final = (b"", b"\0", b"a", b"lock", b"x" * 32, b"\xff" * 8, b"y" * 64, b"z" * 65, bytes(300))

Maker = Callable[[Random], Any]


class Values:
    """Makes values of a type. `known` gives makers for types whose values should mostly mean something."""

    def __init__(self, known: Mapping[type, Maker] | None = None, *, sane: float = 0.85) -> None:
        self._known = dict(known or {})
        self._sane = sane
        self._info: dict[Any, inspect.Type] = {}

    def of(self, kind: Any, random: Random) -> Any:
        if kind not in self._info:
            self._info[kind] = inspect.type_info(kind)
        return self._make(self._info[kind], random, 0)

    def _make(self, info: inspect.Type, random: Random, depth: int) -> Any:
        cls = getattr(info, "cls", None)
        if cls in self._known and random.random() < self._sane:
            return self._known[cls](random)
        if isinstance(info, inspect.StructType | inspect.NamedTupleType | inspect.DataclassType):
            return info.cls(*(self._make(field.type, random, depth + 1) for field in info.fields))
        if isinstance(info, inspect.IntType):
            return self._known[int](random) if int in self._known and random.random() < self._sane else integer(random)
        if isinstance(info, inspect.StrType):
            return self._known[str](random) if str in self._known and random.random() < self._sane else text(random)
        if isinstance(info, inspect.BytesType):
            return self._known[bytes](random) if bytes in self._known and random.random() < self._sane else blob(random)
        if isinstance(info, inspect.BoolType):
            return random.random() < 0.5
        if isinstance(info, inspect.FloatType):
            return random.choice((0.0, -1.0, 1e300, float("inf"), float("nan"), random.random()))
        if isinstance(info, inspect.UnionType):
            return self._make(random.choice(info.types), random, depth)
        if isinstance(info, inspect.VarTupleType | inspect.ListType | inspect.SetType | inspect.FrozenSetType):
            count = random.choice((0, 1, 1, 2, 3, 4, 20 if depth < 3 else 2))
            return [self._make(info.item_type, random, depth + 1) for _ in range(count)]
        if isinstance(info, inspect.TupleType):
            return tuple(self._make(item, random, depth + 1) for item in info.item_types)
        if isinstance(info, inspect.DictType):
            pairs = range(random.randint(0, 3))
            return {
                self._make(info.key_type, random, depth + 1): self._make(info.value_type, random, depth + 1)
                for _ in pairs
            }
        if isinstance(info, inspect.CustomType):
            return self._make(inspect.type_info(info.cls), random, depth + 1)
        if isinstance(info, inspect.Metadata):
            return self._make(info.type, random, depth)
        return None


def integer(random: Random) -> int:
    if random.random() < 0.6:
        return random.choice(INTERESTING[:12])
    if random.random() < 0.7:
        return random.choice(INTERESTING)
    return random.getrandbits(random.randint(1, 64))


def text(random: Random) -> str:
    return random.choice(TEXTS)


def blob(random: Random) -> bytes:
    return random.choice(BLOBS)


def encode(value: Any) -> bytes | None:
    """MessagePack of it, whatever it is; None when even that cannot be written (an integer too large)."""
    try:
        return msgspec.msgpack.encode(value)
    except (OverflowError, msgspec.MsgspecError, TypeError):
        return None


# --- damage ----------------------------------------------------------------------------------------------------------


def damage(data: bytes, random: Random) -> bytes:
    """One to four wounds."""
    wounded = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        random.choice(WOUNDS)(wounded, random)
    return bytes(wounded[: 1 << 20])


def _flip(data: bytearray, random: Random) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _set(data: bytearray, random: Random) -> None:
    if data:
        data[random.randrange(len(data))] = random.choice(
            (0, 1, 0x7F, 0x80, 0xFF, 0xC1, 0xDD, 0xDF, ord("<"), ord("&"))
        )


def _cut(data: bytearray, random: Random) -> None:
    if data:
        del data[random.randrange(len(data)) :]


def _remove(data: bytearray, random: Random) -> None:
    if data:
        start = random.randrange(len(data))
        del data[start : start + random.choice((1, 2, 4, 8, 64))]


def _repeat(data: bytearray, random: Random) -> None:
    if data:
        start = random.randrange(len(data))
        piece = data[start : start + random.choice((1, 4, 16, 256))]
        data[start:start] = piece * random.choice((1, 2, 100))


def _number(data: bytearray, random: Random) -> None:
    width = random.choice((1, 2, 4, 8))
    if len(data) >= width:
        start = random.randrange(len(data) - width + 1)
        number = random.choice(INTERESTING) & ((1 << 8 * width) - 1)
        data[start : start + width] = number.to_bytes(width, random.choice(("little", "big")))


def _insert(data: bytearray, random: Random) -> None:
    start = random.randint(0, len(data))
    data[start:start] = random.randbytes(random.choice((1, 3, 17)))


def _nest(data: bytearray, random: Random) -> None:
    """Arrays within arrays within arrays."""
    start = random.randint(0, len(data))
    data[start:start] = b"\x91" * random.choice((10, 1000, 100_000))


WOUNDS: Final = (_flip, _flip, _set, _cut, _remove, _repeat, _number, _insert, _nest)
