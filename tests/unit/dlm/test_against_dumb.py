"""A share of the stories that `make dlm-model` plays; and whether a wrong rule is found, and its story made small."""

import os
import time

import pytest
from tests.unit.dlm.against_dumb import check, difference, shrunk, story

import corral.dlm.resource as resource
from corral.dlm.modes import COMPATIBLE
from corral.dlm.resource import Resource

SECONDS = float(os.environ.get("CORRAL_DLM_SECONDS", "2"))


@pytest.mark.parametrize("members", [1, 3])
def test_random_stories_go_as_in_the_dumb_lockspace(members):
    first = seed = time.time_ns() & 0xFFFFFFFF
    until = time.monotonic() + SECONDS
    while time.monotonic() < until or seed < first + 50:
        check(seed, members)
        seed += 1


def test_a_seed_is_one_story():
    assert story(5) == story(5)


def forget_noorder(patch):
    fits = Resource._fits

    def planted(self, lock, now, unordered):
        flags, lock.flags = lock.flags, lock.flags & ~0x2000
        try:
            return fits(self, lock, now, unordered)
        finally:
            lock.flags = flags

    patch.setattr(Resource, "_fits", planted)


def tell_twice(patch):
    patch.setattr(resource, "_must_be_told", lambda holder, high, _cw: not COMPATIBLE[high][holder.granted])


def write_from_a_reader(patch):
    unlock = Resource._value_from_unlock

    def planted(self, lock, flags, effects):
        if flags and lock.granted >= 3:
            unlock(self, lock, flags)
        return original(self, lock, flags, effects)

    original = Resource.unlock
    patch.setattr(Resource, "unlock", planted)


def forget_ranges(patch):
    patch.setattr(resource, "overlap", lambda one, other: True)


def overtake_whoever_overlaps(patch):
    patch.setattr(Resource, "_is_behind", lambda self, lock, queue: not self.ranged)


def look_for_circles_of_two(patch):
    """As without ranges, where the order of the queue lets no longer one come about."""

    def planted(self, lock):
        self.ranged = False
        try:
            return Resource._closes_cycle(self, lock)
        finally:
            self.ranged = True

    patch.setattr(Resource, "_closes_circle", planted)


PLANTS = [forget_noorder, tell_twice, write_from_a_reader]
PLANTS += [forget_ranges, overtake_whoever_overlaps, look_for_circles_of_two]


@pytest.mark.interpreted
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_wrong_rule_is_found_and_the_story_of_it_is_short(plant, monkeypatch):
    plant(monkeypatch)
    failing = next(seed for seed in range(200) if difference(story(seed), 1))
    needed = shrunk(story(failing), 1)
    assert len(needed) <= 8, needed
    assert difference(needed, 1)
