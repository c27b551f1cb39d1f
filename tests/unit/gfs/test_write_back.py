"""Write-back: what a write under way reads does not change under it."""

from typing import Any

from tests.unit.gfs.mounted import ME, O_RDWR, Mounted


def test_a_write_into_a_block_being_written_leaves_the_buffer_alone() -> None:
    m = Mounted()
    m.touch("file")
    ino = m.ino("file")
    handle = m.run(m.fs.open(ino, O_RDWR, ME)).handle

    def write(content: bytes) -> Any:
        return m.fs.write(ino, handle, 0, content, append=False, from_cache=False, kill_suidgid=False)

    m.run(write(b"a" * 9000))
    data = m.fs.inodes[ino].data
    assert data is not None
    runs: list[Any] = []
    chunks: list[Any] = []
    m.fs.data._collect(data, runs, chunks)
    m.run(write(b"b" * 9000))
    m.run(write(b"c" * 9000))
    assert bytes(runs[0][1][:9000]) == b"a" * 9000
    assert m.run(m.fs.read(ino, handle, 0, 9000))[0] == b"c" * 9000
    for chunk in chunks:
        chunk.give_back()
    m.run(m.fs.release(ino, handle, None))
    m.unmount_clean()
