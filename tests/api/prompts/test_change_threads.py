"""Changes of tasks while the store hangs: each is answered in bounded time, and nothing else waits for it."""

from __future__ import annotations

import threading
import time

import pytest

from server.api.prompts import change_threads
from server.errors import StoreTimeout
from server.registry import bounded
from server.registry.objects import LocalObjects
from tests.api.live import LiveServer, assert_error, wait_until


def test_a_change_that_the_store_does_not_answer_is_told_so_in_time(
    own_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_server.publish_random("hangs", 1)
    answers, create = threading.Event(), LocalObjects.create

    def hang(objects: LocalObjects, key: str, data: bytes) -> bool:
        assert answers.wait(30)
        return create(objects, key, data)

    monkeypatch.setattr(LocalObjects, "create", hang)
    monkeypatch.setattr(change_threads, "CHANGE_SECONDS", 0.3)
    monkeypatch.setattr(bounded, "WAIT_SECONDS", 0.3)
    try:
        assert_error(own_server.client.delete("/prompts/hangs"), 503, "store_timeout", "within")
        assert own_server.client.get("/prompts/hangs").status_code == 200
        assert own_server.generate("hello", "hangs").status_code == 200
        started = time.monotonic()
        with pytest.raises(StoreTimeout, match="Another change"):
            own_server.registry.delete("hangs")
        assert time.monotonic() - started < 10
    finally:
        answers.set()
    wait_until(lambda: own_server.client.get("/prompts/hangs").status_code == 404, 10)


def test_what_a_change_raises_in_time_is_what_the_client_reads(own_server: LiveServer) -> None:
    assert_error(own_server.client.delete("/prompts/nobody"), 404, "unknown_task")
