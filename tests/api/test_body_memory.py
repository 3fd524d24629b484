from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import Any

import pytest

from server.api.bodies import BoundedRequest
from server.api.body_sizes import FORM_BYTES, FREE_BYTES, BodyLimit
from server.errors import Overloaded, PayloadTooLarge
from tests.api.body_limits import DISK, HUGE, MEMORY
from tests.api.live import LiveServer


class _Under:
    """Requests under way behind one limit on what bodies hold together."""

    def __init__(self, memory: int, disk: int = DISK) -> None:
        self.limit = BodyLimit(self._app, HUGE, memory, disk, ["/training/jobs"])
        self.answered = asyncio.Event()

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        await self.answered.wait()

    def begin(
        self, size: int, kind: bytes = b"application/json", *, key: str | None = None, path: str = "", declared: int = 0
    ) -> asyncio.Task[None]:
        sent = [{"type": "http.request", "body": bytes(size // 2), "more_body": more} for more in (True, False)]

        async def receive() -> Any:
            await asyncio.sleep(0)
            return sent.pop(0)

        async def send(message: Any) -> None: ...

        path = path or ("/generate" if kind == b"application/json" else "/training/jobs")
        headers = [(b"content-type", kind), (b"content-length", b"%d" % declared)]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "state": {"key_id": key}}
        return asyncio.ensure_future(self.limit(scope, receive, send))


async def test_what_all_bodies_hold_is_bounded_and_small_ones_always_pass() -> None:
    size, multipart = 2**19, b"multipart/form-data; boundary=x"
    under = _Under(4 * (size - FREE_BYTES))
    many = [under.begin(size) for _ in range(100)]
    small = [under.begin(FREE_BYTES) for _ in range(100)]
    form = under.begin(2 * FORM_BYTES, multipart)
    await asyncio.sleep(0.05)
    refused = [task.exception() for task in [*many, form] if task.done()]
    assert len(refused) >= 97
    assert all(isinstance(error, Overloaded) for error in refused)
    assert not any(task.done() for task in small)
    under.answered.set()
    await asyncio.gather(*many, *small, form, return_exceptions=True)
    await under.begin(3 * size)  # all of it has been given back
    await under.begin(200 * FORM_BYTES, multipart)


async def test_a_form_holds_no_more_than_is_kept_in_memory() -> None:
    under = _Under(2 * FORM_BYTES)
    forms = [under.begin(100 * FORM_BYTES, b"multipart/form-data; boundary=x") for _ in range(2)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in forms)
    under.answered.set()
    await asyncio.gather(*forms)


async def test_a_body_that_only_calls_itself_a_form_holds_all_that_it_has() -> None:
    under = _Under(4 * FORM_BYTES)
    kind = b"multipart/form-data; boundary=x"
    bodies = [under.begin(2 * FORM_BYTES, kind, path="/v1/completions") for _ in range(10)]
    await asyncio.sleep(0.05)
    assert sum(task.done() for task in bodies) == 8
    under.answered.set()
    await asyncio.gather(*bodies, return_exceptions=True)


async def test_the_files_of_all_forms_take_bounded_disk_and_small_forms_always_pass() -> None:
    size, kind = 2**20 + FREE_BYTES, b"multipart/form-data; boundary=x"
    under = _Under(MEMORY, disk=4 * 2**20)
    forms = [under.begin(size, kind) for _ in range(20)]
    small = [under.begin(FREE_BYTES, kind) for _ in range(20)]
    await asyncio.sleep(0.05)
    refused = [task.exception() for task in forms if task.done()]
    assert len(refused) == 16
    assert all(isinstance(error, Overloaded) for error in refused)
    assert not any(task.done() for task in small)
    under.answered.set()
    await asyncio.gather(*forms, *small, return_exceptions=True)
    await under.begin(4 * 2**20, kind)  # all of it has been given back
    with pytest.raises(PayloadTooLarge, match="PRELUDE_FORM_DISK"):
        await under.begin(4 * 2**20 + 2 * FREE_BYTES, kind)


async def test_a_key_leaves_a_part_of_the_disk_to_the_next_one() -> None:
    size, kind = 2**20 + FREE_BYTES, b"multipart/form-data; boundary=x"
    under = _Under(MEMORY, disk=12 * 2**20)
    greedy = [under.begin(size, kind, key="a") for _ in range(20)]
    await asyncio.sleep(0.05)
    assert sum(not task.done() for task in greedy) == 6
    second = [under.begin(size, kind, key="b") for _ in range(20)]
    await asyncio.sleep(0.05)
    assert sum(not task.done() for task in second) == 4
    third = [under.begin(size, kind, key="c") for _ in range(20)]
    await asyncio.sleep(0.05)
    assert sum(not task.done() for task in third) == 2
    with pytest.raises(PayloadTooLarge):
        await under.begin(0, kind, key="d", declared=8 * 2**20)
    under.answered.set()
    await asyncio.gather(*greedy, *second, *third, return_exceptions=True)
    await under.begin(5 * 2**20, kind, key="a")


async def test_a_form_that_cannot_fit_is_refused_before_it_is_sent() -> None:
    kind = b"multipart/form-data; boundary=x"
    under = _Under(MEMORY, disk=4 * 2**20)
    waiting = under.begin(3 * 2**20, kind)
    await asyncio.sleep(0.05)
    with pytest.raises(Overloaded):
        await under.begin(0, kind, declared=2 * 2**20)
    with pytest.raises(PayloadTooLarge):
        await under.begin(0, kind, declared=5 * 2**20)
    under.answered.set()
    await waiting


def test_a_body_beyond_what_all_may_hold_is_told_when_to_come_again(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BodyLimit, "_hold", _full)
    for content in (json.dumps({"inputs": "x"}), json.dumps({"inputs": "x" * 2 * FREE_BYTES})):
        for path in ("/generate", "/v1/completions", "/training/jobs"):
            headers = {"Content-Type": "application/json"}
            reply = server.client.post(path, content=content, headers=headers)
            if len(content) > FREE_BYTES:
                assert (reply.status_code, reply.headers["retry-after"]) == (429, "1"), path
            else:
                assert reply.status_code != 429


def _full(self: BodyLimit, more: int) -> None:
    if more > 0:
        raise Overloaded("It is full.")


async def test_a_body_is_read_without_a_second_copy_and_parsed_without_one() -> None:
    piece, count = b"a" * 2**16, 64

    async def receive() -> dict[str, Any]:
        nonlocal count
        count -= 1
        return {"type": "http.request", "body": piece, "more_body": count > 0}

    size = count * len(piece)
    request = BoundedRequest({"type": "http", "headers": []}, receive)
    tracemalloc.start()
    try:
        body = await request.body()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(body) == size
    assert peak < 1.5 * size
    assert type(body) is bytes  # the parser copies any other kind
