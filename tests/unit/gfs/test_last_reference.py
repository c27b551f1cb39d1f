"""The moments between an inode's end and the commit that says so."""

import errno

import pytest
from tests.unit.gfs.mounted import ME, O_RDONLY, Mounted

from corral.gfs.glock import EX
from corral.gfs.inode import Inode


def test_a_freed_dinode_is_no_file_before_its_commit_is_durable_either() -> None:
    m = Mounted()
    number = m.touch("file")
    m.fs.forget(number, 1)
    m.run(m.fs.sync())
    formal = m.fs.inodes[number].formal
    # Somebody else here waits with an object of its own: the table forgot the first one meanwhile.
    late = Inode(number, m.fs.inodes[number].glock, formal)
    m.run(m.fs.unlink(1, b"file", ME))
    m.world.settle()
    assert m.fs.counts["reclaimed"] == 1
    m.fs.inodes.pop(number, None)
    with pytest.raises(OSError, match="stale") as caught:
        m.run(m.fs.hold(late, EX))
    assert caught.value.errno == errno.ESTALE
    m.unmount_clean()


def test_the_lock_of_a_freed_inode_leaves_only_after_the_commit_that_freed_it() -> None:
    # Else the next holder finds the dinode as it was, and frees what is free already.
    m = Mounted()
    m.touch("file")
    number = m.ino("file")
    opened = m.run(m.fs.open(number, O_RDONLY, ME))
    m.run(m.fs.unlink(1, b"file", ME))
    m.run(m.fs.sync())
    m.run(m.fs.journal.checkpoint())
    m.run(m.fs.journal.checkpoint())
    glock = m.fs.inodes[number].glock
    assert not glock.logged
    m.run(m.fs.release(number, opened.handle, None))
    assert m.fs.journal.ended == {number}
    m.run(m.fs.journal.handover(glock))
    assert m.fs.journal.ended == set()
    m.unmount_clean()
