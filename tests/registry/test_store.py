"""Blobs and events in a place for objects: numbered without a hole, whole or refused, garbage collected late."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from server.contracts import ModelSpec
from server.errors import StoreError
from server.registry.events import Delete, Event
from server.registry.registry import Registry
from server.registry.store import ABANDONED_SECONDS, Store
from server.soft_prompts.manifest import Manifest
from tests.registry.fakes import MemoryObjects
from tests.registry.shelf import put_blob
from tests.support import random_kv_prompt, random_soft_prompt


@pytest.fixture
def objects() -> MemoryObjects:
    return MemoryObjects()


def event(number: int, task: str = "task") -> Event:
    return Event(number, "now", "api", None, Delete(task))


def test_of_two_writers_one_wins_a_number_and_the_other_is_told(objects: MemoryObjects) -> None:
    assert Store(objects).append(event(1, "first"))
    assert not Store(objects).append(event(1, "second"))
    assert Store(objects).events() == [event(1, "first")]


def test_a_write_that_is_sent_twice_is_one_event(objects: MemoryObjects) -> None:
    assert Store(objects).append(event(1))
    assert Store(objects).append(event(1)), "it finds itself"
    assert len(Store(objects).events()) == 1


def test_later_events_are_read_one_by_one(objects: MemoryObjects) -> None:
    store = Store(objects)
    for number in (1, 2, 3):
        store.append(event(number))
    assert store.events_after(1) == [event(2), event(3)]
    objects.reads.clear()
    assert store.events_after(3) == []
    assert sum(objects.reads.values()) == 1


@pytest.mark.parametrize("number", [1, 2])
def test_a_missing_event_is_an_error_that_names_it(objects: MemoryObjects, number: int) -> None:
    for written in (1, 2, 3):
        Store(objects).append(event(written))
    objects.delete(f"events/{number:012d}.json")
    with pytest.raises(StoreError, match=f"event {number} is missing") as caught:
        Store(objects).events()
    assert "backup" in caught.value.remedy


def test_an_event_under_another_number_is_an_error(objects: MemoryObjects) -> None:
    objects.create("events/000000000001.json", event(2).to_json())
    with pytest.raises(StoreError, match="says that it is number 2"):
        Store(objects).events()


def test_a_content_is_read_as_it_was_kept(objects: MemoryObjects, spec: ModelSpec) -> None:
    store = Store(objects)
    manifest = {"description": "Größe", "input_template": "{input}\n", "labels": ["a"]}
    for soft_prompt in (random_soft_prompt(spec, manifest=manifest), random_kv_prompt(spec)):
        content = put_blob(store, soft_prompt)
        read = store.get_blob(content)
        assert torch.equal(read.tensor, soft_prompt.tensor)
        assert (read.peft_type, read.manifest, read.digest) == (
            soft_prompt.peft_type,
            soft_prompt.manifest,
            soft_prompt.digest,
        )
        assert content.parse_manifest() == soft_prompt.manifest
        assert content.shape == tuple(soft_prompt.tensor.shape)


def test_rows_of_a_multitask_soft_prompt_keep_one_manifest_between_them(
    objects: MemoryObjects, spec: ModelSpec
) -> None:
    manifest = Manifest(description="long " * 1000, input_template="{input}!", labels=("a", "b"))
    rows = [replace(random_soft_prompt(spec, seed=n), manifest=manifest, is_multitask_row=True) for n in range(20)]
    registry = Registry(Store(objects), spec, 32)
    registry.publish("many", rows, "api")
    assert sum(data.count(b"long long") for data in objects.objects.values()) == pytest.approx(500, abs=10)
    for opened in (Registry(Store(objects), spec, 32), registry):
        contents = [opened.task(f"many-{n}").versions[1].content for n in range(20)]
        assert len({id(content.manifest) for content in contents}) == 1
        assert [Store(objects).get_blob(content).digest for content in contents] == [row.digest for row in rows]
        manifests = [Store(objects).get_blob(content).manifest for content in contents]
        assert manifests == [manifest] * 20


def test_equal_contents_have_blobs_of_their_own(objects: MemoryObjects, spec: ModelSpec) -> None:
    store = Store(objects)
    one, other = put_blob(store, random_soft_prompt(spec)), put_blob(store, random_soft_prompt(spec))
    store.remove_blobs([one])
    assert one.digest == other.digest
    assert store.get_blob(other).digest == other.digest
    with pytest.raises(StoreError, match="missing"):
        store.get_blob(one)


def test_a_damaged_blob_is_noticed(objects: MemoryObjects, spec: ModelSpec) -> None:
    store = Store(objects)
    content = put_blob(store, random_soft_prompt(spec, manifest={"labels": ["ham", "spam"]}))
    key = f"blobs/{content.blob}.safetensors"
    whole = objects.objects[key]
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damaged in (
        flipped,
        whole[:-1],
        b"",
        b"\0" * 40,
        whole.replace(b"ham", b"hum"),
        whole.replace(b"__meta", b"__mate"),
    ):
        objects.objects[key] = damaged
        with pytest.raises(StoreError, match=content.blob):
            store.get_blob(content)
    objects.objects[key] = whole
    assert store.get_blob(content).digest == content.digest
    with pytest.raises(StoreError, match="damaged"):
        store.get_blob(replace(content, digest="0" * 64))


def test_only_old_garbage_is_collected(objects: MemoryObjects, spec: ModelSpec) -> None:
    store = Store(objects)
    named, young, old = (put_blob(store, random_soft_prompt(spec, seed=seed)) for seed in range(3))
    objects.ages = {f"blobs/{content.blob}.safetensors": ABANDONED_SECONDS + 1 for content in (named, old)}
    assert store.missing_blobs([named.blob, "gone"]) == {"gone"}
    assert sorted(objects.blobs()) == sorted(f"{content.blob}.safetensors" for content in (named, young))


def test_a_store_that_may_only_be_read_keeps_its_garbage(objects: MemoryObjects, spec: ModelSpec) -> None:
    content = put_blob(Store(objects), random_soft_prompt(spec))
    objects.ages = {f"blobs/{content.blob}.safetensors": ABANDONED_SECONDS + 1}
    objects.fails = lambda action, key: action == "delete"
    assert Store(objects).missing_blobs([]) == set()
