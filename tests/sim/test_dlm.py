"""Lockspaces under faults: fresh seeds for a few seconds, and for each checker the bug it exists for.

CORRAL_SEED=n runs one seed; a failing one prints its story. `tests.sim.dlm_cluster.run(seed)` is what campaigns call.
"""

import os
import time

import pytest

import corral.dlm.recovery as recovery
from corral.dlm.engine import LockspaceEngine
from corral.dlm.resource import Resource
from corral.dlm.space import Space
from tests.sim.dlm_cluster import run

SECONDS = float(os.environ.get("CORRAL_SIM_SECONDS", "4"))
PLANT_SEEDS = 150  # the rarest shows in one of thirty


def test_fresh_seeds():
    if "CORRAL_SEED" in os.environ:
        run(int(os.environ["CORRAL_SEED"]))
        return
    first = seed = time.time_ns() & 0xFFFFFFFF
    total = dict.fromkeys(
        ("granted", "increments", "invalid", "abandoned", "adopted", "purges", "queries", "spoiled"), 0
    )
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline or seed < first + 10:
        summary = run(seed)
        for key in total:
            total[key] += summary[key]
        seed += 1
    assert all(total.values()), f"these runs tested too little: {total}"


def test_a_seed_is_one_run():
    assert run(11) == run(11)


# --- the checkers, checked -------------------------------------------------------------------------------------------


def overtake_conversions(patch):
    """The grant rules forget that a converting lock still holds its old mode."""
    fits = Resource._fits

    def planted(self, lock, now, unordered):
        converting, self.converting = self.converting, [lock] if lock in self.converting else []
        try:
            return fits(self, lock, now, unordered)
        finally:
            self.converting = converting

    patch.setattr(Resource, "_fits", planted)


def believe_old_modes(patch):
    """Recovery reports the mode held before a conversion that the lost master may have done."""
    patch.setattr(recovery, "least", lambda granted, asked, flags: granted)
    patch.setattr(recovery, "_lower", lambda lock: None)


def forget_the_floor(patch):
    """A new mastery starts its tokens from zero."""

    def planted(self, resource, floor):
        resource.master = self.me
        resource.complete = resource.confirmed = True

    patch.setattr(Space, "become_master", planted)
    start = LockspaceEngine._finish

    def finish(self, now, round_id):
        self.space.base_token = 0
        start(self, now, round_id)

    patch.setattr(LockspaceEngine, "_finish", finish)


def trust_any_value(patch):
    """A new master takes the value of any lock for the resource's."""

    def planted(resource, space):
        for lock in (*resource.granted, *resource.converting):
            if lock.value is not None:
                resource.value = lock.value
                resource.value_sequence = lock.value_sequence

    patch.setattr(recovery, "_recover_value", planted)


def grant_without_lease(patch):
    """Completions leave although the lease has lapsed."""
    patch.setattr(LockspaceEngine, "_give", lambda self, now, event: self._emit.append(event))


def ask_only_once(patch):
    """What a master did not answer is not asked again in the next round."""
    finish = LockspaceEngine._finish

    def planted(self, now, round_id):
        for lock in self.space.locks.in_order():
            if lock.sent:
                lock.pending, kept = 0, lock.pending
                lock.answer = -kept
        finish(self, now, round_id)
        for lock in self.space.locks.in_order():
            if lock.answer < 0 and lock.sent and not lock.pending:
                lock.pending = -lock.answer

    patch.setattr(LockspaceEngine, "_finish", planted)


def keep_the_dead(patch):
    """Locks of departed members are not purged."""
    patch.setattr(recovery, "purge", lambda space, now, peer: [])


def trust_unfinished_masters(patch):
    """A master chosen in a round that was abandoned is believed in the next one."""
    mastered = recovery.Recovery._mastered

    def planted(self, name, master):
        mastered(self, name, master)
        self._space.resources.get(name).confirmed = True

    patch.setattr(recovery.Recovery, "_mastered", planted)


def forget_adopted_locks(patch):
    """What a master says of an adopted lock does not find it."""

    def planted(self, lock_id):
        lock = self.locks.get(lock_id)
        return lock if lock is not None and lock.id == lock_id else None

    patch.setattr(Space, "find", planted)


def unlock_orphans(patch):
    """A client's death takes its persistent locks along."""
    patch.setattr(LockspaceEngine, "_orphan", lambda self, lock: self._end(0, lock, 0, None, 0))


def purge_only_once(patch):
    """A purge that a round interrupts is not asked again."""
    patch.setattr(LockspaceEngine, "_purges_again", lambda self: None)


def query_only_once(patch):
    """A query that a round interrupts is not asked again."""
    patch.setattr(LockspaceEngine, "_queries_again", lambda self: None)


def believe_the_spoiled(patch):
    """A new master takes the newest block for valid though nobody who holds it kept writers out."""
    recover = recovery._recover_value

    def planted(resource, space):
        recover(resource, space)
        resource.value_valid = True

    patch.setattr(recovery, "_recover_value", planted)


PLANTS = {
    overtake_conversions: ("DLM-1",),
    believe_old_modes: ("DLM-1", "DLM-4", "DLM-5"),
    forget_the_floor: ("DLM-2",),
    trust_any_value: ("DLM-4",),
    grant_without_lease: ("DLM-6",),
    ask_only_once: ("DLM-3", "DLM-7"),
    keep_the_dead: ("DLM-3", "DLM-7"),
    forget_adopted_locks: ("DLM-1", "DLM-3", "DLM-7", "DLM-8"),
    unlock_orphans: ("DLM-8",),
    purge_only_once: ("DLM-7", "DLM-8"),
    query_only_once: ("DLM-7",),
    believe_the_spoiled: ("DLM-4",),
    trust_unfinished_masters: ("DLM-1", "DLM-3", "DLM-4", "DLM-5", "DLM-7"),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_the_checkers_catch_what_they_exist_for(plant, monkeypatch):
    plant(monkeypatch)
    for seed in range(PLANT_SEEDS):
        caught = violation_of(seed)
        if caught:
            assert caught.startswith(PLANTS[plant])
            return
    pytest.fail(f"{plant.__doc__} Nobody noticed in {PLANT_SEEDS} seeds.")


def violation_of(seed):
    try:
        run(seed)
    except AssertionError as violation:
        return str(violation)
    return ""
