"""Uploads that dice have damaged, over HTTP: taken or refused, and whatever is served stays as it is."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.api.live import LiveServer, as_form, assert_error
from tests.mutations import Files, make_zip, mutate_bytes, mutate_files, mutate_zip, tiny_corpus
from tests.soak import Soak

LIVE, FUZZ = "fuzz-live", "fuzz-new"
TAKEN, REFUSED = {200, 201}, {400, 409, 413, 422}
SLOW = 3.0

CONTENT_TYPES = (
    *('multipart/form-data; boundary="{}"', "multipart/form-data; boundary={}x", "multipart/form-data; boundary="),
    *("multipart/form-data", "multipart/form-data; charset=utf-7; boundary={}", "multipart/mixed; boundary={}"),
    *("multipart/form-data; boundary={}; boundary=x", "MULTIPART/FORM-DATA; BOUNDARY={}", "application/json"),
    *("application/zip", "application/x-www-form-urlencoded", "multipart/form-data; boundary=" + "x" * 300),
)


@pytest.fixture(scope="module")
def corpus(server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> list[Files]:
    """Soft prompts that would be taken."""
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The server's temporary folder, in which nothing may stay."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def state(server: LiveServer) -> object:
    """What may not change."""
    listed = server.client.get("/prompts", params={"limit": 1000}).json()
    answers = [server.text(text, LIVE, max_new_tokens=12) for text in ("hello", "x" * 40)]
    return listed, answers, server.text("hello", max_new_tokens=12)


def damaged_request(dice: random.Random, files: Files) -> httpx.Request:
    """An upload that is damaged in its files, its zip, its form, or what it says of its form."""
    where = dice.choice(("files", "zip", "form", "form", "type"))
    if where == "files":
        files = mutate_files(dice, files)
    elif where == "zip" or dice.random() < 0.2:
        files = {"f.zip": mutate_zip(dice, make_zip(dice, files))}
    whole = httpx.Request("PUT", "http://127.0.0.1", files=as_form(files))
    body, content_type = whole.read(), whole.headers["Content-Type"]
    if where == "form":
        body = mutate_bytes(dice, body, dice.choice((150, 600, None)))
    elif where == "type":
        content_type = dice.choice(CONTENT_TYPES).format(content_type.partition("boundary=")[2])
    pieces = [body[i : i + 5000] for i in range(0, len(body), 5000)]
    content = iter(pieces) if dice.random() < 0.5 else body  # chunked, or with its length
    return httpx.Request("PUT", "http://127.0.0.1", content=content, headers={"Content-Type": content_type})


@pytest.mark.soak
def test_damaged_uploads_are_refused_and_change_nothing(
    soak: Soak, server: LiveServer, corpus: list[Files], temporary: Path, tmp_path: Path
) -> None:
    server.publish_random(LIVE, seed=5)
    before = state(server)
    statuses: dict[int, int] = {}

    def send(dice: random.Random) -> None:
        request = damaged_request(dice, dice.choice(corpus))
        started = time.monotonic()
        response = server.client.send(
            server.client.build_request("PUT", f"/prompts/{FUZZ}", content=request.stream, headers=request.headers)
        )
        assert time.monotonic() - started < SLOW
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        if response.status_code in TAKEN:
            for entry in response.json()["tasks"]:
                assert server.client.delete(f"/prompts/{entry['task']}").status_code == 204
        else:
            assert response.status_code in REFUSED, response.text
            assert_error(response, response.status_code, response.json()["code"])

    for _ in range(soak.count(20, 300)):
        send(soak.random)
    rss = psutil.Process().memory_info().rss
    rounds = soak.count(60, 3000)
    for _ in soak.rounds(60, 3000, "damaged uploads"):
        send(soak.random)
    grown = psutil.Process().memory_info().rss - rss
    assert not soak.full or grown < 8192 * rounds, f"{grown:,} bytes"  # what was taken is kept in the fold of events
    assert state(server) == before
    assert statuses[422] > rounds / 10
    assert statuses[400] > rounds / 20
    assert statuses.get(201, 0) > rounds / 50


@pytest.mark.soak
def test_a_form_that_ends_anywhere_is_refused_or_whole(
    soak: Soak, server: LiveServer, corpus: list[Files], temporary: Path
) -> None:
    files = next(files for files in corpus if len(files) == 3)
    whole = httpx.Request("PUT", "http://127.0.0.1", files=as_form(files))
    body, content_type = whole.read(), whole.headers["Content-Type"]
    closed = len(body) - 2  # the line break behind the closing boundary is no part of the form
    for i in soak.rounds(40, 1500, "cut forms"):
        at = soak.random.choice((soak.random.randrange(len(body)), closed - soak.random.randrange(60)))
        at = closed if i == 0 else at
        piece = body[:at]
        content = iter([piece[: at // 2], piece[at // 2 :]]) if i % 2 else piece
        response = server.client.put(f"/prompts/{FUZZ}", content=content, headers={"Content-Type": content_type})
        if at >= closed:
            assert response.status_code == 201, response.text
            assert server.client.delete(f"/prompts/{FUZZ}").status_code == 204
        else:
            assert_error(response, 400, "invalid_request")
    assert server.client.get(f"/prompts/{FUZZ}").status_code == 404
