"""Several servers on one store: what one changes the others serve a moment later, warmed, and quietly."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from server.contracts import ModelSpec
from server.errors import UnknownTask
from server.registry.registry import Registry
from server.registry.store import Store
from server.registry.sync import Syncer
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.api.live import wait_until
from tests.registry.fakes import MemoryObjects, NotingEngine
from tests.support import random_soft_prompt

PATIENCE = 10.0
PERIOD = 0.1


class Pair:
    """Two servers on one store: `writer` changes it, `reader` looks."""

    def __init__(self, spec: ModelSpec) -> None:
        self.objects, self.engine = MemoryObjects(), NotingEngine()
        self.writer, self.reader = (Registry(Store(self.objects), spec, 32) for _ in range(2))
        self.reader.connect(self.engine)

    @contextmanager
    def syncing(self, seconds: float = PERIOD) -> Iterator[Syncer]:
        syncer = Syncer(self.reader, seconds)
        syncer.start()
        try:
            yield syncer
        finally:
            syncer.stop()
            wait_until(lambda: not syncer._thread.is_alive(), PATIENCE)

    def served(self, task: str) -> str | None:
        """What the reader answers with."""
        try:
            return self.reader.resolve(task).content.digest
        except UnknownTask:
            return None


@pytest.fixture
def pair(spec: ModelSpec) -> Pair:
    return Pair(spec)


@pytest.fixture
def soft_prompt(spec: ModelSpec) -> SoftPrompt:
    return random_soft_prompt(spec, seed=1)


def test_a_change_is_seen_within_the_period_and_warmed_before_it_is_live(pair: Pair, soft_prompt: SoftPrompt) -> None:
    live_while_warmed: list[str | None] = []
    pair.engine.on_warm = lambda warmed: live_while_warmed.append(pair.served("a"))
    with pair.syncing():
        began = time.monotonic()
        pair.writer.publish("a", [soft_prompt], "api")
        wait_until(lambda: pair.served("a") == soft_prompt.digest, PATIENCE)
        assert time.monotonic() - began < PERIOD + 1, "a second for a busy machine"
        assert pair.engine.warmed == [soft_prompt.prefix_hash]
        assert live_while_warmed == [None]
        pair.writer.delete("a")
        wait_until(lambda: pair.served("a") is None, PATIENCE)


def test_the_period_is_kept(pair: Pair) -> None:
    with pair.syncing(0.2):
        pair.objects.reads.clear()
        time.sleep(0.7)
        assert 1 <= pair.objects.reads.total() <= 4


def test_a_store_that_fails_for_a_while_is_asked_again_and_logged_once(
    pair: Pair, soft_prompt: SoftPrompt, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    def refuse(action: str, key: str) -> bool:
        asked.append(key)
        return True

    with caplog.at_level(logging.INFO, "server.registry.sync"), pair.syncing():
        pair.writer.publish("a", [soft_prompt], "api")
        wait_until(lambda: pair.served("a") is not None, PATIENCE)
        pair.objects.fails = refuse
        wait_until(lambda: len(asked) >= 3, PATIENCE)
        assert pair.served("a") == soft_prompt.digest, "what is live does not need the store"
        pair.objects.fails = lambda action, key: False
        pair.writer.delete("a")
        wait_until(lambda: pair.served("a") is None, PATIENCE)
        wait_until(lambda: len(caplog.records) == 2, PATIENCE)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "seen again" in caplog.messages[1]


def test_a_snapshot_that_takes_long_delays_no_change(
    pair: Pair, soft_prompt: SoftPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_written, is_waiting = threading.Event(), threading.Event()

    def write() -> None:
        is_waiting.set()
        assert is_written.wait(PATIENCE)

    monkeypatch.setattr(pair.reader, "compact", write)
    with pair.syncing():
        assert is_waiting.wait(PATIENCE)
        pair.writer.publish("a", [soft_prompt], "api")
        wait_until(lambda: pair.served("a") is not None, PATIENCE)
        is_written.set()


def test_a_bug_does_not_end_the_thread_nor_flood_the_log(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[float] = []

    def fail() -> None:
        calls.append(time.monotonic())
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(pair.reader, "sync", fail)
    with pair.syncing(0.01):
        wait_until(lambda: len(calls) >= 3, PATIENCE)
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info, "a bug is told with where it happened"


def test_stopping_waits_neither_for_the_period_nor_for_a_store_that_hangs(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pair.syncing(60) as syncer:
        began = time.monotonic()
        syncer.stop()
        assert not syncer._thread.is_alive()
        assert time.monotonic() - began < 0.7
    let_go, is_waiting = threading.Event(), threading.Event()

    def hang() -> None:
        is_waiting.set()
        assert let_go.wait(PATIENCE)

    monkeypatch.setattr(pair.reader, "sync", hang)
    with pair.syncing() as syncer:
        assert is_waiting.wait(PATIENCE)
        began = time.monotonic()
        syncer.stop()
        assert time.monotonic() - began < 2, "one second, and as much again for a busy machine"
        let_go.set()


def test_a_syncer_that_never_started_can_be_stopped(pair: Pair) -> None:
    Syncer(pair.reader, PERIOD).stop()
