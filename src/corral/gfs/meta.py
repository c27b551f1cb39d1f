"""A metadata block in memory: what the journal knows about each of them."""

from corral.gfs.format import seal
from corral.gfs.glock import Glock


class Meta:
    """Base of every journaled object. Subclasses give `kind` and `pack()`.

    `dirty`: in the running transaction. `freed`: its block was given back; no image of it is written any more.
    The object is authoritative; bytes are made when a commit takes its snapshot, once per commit.
    """

    __slots__ = ("dirty", "freed", "generation", "glock", "number")

    kind = 0

    def __init__(self, number: int, glock: Glock) -> None:
        self.number = number
        self.glock = glock
        self.generation = 0
        self.dirty = False
        self.freed = False

    def pack(self) -> bytearray:
        """The block without its header; may be the live buffer (it is copied by the seal)."""
        raise NotImplementedError

    def seal(self) -> bytes:
        self.generation += 1
        return seal(self.pack(), self.kind, self.number, self.generation)
