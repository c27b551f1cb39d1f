"""Refusals are one sentence with cause and next step; mountinfo is read as the kernel writes it."""

import os
import shutil
from pathlib import Path

import pytest

from corral.fuse import MountError, Options
from corral.fuse import mounting as m


def test_mountinfo_with_spaces_and_optional_fields() -> None:
    line = r"36 35 0:53 / /mnt/a\040b\134 rw,nosuid shared:1 master:2 - fuse.corral corral\040home rw,user_id=0" + "\n"
    assert m._mountinfo(line) == m.Mounted(53, "/mnt/a b\\", "fuse.corral", "corral home")
    assert m._mountinfo("nonsense") is None
    assert m.mounted_at("/") is not None


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda path: None, r"does not exist; make it with: mkdir -p"),
        (lambda path: path.write_text(""), r"is not a directory; choose"),
        (lambda path: (path / "x").mkdir(parents=True), r"is not empty; empty it, choose another or allow"),
    ],
)
def test_unusable_mountpoints_are_refused(tmp_path: Path, prepare: object, sentence: str) -> None:
    path = tmp_path / "mnt"
    prepare(path)  # type: ignore[operator]
    with pytest.raises(MountError, match=sentence):
        m.check_mountpoint(str(path), Options())


def test_a_directory_with_entries_can_be_allowed(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    assert m.check_mountpoint(str(tmp_path), Options(nonempty=True)) == str(tmp_path)


def test_something_mounted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "mounts", lambda: [m.Mounted(9, str(tmp_path), "ext4", "/dev/sda1")])
    with pytest.raises(MountError, match=r"already a mountpoint \(ext4 from /dev/sda1\); unmount it with: umount"):
        m.check_mountpoint(str(tmp_path), Options())


def test_missing_device_and_program_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(MountError, match=r"needs fusermount3; install it with: sudo apt-get install -y fuse3"):
        m._mount_as_user("/mnt", Options())
    monkeypatch.setattr(m, "DEVICE", "/dev/no-such-fuse")
    with pytest.raises(MountError, match=r"there is no /dev/no-such-fuse; load the module with: sudo modprobe fuse"):
        m.open_and_mount("/mnt", Options())


@pytest.mark.parametrize("number", [1, 19, 16, 22])
def test_every_refusal_of_the_kernel_names_a_next_step(number: int) -> None:
    sentence = m._why_not_mounted("/mnt", number)
    assert sentence.count("; ") == 1
    assert "\n" not in sentence
