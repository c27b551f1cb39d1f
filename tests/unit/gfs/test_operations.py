"""What POSIX says, one mount, every call through `api.gfs.Filesystem`; fsck finds nothing afterwards."""

import errno
from collections.abc import Iterator

import pytest
from tests.unit.gfs.mounted import ME, O_RDONLY, Mounted

from corral.api.gfs import Changes, LockRange

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


@pytest.fixture
def m() -> Iterator[Mounted]:
    mounted = Mounted()
    yield mounted
    mounted.unmount_clean()


def fails(code: int) -> "pytest.RaisesExc[OSError]":
    return pytest.raises(OSError, check=lambda error: error.errno == code)


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_come_and_go(m: Mounted) -> None:
    m.mkdir("d")
    m.touch("d/a")
    m.symlink("somewhere/else", "d/s")
    with fails(errno.EEXIST):
        m.touch("d/a")
    with fails(errno.ENOENT):
        m.ino("d/b")
    with fails(errno.ENOTDIR):
        m.touch("d/a/x")
    with fails(errno.ENOTEMPTY):
        m.rmdir("d")
    with fails(errno.ENOTDIR):
        m.rmdir("d/a")
    with fails(errno.EISDIR):
        m.rm("d")
    assert m.run(m.fs.readlink(m.ino("d/s"))) == b"somewhere/else"
    assert sorted(m.ls("d")) == ["a", "s"]
    m.rm("d/a")
    m.rm("d/s")
    m.rmdir("d")
    assert m.ls("/") == []


def test_a_name_may_have_255_bytes_and_any_but_two(m: Mounted) -> None:
    m.touch("n" * 255)
    with fails(errno.ENAMETOOLONG):
        m.touch("n" * 256)
    for name in (b"", b".", b"..", b"a/b", b"a\0b"):
        with fails(errno.EINVAL):
            m.run(m.fs.mknod(1, name, 0o100644, 0, ME))
    m.run(m.fs.mknod(1, bytes(range(1, 47)), 0o100644, 0, ME))
    m.run(m.fs.mknod(1, bytes(range(48, 256)), 0o100644, 0, ME))


def test_links_count(m: Mounted) -> None:
    m.write("a", b"same")
    m.link("a", "b")
    assert m.stat("a").nlink == 2
    m.rm("a")
    assert m.stat("b").nlink == 1
    assert m.read("b") == b"same"
    root = m.stat("/").nlink
    m.mkdir("d")
    assert m.stat("/").nlink == root + 1
    with fails(errno.EPERM):
        m.link("d", "e")
    m.rmdir("d")
    assert m.stat("/").nlink == root


def test_ownership_and_setgid_directories(m: Mounted) -> None:
    m.mkdir("d")
    m.run(m.fs.setattr(m.ino("d"), Changes(mode=0o2775, gid=77), None, ME))
    m.touch("d/f")
    m.mkdir("d/sub")
    assert (m.stat("d/f").uid, m.stat("d/f").gid) == (1000, 77)
    assert m.stat("d/sub").gid == 77
    assert m.stat("d/sub").mode & 0o2000


def test_rename_in_all_its_forms(m: Mounted) -> None:
    m.mkdir("d")
    m.mkdir("e")
    m.write("d/a", b"A")
    m.write("e/b", b"B")
    with fails(errno.EEXIST):
        m.mv("d/a", "e/b", RENAME_NOREPLACE)
    m.mv("d/a", "e/b", RENAME_EXCHANGE)
    assert (m.read("d/a"), m.read("e/b")) == (b"B", b"A")
    m.mv("d/a", "e/b")
    assert (m.ls("d"), m.read("e/b")) == ([], b"B")
    m.mv("e/b", "e/c")
    assert m.ls("e") == ["c"]
    with fails(errno.ENOENT):
        m.mv("e/b", "e/x", RENAME_EXCHANGE)
    with fails(errno.EINVAL):
        m.mv("e/c", "e/x", 4)


def test_rename_of_directories_keeps_a_tree(m: Mounted) -> None:
    for path in ("a", "a/b", "a/b/c", "x"):
        m.mkdir(path)
    m.touch("f")
    with fails(errno.EINVAL):
        m.mv("a", "a/b/c/a")
    with fails(errno.EINVAL):
        m.mv("a", "a/b")
    with fails(errno.ENOTEMPTY):
        m.mv("a/b/c", "a")
    with fails(errno.EISDIR):
        m.mv("f", "x")
    with fails(errno.ENOTDIR):
        m.mv("x", "f")
    links = (m.stat("a").nlink, m.stat("x").nlink)
    m.mv("a/b", "x/b")
    assert (m.stat("a").nlink, m.stat("x").nlink) == (links[0] - 1, links[1] + 1)
    m.mv("x/b", "a")  # over an empty directory
    assert m.ls("a") == ["c"]
    m.mkdir("y")
    m.mv("a/c", "y", RENAME_EXCHANGE)
    assert m.ls("a") == ["c"]


