"""A file is replaced whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from server.durable import not_stored, replace_file
from server.errors import StoreError, StoreFull


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"old", b"new, and longer", b""):
        replace_file(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["file"]


def test_where_no_space_is_left_the_old_content_stays_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")
    path.chmod(0o640)
    replace_file(path, b"new")
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("number", "kind", "part"),
    [(errno.ENOSPC, StoreFull, "Make room"), (errno.EDQUOT, StoreFull, "Make room"), (errno.EACCES, StoreError, "may")],
)
def test_what_there_is_no_place_for_says_what_and_where(number: int, kind: type[StoreError], part: str) -> None:
    error = not_stored(OSError(number, "the system's words"), "The upload", "the folder X")
    assert type(error) is kind
    assert error.message == "The upload cannot be kept: the system's words."
    assert part in error.remedy
    assert "the folder X" in error.remedy
