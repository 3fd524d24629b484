"""Soft prompts in host memory: within a budget, each read once however many ask, nothing kept that was deleted."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import VersionUnavailable
from server.registry.events import VersionContent, content_of
from server.registry.host_cache import LOADERS, HostCache, size_of
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.api.live import wait_until
from tests.registry.shelf import content

PATIENCE = 10.0
PROMPTS = [content(seed) for seed in range(4)]
CONTENTS = [content_of(soft_prompt, f"blob {seed}") for seed, soft_prompt in enumerate(PROMPTS)]
ONE = size_of(PROMPTS[0])


class Shelves:
    """What the cache reads from: blobs that can be missing, and a door that can be shut."""

    def __init__(self) -> None:
        self.blobs = {known.blob: soft_prompt for known, soft_prompt in zip(CONTENTS, PROMPTS, strict=True)}
        self.wanted = {soft_prompt.digest for soft_prompt in PROMPTS}
        self.reads: list[str] = []
        self.entered = threading.Event()
        self.door = threading.Event()
        self.door.set()

    def load(self, known: VersionContent) -> SoftPrompt:
        self.reads.append(known.blob)
        self.entered.set()
        assert self.door.wait(PATIENCE)
        if known.blob not in self.blobs:
            raise VersionUnavailable(f"{known.blob} is missing")
        return self.blobs[known.blob]

    def cache(self, budget: int = 10 * ONE) -> HostCache:
        return HostCache(budget, self.load, lambda digest: digest in self.wanted)


@pytest.fixture
def shelves() -> Shelves:
    return Shelves()


def kept(cache: HostCache) -> list[int]:
    return [seed for seed, soft_prompt in enumerate(PROMPTS) if soft_prompt.digest in cache]


def result(future: Future[SoftPrompt]) -> SoftPrompt:
    return future.result(PATIENCE)


def test_the_least_recently_used_leave_first_and_the_budget_is_kept(shelves: Shelves) -> None:
    cache = shelves.cache(2 * ONE)
    for seed in (0, 1):
        cache.put(PROMPTS[seed])
    assert cache.get(PROMPTS[0].digest) is PROMPTS[0]
    cache.put(PROMPTS[2])
    assert kept(cache) == [0, 2]
    cache.put(PROMPTS[0])
    result(cache.fetch(CONTENTS[3]))
    assert kept(cache) == [0, 3]
    assert (cache.num_bytes, len(cache)) == (2 * ONE, 2)


def test_the_newest_stays_even_if_it_is_larger_than_the_budget(shelves: Shelves) -> None:
    cache = shelves.cache(1)
    for soft_prompt in PROMPTS:
        cache.put(soft_prompt)
    assert kept(cache) == [3]
    assert cache.num_bytes == ONE


def test_what_is_kept_twice_or_dropped_twice_is_counted_once(shelves: Shelves) -> None:
    cache = shelves.cache()
    for _ in range(2):
        cache.put(PROMPTS[0])
        cache.put(content(0))
    assert cache.num_bytes == ONE
    for _ in range(2):
        cache.drop(PROMPTS[0].digest)
    assert (cache.num_bytes, len(cache)) == (0, 0)


def test_a_hundred_who_ask_at_once_read_once(shelves: Shelves) -> None:
    cache = shelves.cache()
    shelves.door.clear()
    futures = [cache.fetch(CONTENTS[0]) for _ in range(100)]
    other = cache.fetch(CONTENTS[1])
    shelves.door.set()
    assert all(result(future) is PROMPTS[0] for future in futures)
    assert result(other) is PROMPTS[1]
    assert result(cache.fetch(CONTENTS[0])) is PROMPTS[0]
    assert sorted(shelves.reads) == ["blob 0", "blob 1"]
    assert (cache.loads, cache.hits) == (2, 0)


def test_whoever_wants_to_know_is_told_how_long_each_read_took(shelves: Shelves) -> None:
    cache, seconds = shelves.cache(), list[float]()
    cache.on_load = seconds.append
    shelves.blobs.pop("blob 1")
    for known in (CONTENTS[0], CONTENTS[0], CONTENTS[1]):
        wait([cache.fetch(known)])
    assert len(seconds) == cache.loads == 1
    assert 0 < seconds[0] < PATIENCE


def test_a_failure_is_told_to_all_who_wait_and_not_remembered(shelves: Shelves) -> None:
    cache = shelves.cache()
    missing = shelves.blobs.pop("blob 0")
    shelves.door.clear()
    futures = [cache.fetch(CONTENTS[0]) for _ in range(3)]
    shelves.door.set()
    for future in futures:
        with pytest.raises(VersionUnavailable):
            result(future)
    assert (cache.loads, cache.failures, len(cache)) == (0, 1, 0)
    shelves.blobs["blob 0"] = missing
    assert result(cache.fetch(CONTENTS[0])) is PROMPTS[0]
    assert cache.loads == 1


def test_a_bug_while_loading_ends_nobodys_wait_in_silence(shelves: Shelves, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = shelves.cache()

    def fail(soft_prompt: SoftPrompt) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(cache, "put", fail)
        with pytest.raises(MemoryError):
            result(cache.fetch(CONTENTS[0]))
    assert result(cache.fetch(CONTENTS[0])) is PROMPTS[0]


def test_a_missing_blob_takes_no_whole_one_of_the_same_content_with_it(shelves: Shelves) -> None:
    cache = shelves.cache()
    shelves.door.clear()
    missing, whole = cache.fetch(replace(CONTENTS[0], blob="gone")), cache.fetch(CONTENTS[0])
    shelves.door.set()
    assert result(whole) is PROMPTS[0]
    with pytest.raises(VersionUnavailable):
        result(missing)


def delete_for_good(shelves: Shelves, cache: HostCache) -> None:
    shelves.wanted.clear()
    cache.drop(PROMPTS[0].digest)


def delete_without_notice(shelves: Shelves, cache: HostCache) -> None:
    shelves.wanted.clear()


@pytest.mark.parametrize("delete", [delete_for_good, delete_without_notice])
def test_what_is_deleted_while_it_is_loaded_is_answered_and_not_kept(
    shelves: Shelves, delete: Callable[[Shelves, HostCache], None]
) -> None:
    cache = shelves.cache()
    shelves.door.clear()
    future = cache.fetch(CONTENTS[0])
    assert shelves.entered.wait(PATIENCE)
    delete(shelves, cache)
    shelves.door.set()
    assert result(future) is PROMPTS[0], "who began with it may finish with it"
    assert len(cache) == 0
    cache.put(PROMPTS[0])
    assert (len(cache), cache.num_bytes) == (0, 0), "nor is what a slow publish brings after the delete"


async def test_who_hangs_up_cancels_nobody_else(shelves: Shelves) -> None:
    cache = shelves.cache()
    shelves.door.clear()
    filling = [cache.fetch(replace(CONTENTS[1], blob=f"{i}")) for i in range(8)]  # every loader has something to do

    async def ask() -> SoftPrompt:
        return await asyncio.wrap_future(cache.fetch(CONTENTS[0]))

    impatient, patient = asyncio.create_task(ask()), asyncio.create_task(ask())
    await asyncio.sleep(0.01)
    impatient.cancel()
    assert not cache.fetch(CONTENTS[0]).cancel()
    await asyncio.sleep(0.01)
    shelves.door.set()
    assert await asyncio.wait_for(patient, PATIENCE) is PROMPTS[0]
    with pytest.raises(asyncio.CancelledError):
        await impatient
    wait(filling, PATIENCE)
    assert result(cache.fetch(CONTENTS[0])) is PROMPTS[0]
    assert shelves.reads.count("blob 0") == 1


LOAD_FOR_EVER = """
import threading
import torch
from server.registry.events import content_of
from server.registry.host_cache import HostCache
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
soft_prompt = SoftPrompt("PROMPT_TUNING", torch.zeros(1, 8), Manifest())
begun = threading.Event()
def hang(known):
    begun.set()
    threading.Event().wait()
