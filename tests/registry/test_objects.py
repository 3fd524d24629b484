"""Objects: one suite for a folder and for a bucket, then what only a folder has (test_remote.py: what a bucket has)."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.errors import StoreError
from server.registry.objects import LocalObjects, Objects, open_objects
from tests.registry.stored import BLOB, EVENT, Open, files

WRITERS = 16


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
    monkeypatch.setattr("server.registry.bucket.PAGE", 3)
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
    monkeypatch.delitem(sys.modules, "server.registry.bucket", raising=False)
    with pytest.raises(StoreError, match="obstore") as caught:
        open_objects("s3://bucket/prefix")
    assert caught.value.remedy == 'Install it with `pip install "prelude-server[store]"`.'
