from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.errors import StoreError, StoreFull
from server.registry.objects import LocalObjects
from server.registry.registry import Registry
from server.registry.store import Store
from tests.registry.shelf import SPEC, content
from tests.registry.stored import BLOB, EVENT, files


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
