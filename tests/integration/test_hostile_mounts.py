"""Images that are damaged and mounts that cannot be had, with real processes: refused or answered with one sentence, an
error for what is bad and for nothing else, never a traceback, never a dead node."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.cli.layout import Layout, make
from corral.cli.localcluster import LocalCluster
from corral.fuse.mounting import abort_connection, mounted_at
from corral.gfs import format as fmt
from tests.integration.fuse_support import needs_fuse

pytestmark = needs_fuse

CORRAL = [sys.executable, "-m", "corral.cli.main"]
PATIENCE = 60.0
RSS_MAX = 400 << 20
FILES = 400


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    layout = Layout(tmp_path_factory.mktemp("mounts") / "c")
    made = LocalCluster(layout, make(layout, 1), lambda _: None)
    try:
        made.up()
        yield made
    finally:
        made.abandon()


class Served:
    """One `corral gfs mount --foreground`."""

    def __init__(self, cluster: LocalCluster, image: Path, mountpoint: Path) -> None:
        mountpoint.mkdir(exist_ok=True)
        self.path = mountpoint
        self.log = mountpoint.with_name(f"{mountpoint.name}.log")
        argv = [*CORRAL, f"--socket={cluster.files(1).socket}", "gfs", "mount", image, mountpoint, "--foreground"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log, stdout=log)

    def mounted(self) -> "Served":
        end = time.monotonic() + PATIENCE
        while mounted_at(str(self.path)) is None:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)
        return self

    def refused(self) -> str:
        """It ends by itself, without having mounted; its last sentence."""
        assert self.process.wait(PATIENCE) != 0
        assert mounted_at(str(self.path)) is None
        return self.said()

    def said(self) -> str:
        lines = [line for line in self.log.read_text().splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def rss(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        mounted = mounted_at(str(self.path))
        if mounted is not None:
            abort_connection(mounted)


@pytest.fixture
def serve(cluster: LocalCluster, tmp_path: Path) -> Iterator["Serve"]:
    made = Serve(cluster, tmp_path)
    yield made
    for served in made.all:
        served.end()
    for served in made.all:
        assert "Traceback" not in served.log.read_text()
    assert "Traceback" not in cluster.files(1).log.read_text()
    assert cluster.corrald(1) == made.corrald


class Serve:
    def __init__(self, cluster: LocalCluster, root: Path) -> None:
        self.cluster = cluster
        self.root = root
        self.corrald = cluster.corrald(1)
        self.all: list[Served] = []

    def __call__(self, image: Path) -> Served:
        served = Served(self.cluster, image, self.root / f"m{len(self.all)}")
        self.all.append(served)
        return served


def make_image(path: Path, name: str, journals: int) -> Path:
    table = f"--table=local:{name}"
    argv = [*CORRAL, "gfs", "mkfs", path, table, "--size=64M", f"--journals={journals}", "--yes"]
    subprocess.run(argv, check=True, capture_output=True, timeout=PATIENCE)
    return path


@pytest.fixture(scope="module")
def populated(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with two files and a directory of several blocks, unmounted cleanly."""
    root = tmp_path_factory.mktemp("populated")
    image = make_image(root / "image", "damaged", 2)
    served = Served(cluster, image, root / "m").mounted()
    try:
        (served.path / "file").write_bytes(b"f" * 100_000)
        (served.path / "other").write_bytes(b"o" * 100_000)
        (served.path / "many").mkdir()
        for number in range(FILES):
            (served.path / "many" / f"a file with a long name, number {number}").touch()
        numbers = [str(os.stat(served.path / name).st_ino) for name in ("file", "other")]
        (root / "numbers").write_text(" ".join(numbers))
    finally:
        served.end()
    return image


def damaged(populated: Path, copy: Path, *kinds: int) -> Path:
    """A copy in which nothing of these kinds can be believed any more."""
    shutil.copyfile(populated, copy)
    hit = 0
    with copy.open("r+b") as image:
        content = image.read()
        for at in range(0, len(content), fmt.BLOCK):
            magic, kind, *_ = fmt.HEADER.unpack_from(content, at)
            if magic == fmt.MAGIC and kind in kinds:
                image.seek(at + 2000)
                image.write(bytes(byte ^ 0x55 for byte in content[at + 2000 : at + 2100]))
                hit += 1
    assert hit
    return copy


