from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.errors import StoreError, StoreFull
from server.registry.objects import LocalObjects
from tests.registry.stored import EVENT, files


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Takes note of the calls that make a write durable, once they have returned."""
    calls: list[str] = []
    fsync, link, unlink = os.fsync, os.link, os.unlink

    def noting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        kind = "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        calls.append(f"sync {kind}{f' {name}' if kind == 'directory' else ''}")

    def noting_link(source: Path, target: Path) -> None:
        calls.append("link")
        link(source, target)

    def noting_unlink(path: Path) -> None:
        unlink(path)
        calls.append("unlink")

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "link", noting_link)
    monkeypatch.setattr(os, "unlink", noting_unlink)
    return calls


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads the names of descriptors in /proc")


@needs_proc
def test_a_file_is_synced_before_it_has_a_name_and_its_directory_after(
    local: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_calls(monkeypatch)
    local.create(EVENT, b"{}")
    assert calls == ["sync file", "link", "unlink", "sync directory events"]


@needs_proc
def test_what_another_writer_created_is_durable_before_it_is_relied_on(
    local: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.create(EVENT, b"first")
    calls = record_calls(monkeypatch)
    assert not local.create(EVENT, b"second")
    assert calls[-1] == "sync directory events"


@needs_proc
def test_a_new_store_is_durable_with_all_its_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_calls(monkeypatch)
    LocalObjects(tmp_path / "a" / "b")
    assert {f"sync directory {name}" for name in (tmp_path.name, "a", "b")} <= set(calls)
    calls.clear()
    LocalObjects(tmp_path / "a" / "b")
    assert calls == ["sync directory b"], "one that is there is not synced up to the root"


def test_a_file_that_is_being_written_is_no_object(
    local: LocalObjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.create(EVENT, b"{}")
    seen = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            seen.append((local.list("events"), files(tmp_path)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    local.create("events/000000000002.json", b"{}")
    ((listed, present),) = seen
    assert listed == ["000000000001.json"]
    assert len(present) == 2
    assert files(tmp_path) == ["events/000000000001.json", "events/000000000002.json"]


def test_what_a_killed_writer_left_is_removed_a_day_later(tmp_path: Path) -> None:
    local = LocalObjects(tmp_path)
    local.create(EVENT, b"{}")
    for name, hours in ((".tmp-old", 25), (".tmp-new", 23), ("000000000001.json", 25)):
        path = tmp_path / "events" / name
        path.touch()
        os.utime(path, (time.time() - hours * 3600,) * 2)
    LocalObjects(tmp_path)
    assert files(tmp_path) == ["events/.tmp-new", "events/000000000001.json"]


def test_an_age_grows(local: LocalObjects, tmp_path: Path) -> None:
    local.create(EVENT, b"{}")
    os.utime(tmp_path / EVENT, (time.time() - 1000,) * 2)
    assert local.age(EVENT) == pytest.approx(1000, abs=60)
    os.utime(tmp_path / EVENT, (time.time() + 1000,) * 2)
    assert local.age(EVENT) == 0, "a clock that was set back makes nothing younger than new"


def test_the_umask_decides_who_may_read(local: LocalObjects, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        local.create(EVENT, b"{}")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / EVENT).stat().st_mode) == 0o640


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fsync", "link"])
def test_a_write_that_finds_no_space_leaves_nothing(
    call: str, number: int, local: LocalObjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.create(EVENT, b"first")

    def full(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    class Full:
        """A file that takes half of what it is given."""

        def __init__(self, descriptor: int, mode: str) -> None:
            self._file = open(descriptor, mode, buffering=0)  # noqa: SIM115

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *exc: object) -> None:
            self._file.close()

        def write(self, data: bytes) -> None:
            self._file.write(data[: len(data) // 2])
            full()

    if call == "write":
        monkeypatch.setattr(os, "fdopen", Full)
    else:
        monkeypatch.setattr(os, call, full)
    with pytest.raises(StoreFull, match=r"events/000000000002\.json") as caught:
        local.create("events/000000000002.json", b"second")
    assert caught.value.status == 507
    monkeypatch.undo()
    assert files(tmp_path) == [EVENT]
    assert local.get(EVENT) == b"first"
    assert local.create("events/000000000002.json", b"second")


def test_a_name_that_may_not_be_durable_is_not_said_to_have_changed_nothing(
    local: LocalObjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fails_for_directories(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_for_directories)
    with pytest.raises(StoreError, match="durable: No space left") as caught:
        local.create(EVENT, b"{}")
    assert not isinstance(caught.value, StoreFull)
    assert files(tmp_path) == [EVENT]


def test_a_network_folder_that_cannot_sync_directories_is_used_as_it_is(
    local: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses_directories(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuses_directories)
    assert local.create(EVENT, b"{}")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links_is_refused(
    number: int, local: LocalObjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuses)
    with pytest.raises(StoreError, match="no hard links") as caught:
        local.create(EVENT, b"{}")
    assert "PRELUDE_STORE" in caught.value.remedy
    assert files(tmp_path) == []


def test_any_other_refusal_is_a_store_error_that_names_the_object(
    local: LocalObjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / EVENT).mkdir()
    for use in (local.get, local.delete):
        with pytest.raises(StoreError, match=r"000000000001\.json: Is a directory"):
            use(EVENT)
    shutil.rmtree(tmp_path / "events")
    uses: list[Callable[[], Any]] = [lambda: local.list("events"), lambda: local.create(EVENT, b"{}")]
    for use_folder in uses:
        with pytest.raises(StoreError, match="No such file or directory") as caught:
            use_folder()
        assert not isinstance(caught.value, StoreFull)