HostCache(2**20, hang, lambda digest: True).fetch(content_of(soft_prompt, "blob"))
assert begun.wait(30)
"""
"""Begins to load what never comes, and ends. It imports no model, which would take five seconds."""


def test_a_store_that_does_not_answer_keeps_no_process_from_its_end() -> None:
    command = [sys.executable, "-c", LOAD_FOR_EVER]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], check=False, timeout=60).returncode == 0


def test_loaders_end_when_there_is_nothing_to_load(shelves: Shelves) -> None:
    cache = shelves.cache()
    for seed in range(3):
        result(cache.fetch(CONTENTS[seed]))
    wait_until(lambda: not any(thread.name.startswith("soft-prompts") for thread in threading.enumerate()))
    assert result(cache.fetch(CONTENTS[3])) is PROMPTS[3]


def test_no_more_are_read_at_once_than_there_are_loaders(shelves: Shelves) -> None:
    cache = shelves.cache()
    shelves.door.clear()
    futures = [cache.fetch(replace(CONTENTS[0], blob=f"{i}")) for i in range(3 * LOADERS)]
    wait_until(lambda: len(shelves.reads) == LOADERS)
    time.sleep(0.1)
    assert len(shelves.reads) == LOADERS
    shelves.door.set()
    wait(futures, PATIENCE)
    assert len(shelves.reads) == 3 * LOADERS


def test_a_slow_read_makes_no_reader_of_memory_wait(shelves: Shelves) -> None:
    cache = shelves.cache()
    cache.put(PROMPTS[1])
    shelves.door.clear()
    loading = cache.fetch(CONTENTS[0])
    assert shelves.entered.wait(PATIENCE)
    assert cache.get(PROMPTS[1].digest) is PROMPTS[1]
    assert cache.fetch(CONTENTS[1]).done()
    assert cache.get(PROMPTS[0].digest) is None
    assert cache.hits == 1
    shelves.door.set()
    assert result(loading) is PROMPTS[0]
