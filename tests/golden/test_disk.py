"""Images of released format versions: the bytes mkfs writes do not change unnoticed, and old images stay mountable.

`disk-v1.bin` is what `make_image` wrote when version 1 was fixed: (block number, block) for every block not zero,
compressed. When the format changes on purpose, raise the version, keep the old file, and write a new one with
`python -m tests.golden.test_disk`.
"""

import struct
import zlib
from pathlib import Path

from tests.unit.gfs.mounted import Mounted
from tests.unit.gfs.world import BLOCK

HERE = Path(__file__).parent
NUMBER = struct.Struct("<I")


def make_image() -> bytes:
    """Small, and the same every time: time and chance come from the stepped world."""
    m = Mounted(blocks=4096, journal_blocks=128)
    m.mkdir("directory")
    for number in range(130):
        m.touch(f"directory/file-{number}")
    m.write("stuffed", b"inside the dinode")
    m.write("extents", b"outside " * 5000)
    m.symlink("directory/file-0", "link")
    m.link("stuffed", "directory/again")
    m.rm("directory/file-7")
    m.sync()
    return bytes(m.disk.content)


def pack(image: bytes) -> bytes:
    parts = []
    for number in range(len(image) // BLOCK):
        block = image[number * BLOCK : (number + 1) * BLOCK]
        if any(block):
            parts.append(NUMBER.pack(number) + block)
    return zlib.compress(NUMBER.pack(len(image) // BLOCK) + b"".join(parts), 9)


def unpack(packed: bytes) -> bytearray:
    raw = zlib.decompress(packed)
    image = bytearray(NUMBER.unpack_from(raw)[0] * BLOCK)
    for at in range(4, len(raw), 4 + BLOCK):
        number = NUMBER.unpack_from(raw, at)[0]
        image[number * BLOCK : (number + 1) * BLOCK] = raw[at + 4 : at + 4 + BLOCK]
    return image


def test_the_image_of_version_1_can_be_mounted_and_read() -> None:
    m = Mounted(blocks=4096, journal_blocks=128)
    m.disk.content[:] = unpack((HERE / "disk-v1.bin").read_bytes())
    m.mount()  # replays: the image was taken without an unmount
    assert m.fs.recovery.replayed == [0]
    assert m.read("stuffed") == m.read("directory/again") == b"inside the dinode"
    assert m.read("extents") == b"outside " * 5000
    assert m.run(m.fs.readlink(m.ino("link"))) == b"directory/file-0"
    assert len(m.ls("directory")) == 130
    m.unmount_clean()


if __name__ == "__main__":
    (HERE / "disk-v1.bin").write_bytes(pack(make_image()))