# --- damaged images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        ((fmt.SUPERBLOCK,), "cannot be mounted"),
        ((fmt.LOG_HEADER,), "run fsck"),
        ((fmt.DINODE,), "run fsck"),
        ((fmt.RINDEX,), "run fsck"),
    ],
    ids=["superblock", "journal", "inodes", "rindex"],
)
def test_what_a_mount_needs_is_damaged(
    serve: Serve, populated: Path, tmp_path: Path, kinds: tuple[int, ...], told: str
) -> None:
    image = damaged(populated, tmp_path / "image", *kinds)
    said = serve(image).refused()
    assert told in said
    before = image.read_bytes()
    assert told in serve(image).refused()  # nothing was made worse, and no slot stays behind
    assert image.read_bytes() == before


def test_a_damaged_directory_is_an_error_for_that_directory(serve: Serve, populated: Path, tmp_path: Path) -> None:
    served = serve(damaged(populated, tmp_path / "image", fmt.LEAF)).mounted()
    for _ in range(20):
        with pytest.raises(OSError) as caught:
            os.listdir(served.path / "many")
        assert caught.value.errno == errno.EIO
    assert (served.path / "file").read_bytes() == b"f" * 100_000
    (served.path / "new").write_bytes(b"new")
    assert served.rss() < RSS_MAX


def test_a_damaged_inode_is_an_error_for_that_file(serve: Serve, populated: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    shutil.copyfile(populated, image)
    number = int((populated.parent / "numbers").read_text().split()[0])
    address = next(at for at in _dinodes(image) if at == number or at == number & 0xFFFFFFFF)
    with image.open("r+b") as file:
        file.seek(address * fmt.BLOCK + 300)
        file.write(b"\xaa" * 100)
    served = serve(image).mounted()
    for _ in range(20):
        with pytest.raises(OSError) as caught:
            (served.path / "file").read_bytes()
        assert caught.value.errno == errno.EIO
    assert (served.path / "other").read_bytes() == b"o" * 100_000
    assert served.rss() < RSS_MAX


def _dinodes(image: Path) -> list[int]:
    content = image.read_bytes()
    found = []
    for at in range(0, len(content), fmt.BLOCK):
        magic, kind, *_ = fmt.HEADER.unpack_from(content, at)
        if magic == fmt.MAGIC and kind == fmt.DINODE:
            found.append(at // fmt.BLOCK)
    return found


def test_a_mount_whose_bitmaps_are_damaged_gives_up_with_a_sentence(
    serve: Serve, populated: Path, tmp_path: Path
) -> None:
    image = damaged(populated, tmp_path / "image", fmt.RGRP)
    served = serve(image)
    assert served.process.wait(PATIENCE) != 0  # it looks for unlinked files as soon as it is mounted
    assert "unmount everywhere and run fsck" in served.said()
    assert mounted_at(str(served.path)) is None


# --- mounts that cannot be had ---------------------------------------------------------------------------------------


def test_a_node_may_mount_an_image_twice_and_each_sees_the_other(serve: Serve, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", "twice", 2)
    first, second = serve(image).mounted(), serve(image).mounted()
    for number in range(20):
        writer, reader = (first, second) if number % 2 else (second, first)
        (writer.path / "file").write_bytes(b"%d" % number)
        assert (reader.path / "file").read_bytes() == b"%d" % number
    third = serve(image)
    assert "members have all 2 slots of gfs:twice" in third.refused()
    first.end()
    assert (serve(image).mounted().path / "file").read_bytes() == b"19"


def test_a_second_mount_at_the_same_place_is_refused(serve: Serve, cluster: LocalCluster, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", "place", 2)
    first = serve(image).mounted()
    again = Served(cluster, image, first.path)
    assert again.process.wait(PATIENCE) != 0
    assert "is already a mountpoint" in again.said()
    (first.path / "file").write_bytes(b"here")


def test_a_slot_of_a_killed_mount_is_waited_for(serve: Serve, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", "slots", 2)
    first, second = serve(image).mounted(), serve(image).mounted()
    (second.path / "file").write_bytes(b"kept")
    with (second.path / "file").open("rb") as file:
        os.fsync(file.fileno())
    second.process.kill()
    third = serve(image).mounted()  # at once: the slot is still being recovered
    assert (third.path / "file").read_bytes() == b"kept"
    assert (first.path / "file").read_bytes() == b"kept"
