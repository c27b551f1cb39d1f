"""fsck's second set of bitmaps: what the tree claims, beside what the resource groups record."""

from bisect import bisect_right
from typing import Final, Protocol, final

from corral.gfs import format as fmt
from corral.gfs.device import Device
from corral.gfs.format import DINODE_STATE, FREE, STATE_NAMES, UNLINKED, USED, BlockDamaged
from corral.gfs.glock import RGRP, Glock
from corral.gfs.rgrp import Rgrp, count_state, get, set_range

NAMED_MAX: Final = 20  # differing blocks named one by one for each group


class Findings(Protocol):
    def found(self, code: str, block: int, message: str, *, repaired: bool = False) -> None: ...
    @property
    def repair(self) -> bool: ...


@final
class Bitmaps:
    """`claimed` begins all FREE; `claim` marks, and counts what was marked before."""

    def __init__(self, entries: list[tuple[int, int, int]]) -> None:
        self.rgrps = [
            Rgrp(address, data0, blocks, index, Glock(RGRP, address))
            for index, (address, data0, blocks) in enumerate(entries)
        ]
        self.starts = [rgrp.data0 for rgrp in self.rgrps]
        self.claimed: list[bytearray] = []
        self.damaged: set[int] = set()  # groups to be written whatever the comparison says
        self.blocks = sum(rgrp.blocks for rgrp in self.rgrps)
        for rgrp in self.rgrps:
            bits = bytearray(fmt.BITMAP_SIZE)
            set_range(bits, rgrp.blocks, fmt.RGRP_BLOCKS_MAX - rgrp.blocks, USED)
            self.claimed.append(bits)

    async def load(self, device: Device, findings: Findings) -> None:
        """A group whose header is damaged counts as all free until it is compared."""
        for rgrp in self.rgrps:
            block = await device.read(rgrp.number)
            try:
                rgrp.load(block)
            except BlockDamaged as error:
                findings.found("resource group", rgrp.number, str(error), repaired=findings.repair)
                self.damaged.add(rgrp.number)
                sound = fmt.verified(bytes(block)) and fmt.HEADER.unpack_from(block)[1] == fmt.RGRP
                if not rgrp.bits or not sound:
                    rgrp.make_empty()

    def _index(self, number: int) -> int:
        return bisect_right(self.starts, number) - 1

    def covers(self, number: int, count: int = 1) -> bool:
        index = self._index(number)
        if index < 0:
            return False
        rgrp = self.rgrps[index]
        return number + count <= rgrp.data0 + rgrp.blocks

    def claim(self, number: int, count: int, state: int) -> int:
        """How many of these blocks somebody had claimed before."""
        index = self._index(number)
        start = number - self.starts[index]
        bits = self.claimed[index]
        twice = (
            sum(1 for at in range(start, start + count) if get(bits, at) != FREE)
            if any(bits[start >> 2 : (start + count + 3) >> 2])
            else 0
        )
        set_range(bits, start, count, state)
        return twice

    def claim_nothing(self, number: int) -> None:
        index = self._index(number)
        set_range(self.claimed[index], number - self.starts[index], 1, FREE)

    def recorded(self, number: int) -> int:
        return self.rgrps[self._index(number)].state(number)

    def dinodes(self) -> list[int]:
        """Blocks recorded as dinodes, named or not."""
        out: list[int] = []
        for rgrp in self.rgrps:
            if rgrp.dinodes or rgrp.unlinked:
                out.extend(rgrp.numbers_in(DINODE_STATE, UNLINKED))
        return out

    def total(self, state: int) -> int:
        return sum(count_state(bits, state) for bits in self.claimed)

    async def compare(self, device: Device, findings: Findings, repair: bool) -> None:
        for rgrp, claimed in zip(self.rgrps, self.claimed, strict=True):
            if rgrp.bits != claimed:
                differing = [at for at in range(rgrp.blocks) if get(rgrp.bits, at) != get(claimed, at)]
                for at in differing[:NAMED_MAX]:
                    findings.found(
                        "bitmap",
                        rgrp.data0 + at,
                        f"is recorded as {STATE_NAMES[get(rgrp.bits, at)]}, is {STATE_NAMES[get(claimed, at)]}",
                        repaired=repair,
                    )
                if len(differing) > NAMED_MAX:
                    findings.found(
                        "bitmap", rgrp.number, f"and {len(differing) - NAMED_MAX} more in this group", repaired=repair
                    )
            if repair:
                await self._rewrite(device, rgrp, claimed)

    async def _rewrite(self, device: Device, rgrp: Rgrp, claimed: bytearray) -> None:
        counts = tuple(count_state(claimed, state) for state in (FREE, DINODE_STATE, UNLINKED))
        recorded = (rgrp.free, rgrp.dinodes, rgrp.unlinked)
        if rgrp.number not in self.damaged and rgrp.bits == claimed and counts == recorded:
            return
        rgrp.bits = claimed
        rgrp.free, rgrp.dinodes, rgrp.unlinked = counts
        await device.write(rgrp.number, [rgrp.seal()])
