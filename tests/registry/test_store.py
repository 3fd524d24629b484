"""The durable store: whole or absent, exactly one winner per number, damage noticed."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from server.core import ModelSpec
from server.errors import StoreError
from server.registry.events import Event, PublishedVersion
from server.registry.store import LocalStore
from tests.support import random_kv_prompt, random_soft_prompt

WRITERS = 8


def event(number: int, task: str = "task") -> Event:
    return Event(number, "publish", "now", "api", (PublishedVersion(task, 1, "0" * 64),))


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def test_of_several_writers_exactly_one_wins_a_number(store: LocalStore, tmp_path: Path) -> None:
    barrier, won = threading.Barrier(WRITERS), {}

    def write(task: str) -> None:
        own = LocalStore(tmp_path)
        for number in range(1, 6):
            barrier.wait()
            won[number, task] = own.append(event(number, task))

    threads = [threading.Thread(target=write, args=(f"task-{i}",)) for i in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, written in enumerate(store.events(), 1):
        winners = [task for (n, task), wins in won.items() if wins and n == number]
        assert winners == [written.published[0].task]
    assert len(store.events()) == 5
    assert len(files(tmp_path)) == 5, "no temporary file is left"


def test_what_was_written_is_there_after_reopening(store: LocalStore, tmp_path: Path, spec: ModelSpec) -> None:
    manifest = {"description": "Größe", "input_template": "{input}\n", "labels": ["a"]}
    for soft_prompt in (random_soft_prompt(spec, manifest=manifest), random_kv_prompt(spec)):
        store.put_blob(soft_prompt)
        read = LocalStore(tmp_path).get_blob(soft_prompt.digest)
        assert torch.equal(read.tensor, soft_prompt.tensor)
        assert (read.peft_type, read.manifest, read.digest) == (
            soft_prompt.peft_type,
            soft_prompt.manifest,
            soft_prompt.digest,
        )
    assert store.append(event(1))
    assert store.append(event(2))
    assert LocalStore(tmp_path).events() == [event(1), event(2)]


def test_a_write_is_synced_before_it_is_visible_and_its_directory_after(
    store: LocalStore, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, link, rename = os.fsync, os.link, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append("sync directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def record_link(source: str, target: Path) -> None:
        calls.append("visible")
        link(source, target)

    def record_replace(source: str, target: Path) -> None:
        calls.append("visible")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "link", record_link)
    monkeypatch.setattr(os, "replace", record_replace)
    store.put_blob(random_soft_prompt(spec))
    assert calls == ["sync file", "visible", "sync directory"]
    calls.clear()
    store.append(event(1))
    assert calls == ["sync file", "visible", "sync directory"]


def test_a_write_that_the_disk_refuses_leaves_nothing(
    store: LocalStore, tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        store.append(event(1))
    with pytest.raises(StoreError, match="No space left"):
        store.put_blob(random_soft_prompt(spec))
    assert files(tmp_path) == []


def test_a_blob_that_was_damaged_is_noticed_and_mended_by_writing_it_again(
    store: LocalStore, tmp_path: Path, spec: ModelSpec
) -> None:
    soft_prompt = random_soft_prompt(spec, manifest={"labels": ["ham", "spam"]})
    path = tmp_path / "blobs" / f"{soft_prompt.digest}.safetensors"
    store.put_blob(soft_prompt)
    whole = path.read_bytes()
    assert b"ham" in whole
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    torn = whole.replace(b'labels\\": [', b'labels\\": {')
    assert torn != whole
    for damaged in (flipped, whole[:-1], b"", whole.replace(b"ham", b"hum"), torn):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=soft_prompt.digest):
            store.get_blob(soft_prompt.digest)
    store.put_blob(soft_prompt)
    assert torch.equal(store.get_blob(soft_prompt.digest).tensor, soft_prompt.tensor)


def test_a_blob_that_is_missing_is_an_error_and_removing_it_twice_is_not(store: LocalStore, spec: ModelSpec) -> None:
    soft_prompt = random_soft_prompt(spec)
    store.put_blob(soft_prompt)
    store.remove_blob(soft_prompt.digest)
    store.remove_blob(soft_prompt.digest)
    with pytest.raises(StoreError, match=soft_prompt.digest):
        store.get_blob(soft_prompt.digest)


@pytest.mark.parametrize("number", [1, 2])
def test_a_missing_event_is_an_error_that_names_it(number: int, store: LocalStore, tmp_path: Path) -> None:
    for written in (1, 2, 3):
        store.append(event(written))
    (tmp_path / "events" / f"{number:012d}.json").unlink()
    with pytest.raises(StoreError, match=f"event {number} is missing") as caught:
        LocalStore(tmp_path).events()
    assert "backup" in caught.value.remedy


def test_an_event_that_cannot_be_read_is_an_error(store: LocalStore, tmp_path: Path) -> None:
    store.append(event(1))
    (tmp_path / "events" / "000000000001.json").write_bytes(b"")
    with pytest.raises(StoreError, match=r"000000000001\.json cannot be read"):
        store.events()
    (tmp_path / "events" / "000000000001.json").unlink()
    (tmp_path / "events" / "000000000001.json").mkdir()
    with pytest.raises(StoreError, match="cannot be read"):
        store.events()


def test_what_is_no_event_is_left_alone(store: LocalStore, tmp_path: Path) -> None:
    store.append(event(1))
    for name in (".tmp-half-written", "notes.txt", "1.json", "000000000002.json.bak"):
        (tmp_path / "events" / name).write_text("{")
    assert store.events() == [event(1)]


def test_a_store_is_named_by_a_file_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url, root in (("file:a/b", "a/b"), (f"file:{tmp_path}/c", "c"), (f"file://{tmp_path}/d", "d")):
        assert LocalStore.open(url).append(event(1))
        assert (tmp_path / root / "events").is_dir()
    for url in ("", "a/b", "file:", "s3://bucket/prompts"):
        with pytest.raises(StoreError, match="PRELUDE_STORE") as caught:
            LocalStore.open(url)
        assert caught.value.remedy == "Use file:PATH."


def test_a_store_that_cannot_be_made_says_where_one_could_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be made") as caught:
        LocalStore(tmp_path / "file" / "store")
    assert "PRELUDE_STORE" in caught.value.remedy
