from __future__ import annotations

import asyncio
import io
import random
import time
from typing import Any

import pytest
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from server.api import forms
from server.api.forms import MAX_FIELD_BYTES, MAX_FORM_PARTS
from server.errors import InvalidRequest, PayloadTooLarge
from tests.api.sent_bodies import read
from tests.soak import Soak


def part(name: str, content: bytes, filename: str | None = None, headers: bytes = b"") -> bytes:
    """A part of a form whose boundary is b."""
    file = "" if filename is None else f'; filename="{filename}"'
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n'.encode()
    return head + headers + b"\r\n" + content + b"\r\n"


END = b"--b--\r\n"


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
async def test_a_form_is_read_however_it_is_cut_into_pieces(size: int) -> None:
    content = b"\r\n--" * 50 + b"\r\n--a\r\n-" + bytes(range(256))
    body = part("data", content, "a.jsonl", b"Content-Type: text/plain\r\n") + part("task", "ä".encode()) + END
    form = await read(body + b"\r\n--b\r\nan epilogue", lambda: size)
    assert form["task"] == "ä"
    file = form["data"]
    assert isinstance(file, UploadFile)
    assert (file.filename, file.content_type, file.file.read()) == ("a.jsonl", "text/plain", content)
    await form.close()
    assert file.file.closed


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (part("a", b"") * (MAX_FORM_PARTS + 1) + END, f"more than {MAX_FORM_PARTS} parts"),
        (part("a", b"x" * (MAX_FIELD_BYTES + 1)) + END, "1,048,576 bytes"),
        (part("a", b"x" * (MAX_FIELD_BYTES // 2 + 1)) * 2 + END, "1,048,576 bytes"),
        (part("a" * 2000, b"") + END, "name of more than 1,024 bytes"),
        (part("a", b"", "f" * 2000) + END, "name of more than 1,024 bytes"),
        (part("a", b"", headers=b"X: " + b"x" * 100_000 + b"\r\n") + END, "cannot be read"),
        (part("a", b"", headers=b"X: x\r\n" * 1000) + END, "cannot be read"),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\n\r\n" + END, "has no name"),
        (b"--b\r\nContent-Disposition: form-data; name=a; filename*=UTF-8''%C3%A4\r\n\r\n\r\n" + END, "filename*"),
        (b"--b\r\nContent-Disposition: form-data; name=a; FileName*0=a\r\n\r\n\r\n" + END, "filename*"),
        (b"x" * 100_000, "cannot be read"),
        (part("a", b"x", "f"), "cut off"),
        (part("a", b"x", "f") + END[:-3], "cut off"),
        (b"", "cut off"),
    ],
    ids=range(14),
)
async def test_a_form_beyond_the_bounds_is_refused_and_leaves_no_file(
    body: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[io.BytesIO] = []

    def opened(**_: Any) -> io.BytesIO:
        files.append(io.BytesIO())
        return files[-1]

    monkeypatch.setattr(forms, "SpooledTemporaryFile", opened)
    with pytest.raises((InvalidRequest, PayloadTooLarge, HTTPException)) as refused:
        await read(part("first", b"x", "f") + body if body.startswith(b"--b") else body)
    assert said in str(getattr(refused.value, "detail", refused.value))
    assert all(file.closed for file in files)


async def test_the_event_loop_goes_on_while_a_form_is_read() -> None:
    body = part("data", b"\r\n--" * (3 * 2**20), "a") + END
    worst, last = 0.0, time.perf_counter()

    async def watch() -> None:
        nonlocal worst, last
        while True:
            await asyncio.sleep(0)
            worst, last = max(worst, time.perf_counter() - last), time.perf_counter()

    watching = asyncio.create_task(watch())
    form = await read(body, lambda: 2**24)
    watching.cancel()
    await form.close()
    assert worst < 1.0  # in one piece it takes several seconds


@pytest.mark.soak
async def test_a_form_is_whole_where_the_parser_comes_to_its_end(soak: Soak) -> None:
    dice = soak.random
    whole = cut = 0
    for _ in soak.rounds(100, 20_000, "forms"):
        boundary = dice.choice((b"x", b"----------------------------0123456789", b"a--b", b"q" * 70))
        body, contents = _form(dice, boundary)
        if dice.random() < 0.6:
            body = body[: dice.choice((dice.randrange(len(body)), len(body) - dice.randrange(12)))]
        parser = MultipartParser(boundary, {})
        try:
            parser.write(body)
        except FormParserError:
            continue
        try:
            form = await read(body, lambda: dice.choice((1, 1, 2, 3, 7, 1000)), boundary.decode())
        except HTTPException:
            assert parser.state != MultipartState.END, body
            cut += 1
            continue
        assert parser.state == MultipartState.END, body
        assert [item.file.read() for _, item in form.multi_items() if isinstance(item, UploadFile)] == contents
        await form.close()
        whole += 1
    assert min(whole, cut) > 10


def _form(dice: random.Random, boundary: bytes) -> tuple[bytes, list[bytes]]:
    """A form of files, and what is in them."""
    head = b'Content-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    # No content is the boundary itself: a body whose content contains it is broken for every parser.
    tricky = (b"\r\n", b"--", b"\r\n--", b"-", b"\r", b"data", b"\n--" + boundary[1:])
    contents = [b"".join(dice.choices(tricky, k=dice.randrange(6))) for _ in range(dice.randrange(1, 4))]
    body = b"".join(b"\r\n--" + boundary + b"\r\n" + head + content for content in contents)[2:]
    return body + b"\r\n--" + boundary + b"--\r\n" + dice.choice((b"", b"epilogue")), contents