def test_two_names_of_one_file_rename_to_nothing(m: Mounted) -> None:
    m.touch("a")
    m.link("a", "b")
    m.mv("a", "b")
    assert sorted(m.ls("/")) == ["a", "b"]


def test_a_big_directory_grows_leaves_and_shrinks(m: Mounted) -> None:
    m.mkdir("d")
    names = [f"file-number-{number:05}" for number in range(1500)]
    for name in names:
        m.touch(f"d/{name}")
    assert m.stat("d").size > 3840
    assert sorted(m.ls("d")) == names
    entries = m.run(m.fs.readdir(m.ino("d"), 0, 0, 1 << 20, plus=True))
    assert len(entries) == 1502
    assert all(entry.entry is not None for entry in entries[2:])
    for name in names[::2]:
        m.rm(f"d/{name}")
    m.remount()
    assert sorted(m.ls("d")) == names[1::2]
    for name in names[1::2]:
        m.rm(f"d/{name}")
    m.rmdir("d")


def test_readdir_goes_on_after_any_cookie_while_names_change(m: Mounted) -> None:
    for number in range(300):
        m.touch(f"f{number}")
    seen: list[str] = []
    offset, turn = 0, 0
    while entries := m.run(m.fs.readdir(1, 0, offset, 400, plus=False)):
        seen.extend(entry.name.decode() for entry in entries if entry.name.startswith(b"f"))
        offset = entries[-1].cookie
        m.touch(f"new{turn}")
        turn += 1
    assert sorted(seen) == sorted(f"f{number}" for number in range(300))


# --- content ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 3839, 3840, 3841, 4096, 4097, 262_144, 1_000_003])
def test_bytes_come_back(m: Mounted, size: int) -> None:
    data = bytes(number * 7 % 251 for number in range(size))
    m.touch("f")
    m.write("f", data)
    assert m.read("f") == data
    m.remount()
    assert m.read("f") == data
    assert m.stat("f").size == size


def test_overwrites_holes_and_odd_edges_against_a_bytearray(m: Mounted) -> None:
    from random import Random

    rng = Random(3)
    model = bytearray()
    m.touch("f")
    for step in range(300):
        if rng.random() < 0.2:
            size = rng.choice([0, 100, 3840, 4096, 10_000, 300_000, rng.randrange(400_000)])
            m.truncate("f", size)
            del model[size:]
            model.extend(bytes(size - len(model)))
        else:
            offset = rng.choice([0, len(model), rng.randrange(400_000)])
            data = rng.randbytes(rng.choice([1, 10, 4096, 9000, 70_000]))
            m.write("f", data, offset)
            model.extend(bytes(max(0, offset - len(model))))
            model[offset : offset + len(data)] = data
        if rng.random() < 0.1:
            m.sync()
        if rng.random() < 0.05:
            m.remount()
        if step % 10 == 0:
            assert m.read("f") == bytes(model)
    assert m.read("f") == bytes(model)


def test_sparse_files_take_no_blocks_and_say_where_data_is(m: Mounted) -> None:
    m.write("f", b"x" * 4096, 1 << 30)
    assert m.stat("f").size == (1 << 30) + 4096
    assert m.stat("f").blocks == 16
    ino, handle = m.open("f")
    assert m.get(handle, 0, 10_000) == bytes(10_000)
    assert m.run(m.fs.seek(ino, handle, 0, 3)) == 1 << 30
    assert m.run(m.fs.seek(ino, handle, 1 << 30, 4)) == (1 << 30) + 4096
    assert m.run(m.fs.seek(ino, handle, 0, 4)) == 0
    with fails(errno.ENXIO):
        m.run(m.fs.seek(ino, handle, 1 << 31, 3))
    m.close(handle)


def test_a_fragmented_file_grows_and_loses_an_extent_tree(m: Mounted) -> None:
    m.touch("f")
    _, handle = m.open("f")
    for number in range(900):
        m.put(handle, number * 8192, b"%d" % number)
    m.close(handle)
    m.remount()
    _, handle = m.open("f")
    assert all(m.get(handle, number * 8192, 3).rstrip(b"\0") == b"%d" % number for number in range(900))
    m.close(handle)
    m.truncate("f", 500 * 8192)
    m.sync()
    assert m.check is not None
    m.truncate("f", 0)
    assert m.stat("f").blocks == 8


