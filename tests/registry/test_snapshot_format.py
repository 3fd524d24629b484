"""The format of snapshots: what older Preludes wrote is read, and damage is found."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from server.registry.log_snapshots import UNREADABLE, check, decode, encode
from server.registry.registry import Registry
from server.soft_prompts.manifest import Manifest
from tests.registry.shelf import Shelf, content, put


def filled(shelf: Shelf) -> Registry:
    """A registry with tasks of one and of several versions, a canary, an inbox and a deleted task."""
    registry = shelf.open()
    for seed in range(12):
        put(registry, f"task-{seed % 8}", content(seed, description=f"task {seed}", labels=["a", "b"]))
    about = {"description": "x" * 2000, "metrics": {"f1": 1}, "base_model": {"name": "m", "fingerprint": "f1"}}
    registry.publish("told", [content(20, **about)], "inbox", by="host:/prompts")
    registry.set_traffic("task-1", {1: 30, 2: 70})
    registry.delete("task-5")
    return registry


def lines_of(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(data).splitlines()]


def file_of(lines: list[dict[str, Any]]) -> bytes:
    return gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def of_older_prelude(data: bytes) -> bytes:
    """A snapshot as it was before it told of summaries."""
    lines = lines_of(data)
    del lines[0]["summaries"]
    return file_of([{"manifest": line["manifest"]} if "manifest" in line else line for line in lines])


def test_a_snapshot_of_an_older_prelude_is_read(shelf: Shelf) -> None:
    registry = filled(shelf)
    older = decode(of_older_prelude(encode(registry._state)))
    assert older.tasks == registry._state.tasks
    assert encode(older) == encode(registry._state), "with the summaries that it did not tell of"


def test_a_start_from_a_snapshot_parses_no_manifest(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = filled(shelf)
    data = encode(registry._state)
    shelf.objects.objects = {key: value for key, value in shelf.objects.objects.items() if "events" not in key}
    shelf.objects.objects[f"snapshots/{registry.last_event:012d}.json.gz"] = data
    monkeypatch.setattr(Manifest, "parse", lambda _: pytest.fail("a manifest is parsed"))
    opened = shelf.open()
    for task, before in zip(opened.tasks(), registry.tasks(), strict=True):
        for number, version in task.versions.items():
            assert version.content.about == before.versions[number].content.about
    assert encode(opened._state) == data


def test_summaries_of_another_kind_are_made_again(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "a", content(1, description="right"))
    lines = lines_of(encode(registry._state))
    lines[0]["summaries"] += 1
    lines[1]["description"] = "wrong"
    read = decode(file_of(lines))
    assert read.tasks["a"].versions[1].content.about.description == "right"


def test_a_manifest_that_cannot_be_read_is_tried_again_at_the_next_start(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "a", content(1))
    lines = lines_of(encode(registry._state))
    lines[1] = {"manifest": '{"labels":7}'}
    read = decode(file_of(lines))
    assert read.tasks["a"].versions[1].content.about.problem is not None
    assert "identity" not in lines_of(encode(read))[1]


def test_what_a_check_of_a_snapshot_accepts_can_be_read(shelf: Shelf) -> None:
    whole = encode(filled(shelf)._state)
    lines = lines_of(whole)
    assert check(whole) == decode(whole).last_event
    no_text = [{**line, "manifest": 7} if "manifest" in line else line for line in lines]
    fewer, no_version = lines[:-1], [{**line, "versions": [{}]} if "versions" in line else line for line in lines]
    for damaged in (b"", whole[:-10], b"x" * 100, file_of(no_text), file_of(fewer), file_of(no_version)):
        for read in (check, decode):
            with pytest.raises(UNREADABLE):
                read(damaged)
