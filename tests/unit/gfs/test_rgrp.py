"""The bitmap allocator against a list of states, the dumb way."""

from random import Random

import pytest

from corral.gfs import format as fmt
from corral.gfs.format import BlockDamaged
from corral.gfs.glock import RGRP, Glock
from corral.gfs.rgrp import Rgrp, count_state, first_free, free_run, get, set_range


def fresh(blocks: int = 512) -> Rgrp:
    rgrp = Rgrp(100, 101, blocks, 0, Glock(RGRP, 100))
    rgrp.make_empty()
    return rgrp


def reloaded(rgrp: Rgrp) -> Rgrp:
    again = Rgrp(rgrp.number, rgrp.data0, rgrp.blocks, rgrp.index, Glock(RGRP, rgrp.number))
    again.load(bytearray(rgrp.seal()))
    return again


def test_ranges_against_a_list() -> None:
    rng = Random(1)
    bits, dumb = bytearray(64), [0] * 256
    for _ in range(2000):
        start = rng.randrange(256)
        count = rng.randrange(0, min(40, 256 - start) + 1)
        state = rng.randrange(4)
        set_range(bits, start, count, state)
        dumb[start : start + count] = [state] * count
        assert [get(bits, index) for index in range(256)] == dumb
        assert [count_state(bits, state) for state in range(4)] == [dumb.count(state) for state in range(4)]
        begin, end = sorted((rng.randrange(257), rng.randrange(257)))
        expected = next((index for index in range(begin, end) if dumb[index] == 0), -1)
        assert first_free(bits, begin, end) == expected
        if expected >= 0:
            limit = rng.randrange(1, 257 - expected)
            run = next((n for n in range(limit) if dumb[expected + n]), limit)
            assert free_run(bits, expected, limit) == run


def test_random_use_keeps_the_counts_and_never_gives_a_block_twice() -> None:
    rng = Random(2)
    rgrp = fresh()
    held: dict[int, int] = {}  # start -> count
    dinodes: set[int] = set()
    freed: list[tuple[int, int]] = []
    for _ in range(3000):
        step = rng.randrange(6)
        if step == 0:
            number, count = rgrp.allocate(rng.randrange(1, 40), rng.choice([0, 101 + rng.randrange(512)]))
            taken = {block for start, length in held.items() for block in range(start, start + length)}
            waiting = {block for start, length in freed for block in range(start, start + length)}
            assert not (taken | dinodes | waiting) & set(range(number, number + count))
            if count:
                held[number] = count
        elif step == 1:
            number = rgrp.allocate_dinode(rng.choice([0, *sorted(dinodes)]))
            assert number not in dinodes
            if number:
                dinodes.add(number)
        elif step == 2 and held:
            number = rng.choice(sorted(held))
            rgrp.release(number, held[number])
            freed.append((number, held.pop(number)))
        elif step == 3 and dinodes:
            number = rng.choice(sorted(dinodes))
            dinodes.discard(number)
            rgrp.unlink_dinode(number)
            assert rgrp.unlinked_numbers() == [number]
            rgrp.free_dinode(number)
            freed.append((number, 1))
        elif step == 4 and freed:
            rgrp.reopen(*freed.pop(rng.randrange(len(freed))))
        used = sum(held.values())
        assert (rgrp.free, rgrp.dinodes, rgrp.unlinked) == (512 - used - len(dinodes), len(dinodes), 0)
        assert rgrp.available == rgrp.free - sum(count for _, count in freed)
    assert reloaded(rgrp).bits == rgrp.bits


def test_every_block_can_be_given_out() -> None:
    rgrp = fresh()
    rgrp.allocate_dinode(0)  # opens a cluster that data may use only at the end
    got = 0
    while True:
        _, count = rgrp.allocate(7, 0)
        if not count:
            break
        got += count
    assert got == 511
    assert rgrp.available == 0


def test_dinodes_of_one_goal_are_neighbours() -> None:
    rgrp = fresh()
    first = rgrp.allocate_dinode(0)
    numbers = [rgrp.allocate_dinode(first) for _ in range(63)]
    assert sorted([first, *numbers]) == list(range(first, first + 64))


def test_a_freed_block_waits_for_its_commit() -> None:
    rgrp = fresh(256)
    number, count = rgrp.allocate(256, 0)
    assert count == 256
    rgrp.release(number, 10)
    assert rgrp.allocate(1, number) == (0, 0)
    rgrp.reopen(number, 10)
    assert rgrp.allocate(99, number) == (number, 10)


def test_a_wrong_count_is_noticed() -> None:
    rgrp = fresh()
    rgrp.free -= 1
    with pytest.raises(BlockDamaged, match="counts"):
        reloaded(rgrp)


def test_bits_beyond_the_end_are_used() -> None:
    rgrp = fresh(500)
    assert count_state(rgrp.bits, fmt.USED) == fmt.RGRP_BLOCKS_MAX - 500


def test_a_full_size_group_has_no_tail_to_fill() -> None:
    bits = bytearray(4)
    set_range(bits, 16, 0, 1)
    assert bits == bytearray(4)