def test_append_ignores_the_offset(m: Mounted) -> None:
    m.touch("log")
    _, handle = m.open("log")
    for number in range(2000):
        m.put(handle, 0, b"%06d\n" % number, append=True)
    m.close(handle)
    assert m.read("log") == b"".join(b"%06d\n" % number for number in range(2000))


def test_an_open_file_outlives_its_last_name(m: Mounted) -> None:
    free = m.run(m.fs.statfs()).blocks_free
    m.write("f", b"z" * 100_000)
    _, handle = m.open("f")
    m.rm("f")
    assert m.get(handle, 99_990) == b"z" * 10
    m.put(handle, 0, b"still")
    assert m.get(handle, 0, 5) == b"still"
    m.close(handle)
    m.sync()
    assert m.run(m.fs.statfs()).blocks_free == free


def test_a_crash_with_an_unlinked_open_file_gives_its_blocks_back(m: Mounted) -> None:
    m.sync()
    free = m.run(m.fs.statfs()).blocks_free
    m.write("f", b"z" * 100_000)
    m.open("f")
    m.rm("f")
    m.sync()
    m.crash()
    m.sync()
    assert m.run(m.fs.statfs()).blocks_free == free


def test_a_stale_node_id_is_refused(m: Mounted) -> None:
    ino = m.touch("f")
    m.rm("f")
    with fails(errno.ESTALE):
        m.run(m.fs.getattr(ino, None))
    with fails(errno.ESTALE):
        m.run(m.fs.open(ino, O_RDONLY, ME))


def test_fallocate_takes_the_blocks_now(m: Mounted) -> None:
    m.touch("f")
    ino, handle = m.open("f")
    m.run(m.fs.fallocate(ino, handle, 0, 1 << 20, 0))
    assert m.stat("f").size == 1 << 20
    assert m.stat("f").blocks >= 2048
    m.run(m.fs.fallocate(ino, handle, 1 << 20, 1 << 20, 1))
    assert m.stat("f").size == 1 << 20
    with fails(errno.EOPNOTSUPP):
        m.run(m.fs.fallocate(ino, handle, 0, 4096, 2))
    assert m.get(handle) == bytes(1 << 20)
    m.close(handle)


def test_suid_is_cleared_by_a_strangers_write(m: Mounted) -> None:
    m.touch("f")
    m.run(m.fs.setattr(m.ino("f"), Changes(mode=0o6755), None, ME))
    _, handle = m.open("f")
    m.run(m.fs.write(0, handle, 0, b"x", append=False, from_cache=False, kill_suidgid=True))
    assert m.stat("f").mode & 0o6000 == 0
    m.close(handle)


def test_times_are_kept_to_the_nanosecond(m: Mounted) -> None:
    m.touch("f")
    m.run(m.fs.setattr(m.ino("f"), Changes(atime_ns=1_000_000_007, mtime_ns=-5), None, ME))
    m.remount()
    assert (m.stat("f").atime_ns, m.stat("f").mtime_ns) == (1_000_000_007, -5)


# --- a full filesystem -----------------------------------------------------------------------------------------------


def test_a_full_filesystem_says_so_at_once_and_recovers(m: Mounted) -> None:
    free = m.run(m.fs.statfs()).blocks_free
    m.touch("big")
    _, handle = m.open("big")
    at = 0
    with fails(errno.ENOSPC):
        while True:
            at += m.put(handle, at, b"f" * (1 << 18))
    assert at > (free - 200) * 4096
    with fails(errno.ENOSPC):
        for number in range(2000):
            m.write(f"small{number}", b"y" * 5000)
    m.run(m.fs.fsync(0, handle, data_only=False))  # what was accepted can be written
    assert m.get(handle, at - 5) == b"f" * 5
    m.close(handle)
    m.rm("big")
    m.write("after", b"a" * 1_000_000)
    assert m.read("after") == b"a" * 1_000_000


# --- record locks ----------------------------------------------------------------------------------------------------


def test_posix_locks_split_merge_and_conflict(m: Mounted) -> None:
    m.touch("f")
    ino, handle = m.open("f")

    def lock(owner: int, start: int, end: int, kind: int) -> None:
        m.run(m.fs.setlk(ino, handle, owner, LockRange(start, end, kind, owner), wait=False, flock=False))

    lock(1, 0, 99, 1)
    lock(1, 40, 59, 2)
    lock(2, 40, 59, 1)
    with fails(errno.EAGAIN):
        lock(2, 30, 45, 0)
    assert m.run(m.fs.getlk(ino, handle, 3, LockRange(0, 10, 0))).pid == 1
    assert m.run(m.fs.getlk(ino, handle, 3, LockRange(200, 300, 1))).type == 2
    m.run(m.fs.flush(ino, handle, 1))
    lock(3, 0, 39, 1)
    m.close(handle)
