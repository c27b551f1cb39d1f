"""The moments between an inode's end and the commit that says so."""

import errno

import pytest
from tests.unit.gfs.mounted import ME, Mounted

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
