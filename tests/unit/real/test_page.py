import errno
import os
import stat
from pathlib import Path

import pytest

from corral.real.page import map_page


def test_all_mappings_are_one_memory(tmp_path: Path) -> None:
    path = str(tmp_path / "page")
    mine = map_page(path, 4096, create=True)
    yours = map_page(path, 4096, create=False)
    assert (len(mine), bytes(mine)) == (4096, bytes(4096))
    mine[8:12] = b"tick"
    assert bytes(yours[8:12]) == b"tick"
    yours[0:1] = b"x"
    assert bytes(mine[0:1]) == b"x"


def test_a_new_life_has_a_new_page_and_the_old_one_stays_dead(tmp_path: Path) -> None:
    path = str(tmp_path / "page")
    old = map_page(path, 4096, create=True)
    old[0:1] = b"o"
    new = map_page(path, 4096, create=True)
    assert bytes(new[0:1]) == b"\0"
    new[0:1] = b"n"
    assert bytes(old[0:1]) == b"o"
    assert os.listdir(tmp_path) == ["page"]


def test_others_may_read_only_if_they_are_of_the_group(tmp_path: Path) -> None:
    path = str(tmp_path / "page")
    mask = os.umask(0)
    try:
        map_page(path, 4096, create=True)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640


def test_without_write_permission_it_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "page")
    map_page(path, 4096, create=True)
    real = os.open

    def denied(name: str, flags: int, *args: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(name, flags, *args)

    monkeypatch.setattr("corral.real.page.os.open", denied)
    view = map_page(path, 4096, create=False)
    assert view.readonly


def test_a_page_that_is_too_short_is_refused_before_a_touch_of_it_kills_us(tmp_path: Path) -> None:
    path = tmp_path / "page"
    path.write_bytes(bytes(100))
    with pytest.raises(OSError, match="has 100 bytes where 4096 are expected"):
        map_page(str(path), 4096, create=False)


def test_a_missing_page_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        map_page(str(tmp_path / "page"), 4096, create=False)


def test_a_full_filesystem_is_a_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("corral.real.page.os.posix_fallocate", full)
    with pytest.raises(OSError, match="cannot make the shared page"):
        map_page(str(tmp_path / "page"), 4096, create=True)
    assert os.listdir(tmp_path) == []
