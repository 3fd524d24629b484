"""Objects: one suite for a folder and for a bucket, then what only a folder has (test_remote.py: what a bucket has)."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.errors import StoreError, StoreFull
from server.registry.objects import LocalObjects, Objects, open_objects
from server.registry.registry import Registry
from server.registry.store import Store
from tests.registry.shelf import SPEC, content

WRITERS = 16
EVENT = "events/000000000001.json"
BLOB = "blobs/0123abc-4567.safetensors"

Open = Callable[[], Objects]


@pytest.fixture(params=["file", "s3"])
def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the same, at first empty, place at every call."""
    url = f"file:{tmp_path}" if request.param == "file" else request.getfixturevalue("s3_store_url")
    return lambda: open_objects(url)


@pytest.fixture
def objects(open_again: Open) -> Objects:
    return open_again()


@pytest.fixture
def local(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


# A folder and a bucket


@pytest.mark.parametrize("data", [b"", b"{}", bytes(range(256)) * 24_000], ids=["empty", "small", "6 MB"])
def test_what_was_created_is_there_after_reopening(open_again: Open, data: bytes) -> None:
    assert open_again().create(BLOB, data) is True
    assert open_again().get(BLOB) == data


def test_an_object_is_never_overwritten(objects: Objects, open_again: Open) -> None:
    assert objects.create(EVENT, b"first")
    assert objects.create(EVENT, b"second") is False
    assert open_again().create(EVENT, b"first") is False
    assert objects.get(EVENT) == b"first"


def test_what_is_absent_is_none_and_deleting_it_is_no_error(objects: Objects) -> None:
    assert objects.get(EVENT) is None
    assert objects.age(EVENT) is None
    objects.delete(EVENT)
    assert objects.list("events") == []
    assert objects.list("blobs") == []


def test_what_was_deleted_is_absent_and_its_name_is_free(objects: Objects) -> None:
    objects.create(BLOB, b"first")
    objects.create(EVENT, b"{}")
    objects.delete(BLOB)
    assert objects.get(BLOB) is None
    assert objects.list("blobs") == []
    assert objects.list("events") == ["000000000001.json"]
    assert objects.create(BLOB, b"second")
    assert objects.get(BLOB) == b"second"


def test_a_listing_is_sorted_and_of_one_folder(
    objects: Objects, open_again: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")  # so that it comes in pages
    monkeypatch.setattr("server.registry.remote.PAGE", 3)
    names = [f"{number:012d}.json" for number in range(1, 9)]
    for name in reversed(names):
        objects.create(f"events/{name}", b"{}")
    objects.create(BLOB, b"")
    for place in (objects, open_again()):
        assert place.list("events") == names
        assert place.list("blobs") == [BLOB.removeprefix("blobs/")]


def test_an_age_is_that_of_the_write(objects: Objects) -> None:
    objects.create(EVENT, b"{}")
    age = objects.age(EVENT)
    assert age is not None
    assert 0 <= age < 60


def test_of_many_writers_exactly_one_wins(open_again: Open) -> None:
    barrier = threading.Barrier(WRITERS)
    places = [open_again() for _ in range(WRITERS)]

    def write(writer: int) -> list[bool]:
        won = []
        for number in range(1, 6):
            barrier.wait()
            won.append(places[writer].create(f"events/{number:012d}.json", f"writer {writer}".encode() * 1000))
        return won

    with ThreadPoolExecutor(WRITERS) as threads:
        won = list(threads.map(write, range(WRITERS)))
    for number in range(1, 6):
        (winner,) = [writer for writer in range(WRITERS) if won[writer][number - 1]]
        assert places[0].get(f"events/{number:012d}.json") == f"writer {winner}".encode() * 1000
    assert len(places[0].list("events")) == 5


def test_many_threads_read_at_once(objects: Objects) -> None:
    keys = [f"events/{number:012d}.json" for number in range(1, 41)]
    for key in keys:
        objects.create(key, key.encode())
    with ThreadPoolExecutor(WRITERS) as threads:
        assert list(threads.map(objects.get, keys)) == [key.encode() for key in keys]


# A folder


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    yield from mounted_disk(tmp_path, "64k")


@pytest.fixture
def store_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for some versions."""
    yield from mounted_disk(tmp_path, "256k")


def mounted_disk(tmp_path: Path, size: str) -> Iterator[Path]:
    """A file system of this size, as long as a test runs."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if sys.platform != "linux" or os.geteuid() != 0 or not mount or not umount:
        pytest.skip("only root on Linux may mount a small disk")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run([umount, str(place)], check=True)


def fill(disk: Path) -> None:
    """Take all the space that is left, down to the last block."""
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def changes_that_fit(registry: Registry) -> int:
    """How often versions of a can be activated before the disk is too full for that as well."""
    older, newer = sorted(registry.task("a").versions)[-2:]
    for count in range(100):
        try:
            registry.activate("a", newer if count % 2 else older)
        except StoreFull:
            return count
    raise AssertionError("the disk is not full")


def test_on_a_full_disk_deletes_work_and_bring_their_space_back(store_disk: Path) -> None:
    registry = Registry(Store(LocalObjects(store_disk / "store")), SPEC, 32)
    for seed in range(4):
        registry.publish("a", [content(seed)], "api")
    registry.publish("b", [content(9)], "api")
    fill(store_disk)
    assert 2 <= changes_that_fit(registry) <= 20, "some fit, and they do not use up what deletes need"
    for _ in range(3):  # again and again: the reserve comes back
        fill(store_disk)
        with pytest.raises(StoreFull):
            registry.publish("a", [content(8)], "api")
        registry.delete_version("a", min(registry.task("a").versions))
    fill(store_disk)
    registry.delete("b")
    opened = Registry(Store(LocalObjects(store_disk / "store")), SPEC, 32)
    assert [task.name for task in opened.tasks()] == ["a"]
    assert list(opened.task("a").versions) == [4]
    assert len(LocalObjects(store_disk / "store").list("blobs")) == 1
    (store_disk / "filler").unlink()
    opened.publish("a", [content(8)], "api")


def test_a_store_that_may_only_be_read_serves_and_says_so(store_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    Registry(Store(LocalObjects(store_disk / "store")), SPEC, 32).publish("a", [content(1)], "api")
    (store_disk / "store" / ".reserve").unlink()
    mount = shutil.which("mount") or "mount"
    subprocess.run([mount, "-o", "remount,ro", str(store_disk)], check=True)
    registry = Registry(Store(LocalObjects(store_disk / "store")), SPEC, 32)
    assert registry.resolve("a").version == 1
    assert "cannot be written to (Read-only file system)" in caplog.text
    with pytest.raises(StoreError, match="Read-only file system"):
        registry.delete("a")


def test_a_delete_that_was_killed_before_its_blob_went_is_ended_by_the_next_start(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path)
    registry = Registry(Store(objects), SPEC, 32)
    registry.publish("a", [content(1)], "api")
    [name] = objects.list("blobs")
    data = objects.get(f"blobs/{name}")
    assert data is not None
    registry.delete("a")
    objects.create(f"blobs/{name}", data)
    objects.create("blobs/underway.safetensors", data)
    Registry(Store(objects), SPEC, 32)
    assert objects.list("blobs") == ["underway.safetensors"]


def test_a_full_disk_keeps_what_it_has_and_takes_more_once_there_is_room(small_disk: Path) -> None:
    local = LocalObjects(small_disk)
    assert local.create(EVENT, b"first")
    with pytest.raises(StoreFull, match="No space left"):
        local.create(BLOB, bytes(100_000))
    assert files(small_disk) == [EVENT]
    assert local.create(BLOB, bytes(40_000))
    with pytest.raises(StoreFull):
        local.create("blobs/second", bytes(40_000))
    local.delete(BLOB)
    assert local.create("blobs/second", bytes(40_000))
    assert local.get(EVENT) == b"first"


@pytest.mark.parametrize(
    "key", ["events/../../etc", "../events/1", "events/.tmp-1", "/events/1", "events/a/b", "other/1"]
)
def test_a_key_stays_in_its_folder(key: str, local: LocalObjects) -> None:
    with pytest.raises(AssertionError):
        local.create(key, b"")
    with pytest.raises(AssertionError):
        local.get(key)


# URLs


def test_a_folder_is_named_by_a_file_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    urls = {"file:a/b": "a/b", f"file:{tmp_path}/c": "c", f"file://{tmp_path}/d": "d", "file:~/e": "home/e"}
    for url, root in urls.items():
        assert open_objects(url).create(EVENT, b"{}")
        assert (tmp_path / root / EVENT).is_file()


def test_a_store_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    objects = open_objects("file:store")
    monkeypatch.chdir("/")
    assert objects.create(EVENT, b"{}")
    assert (tmp_path / "store" / EVENT).is_file()


@pytest.mark.parametrize("url", ["", "a/b", "file:", "file://var/lib/prelude", "ftp://host/x", "https://bucket/x"])
def test_a_url_of_an_unknown_kind_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="PRELUDE_STORE") as caught:
        open_objects(url)
    assert "file:PATH" in caught.value.remedy
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_made_says_where_one_could_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be made") as caught:
        open_objects(f"file:{tmp_path}/file/store")
    assert "PRELUDE_STORE" in caught.value.remedy
    assert "such as file:" in caught.value.remedy


def test_a_bucket_without_the_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "server.registry.remote", raising=False)
    with pytest.raises(StoreError, match="obstore") as caught:
        open_objects("s3://bucket/prefix")
    assert caught.value.remedy == 'Install it with `pip install "prelude-server[store]"`.'
