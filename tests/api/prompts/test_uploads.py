"""Bad uploads: each gets a 4xx that says what is wrong and what to do, and changes nothing."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import pickle
import random
import socket
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from fastapi import UploadFile
from safetensors.torch import save

from server.api.prompts import uploads
from server.api.prompts.uploads import unpack_upload, unpacked_upload
from server.errors import InvalidSoftPrompt, StoreError, StoreFull
from tests.api.live import (
    MAX_UPLOAD_BYTES,
    Files,
    LiveServer,
    as_form,
    assert_error,
    live_server,
    wait_until,
    zip_of,
)
from tests.support import random_soft_prompt

CONFIG, TENSORS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
WIDTH = 32
LIVE = "uploads-live"


class _Explosive:
    """Unpickling one makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.mkdir, (self.marker,)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def good(server: LiveServer) -> Files:
    """Files that would be taken."""
    return server.files(random_soft_prompt(server.model.spec, seed=1))


@pytest.fixture(autouse=True)
def _no_temporary_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


@pytest.fixture(autouse=True)
def _nothing_changes(server: LiveServer, good: Files, _no_temporary_file_stays: None) -> Iterator[None]:
    """Whatever a test uploads: the tasks, the answers and the store are the same before and after."""
    server.put(LIVE, good)
    before = _state(server)
    yield
    assert _state(server) == before


def _state(server: LiveServer) -> object:
    store = server.settings.prompts_dir / ".store"
    return (
        server.client.get("/prompts", params={"limit": 1000}).json(),
        server.text("hello", LIVE, max_new_tokens=12),
        {path: path.stat().st_mtime_ns for path in sorted(store.rglob("*")) if path.is_file()},
    )


def _refused(server: LiveServer, files: Files | list[tuple[str, bytes]], *parts: str, code: str = "") -> None:
    """Uploaded over a live task and under a new name, both are refused with these words."""
    for task in (LIVE, "uploads-never"):
        response = server.client.put(f"/prompts/{task}", files=as_form(files))
        assert_error(response, 422, code or "invalid_soft_prompt", *parts)


@pytest.mark.parametrize(
    "body", [{"data": {"files": "text"}}, {"files": {"files": (None, b"text")}}, {"json": {}}, {"content": b"PK"}]
)
def test_an_upload_that_is_no_form_of_files_is_refused_in_the_users_words(
    server: LiveServer, body: dict[str, Any]
) -> None:
    response = server.client.put("/prompts/uploads-never", **body)
    assert_error(response, 422, "invalid_request", "must be a file of a multipart form, sent with a file name")


def _safetensors(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file by hand, whose header may say anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"prompt_embeddings": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HONEST = 5 * WIDTH * 4

TENSOR_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file: 0 bytes"),
    "seven bytes": (b"\0" * 7, "not a safetensors file"),
    "text": (b"hello world, this is no tensor", "not a safetensors file"),
    "html": (b"<html><body>404 Not Found</body></html>", "not a safetensors file"),
    "pickle": (pickle.dumps({"prompt_embeddings": [1.0] * 100}), "not a safetensors file"),
    "cut in the header": (_safetensors(_entry([5, WIDTH], [0, HONEST]), b"")[:40], "not a safetensors file"),
    "cut in the data": (_safetensors(_entry([5, WIDTH], [0, HONEST]), b"\0" * (HONEST - 1)), "damaged"),
    "data too long": (_safetensors(_entry([5, WIDTH], [0, HONEST]), b"\0" * (HONEST + 1)), "damaged"),
    "header claims 2^63": (_safetensors(_entry([5, WIDTH], [0, HONEST]), length=2**63), "its header claims"),
    "header claims more than the file": (_safetensors(b"{}", length=100), "its header claims 100"),
    "header is not JSON": (_safetensors(b"{nonsense}"), "damaged"),
    "header is deep": (_safetensors(b"[" * 50_000), "damaged"),
    "shape lies": (_safetensors(_entry([5, 2**50], [0, HONEST]), b"\0" * HONEST), "damaged"),
    "shape overflows": (_safetensors(_entry([2**32, 2**32], [0, HONEST]), b"\0" * HONEST), "damaged"),
    "shape is negative": (_safetensors(_entry([-5, -WIDTH], [0, HONEST]), b"\0" * HONEST), "damaged"),
    "offsets lie": (_safetensors(_entry([5, WIDTH], [0, 2**62]), b"\0" * HONEST), "damaged"),
    "offsets are reversed": (_safetensors(_entry([5, WIDTH], [HONEST, 0]), b"\0" * HONEST), "damaged"),
    "a terabyte is claimed": (_safetensors(_entry([2**33, WIDTH], [0, 2**40]), b"\0" * HONEST), "damaged"),
    "no tensor": (save({"other": torch.zeros(5, WIDTH)}), "no tensor 'prompt_embeddings'; it holds other"),
    "too wide": (save({"prompt_embeddings": torch.zeros(5, WIDTH + 1)}), f"[5, {WIDTH + 1}]"),
    "too narrow": (save({"prompt_embeddings": torch.zeros(5, WIDTH - 1)}), f"[num_virtual_tokens, {WIDTH}]"),
    "one dimension": (save({"prompt_embeddings": torch.zeros(5 * WIDTH)}), f"[{5 * WIDTH}]"),
    "three dimensions": (save({"prompt_embeddings": torch.zeros(1, 5, WIDTH)}), f"[1, 5, {WIDTH}]"),
    "a number": (save({"prompt_embeddings": torch.zeros(())}), "has shape []"),
    "other row count": (save({"prompt_embeddings": torch.zeros(6, WIDTH)}), "num_virtual_tokens 5"),
    "no rows": (save({"prompt_embeddings": torch.zeros(0, WIDTH)}), "0 virtual tokens"),
    "too many rows": (save({"prompt_embeddings": torch.zeros(600, WIDTH)}), "600 virtual tokens"),
    "rows beyond the context": (save({"prompt_embeddings": torch.zeros(200, WIDTH)}), "leave no room"),
    "integers": (save({"prompt_embeddings": torch.zeros(5, WIDTH, dtype=torch.int64)}), "dtype I64"),
    "doubles": (save({"prompt_embeddings": torch.zeros(5, WIDTH, dtype=torch.float64)}), "dtype F64"),
    "NaN": (save({"prompt_embeddings": torch.full((5, WIDTH), torch.nan)}), "virtual token 0 holds NaN"),
    "infinity": (save({"prompt_embeddings": torch.eye(5, WIDTH) * torch.inf}), "not finite"),
}


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_a_tensor_file_that_does_not_fit_is_refused(server: LiveServer, good: Files, name: str) -> None:
    content, part = TENSOR_FILES[name]
    _refused(server, {**good, TENSORS: content}, part)
    _refused(server, {"files.zip": zip_of({**good, TENSORS: content})}, part)


CONFIGS: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "adapter_config.json is not valid JSON", "invalid_soft_prompt"),
    "not JSON": (b"peft_type: PROMPT_TUNING", "adapter_config.json is not valid JSON", "invalid_soft_prompt"),
    "not UTF-8": (b'{"peft_type": "\xff"}', "adapter_config.json is not valid JSON", "invalid_soft_prompt"),
    "deep": (b"[" * 100_000, "adapter_config.json is not valid JSON", "invalid_soft_prompt"),
    "a list": (b"[]", "must hold a JSON object, not list", "invalid_soft_prompt"),
    "no type": (b"{}", "no peft_type", "invalid_soft_prompt"),
    "a type that is no string": (b'{"peft_type": ["LORA"]}', "no peft_type", "invalid_soft_prompt"),
    "LoRA": (b'{"peft_type": "LORA", "r": 8}', "'LORA' is not a soft prompt; served are", "unsupported_peft_type"),
    "IA3": (b'{"peft_type": "IA3"}', "'IA3'", "unsupported_peft_type"),
    "lower case": (b'{"peft_type": "prompt_tuning"}', "'prompt_tuning'", "unsupported_peft_type"),
    "encoder-decoder": (
        b'{"peft_type": "PROMPT_TUNING", "num_transformer_submodules": 2}',
        "num_transformer_submodules is 2",
        "unsupported_peft_type",
    ),
    "other rows": (b'{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 9}', "9", "invalid_soft_prompt"),
    "a KV prefix": (b'{"peft_type": "PREFIX_TUNING"}', "a PREFIX_TUNING soft prompt", "invalid_soft_prompt"),
    "too large": (b'{"peft_type": "PROMPT_TUNING"}' + b" " * 2**20, "larger than", "invalid_soft_prompt"),
    "half a surrogate pair": (rb'{"peft_type": "\ud800"}', "half of a surrogate pair", "invalid_soft_prompt"),
    "half a pair in an unused key": (
        rb'{"peft_type": "PROMPT_TUNING", "\ud800": 1}',
        "half of a surrogate pair",
        "invalid_soft_prompt",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_does_not_fit_is_refused(server: LiveServer, good: Files, name: str) -> None:
    content, part, code = CONFIGS[name]
    if len(content) > MAX_UPLOAD_BYTES:
        files: Files = {"files.zip": zip_of({CONFIG: content})}
        assert_error(server.put("uploads-never", files), 413, "payload_too_large")
        return
    _refused(server, {**good, CONFIG: content}, part, code=code)


@pytest.mark.parametrize(
    ("manifest", "part"),
    [
        (b"{", "manifest.json is not valid JSON"),
        (b'"text"', "must hold a JSON object, not str"),
        (b'{"input_template": "no field"}', "input_template"),
        (b'{"input_template": "{input}{input}"}', "exactly once"),
        (b'{"generation": {"max_tokens": 3}}', "generation.max_tokens"),
        (b'{"generation": {"temperature": -1}}', "generation.temperature"),
        (b'{"generation": {"temperature": NaN}}', "generation.temperature"),
        (b'{"labels": 3}', "labels"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(server: LiveServer, good: Files, manifest: bytes, part: str) -> None:
    _refused(server, {**good, MANIFEST: manifest}, part)


def test_a_soft_prompt_of_another_model_is_refused_and_both_named(server: LiveServer, good: Files) -> None:
    manifest = {"base_model": {"name": "big-llama", "fingerprint": "0123abcd"}}
    response = server.put(LIVE, {**good, MANIFEST: json.dumps(manifest).encode()})
    spec = server.model.spec
    assert_error(response, 409, "base_model_mismatch", "big-llama", "0123abcd", spec.name, spec.fingerprint)


@pytest.mark.parametrize("missing", [CONFIG, TENSORS])
def test_a_missing_file_is_named(server: LiveServer, good: Files, missing: str) -> None:
    files = {name: content for name, content in good.items() if name != missing}
    _refused(server, files, f"{missing} is missing")
    _refused(server, {"files.zip": zip_of(files)}, f"{missing} is missing")


@pytest.mark.parametrize("name", ["adapter_model.bin", "decoder.pt"])
def test_a_pickle_is_refused_unopened_with_a_way_to_convert_it(
    server: LiveServer, good: Files, tmp_path: Path, name: str
) -> None:
    marker = tmp_path / "exploded"
    explosive = pickle.dumps(_Explosive(marker))
    files = {CONFIG: good[CONFIG], name: explosive}
    for body in (files, {"files.zip": zip_of(files)}):
        response = server.put(LIVE, body)
        assert "save_pretrained" in assert_error(response, 422, "invalid_soft_prompt", name, "pickle")["remedy"]
    _refused(server, {**good, TENSORS: explosive}, "not a safetensors file")
    assert not marker.exists()


def test_an_unknown_file_is_refused_by_name(server: LiveServer, good: Files) -> None:
    _refused(server, {**good, "adapter_model.safetensor": b""}, "'adapter_model.safetensor'")
    _refused(server, {**good, "extra.zip": zip_of(good)}, "'extra.zip'")
    _refused(server, {"run.sh": b"#!/bin/sh"}, "'run.sh'")


def test_a_readme_is_no_error(server: LiveServer, good: Files) -> None:
    assert server.put(LIVE, {**good, "README.md": b"# mine"}).status_code == 200


def test_the_reply_names_every_file_that_was_not_used(server: LiveServer, good: Files) -> None:
    for name in ("README.md", "adapter_model.bin"):
        assert server.put(LIVE, {**good, name: b"more"}).json()["ignored"] == [name]
    packed = zip_of({**good, "tokenizer.json": b"{}", "checkpoint/optimizer.pt": b"x", "adapter_model.bin": b"x"})
    reply = server.put(LIVE, {"f.zip": packed}).json()
    assert reply["ignored"] == ["tokenizer.json", "optimizer.pt", "adapter_model.bin"]
    assert "ignored" not in server.put(LIVE, good).json()


def test_the_reply_names_what_the_files_say_and_nobody_uses(server: LiveServer, good: Files) -> None:
    config = {**json.loads(good[CONFIG]), "base_model_name_or_path": "mistralai/Mistral-7B-v0.1"}
    manifest = {name: value for name, value in json.loads(good[MANIFEST]).items() if name != "base_model"}
    files = {**good, CONFIG: json.dumps(config).encode(), MANIFEST: json.dumps({**manifest, "lables": []}).encode()}
    base, field = server.client.put(f"/prompts/{LIVE}?dry_run=true", files=as_form(files)).json()["warnings"]
    assert "Mistral-7B" in base
    assert "lables" in field
    assert "warnings" not in server.put(LIVE, good).json()


def test_a_zip_made_on_windows_is_taken(server: LiveServer, good: Files) -> None:
    entries: list[tuple[zipfile.ZipInfo | str, bytes]] = []
    for name, data in (("mine\\", b""), *((f"mine\\{name}", data) for name, data in good.items())):
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        entries.append((info, data))
    reply = server.put(LIVE, {"f.zip": _zip(entries)})
    assert reply.status_code == 200, reply.text
    assert "ignored" not in reply.json()


def test_a_zip_with_files_of_two_soft_prompts_is_refused(server: LiveServer, good: Files) -> None:
    files = {f"a/{CONFIG}": good[CONFIG], f"b/{TENSORS}": good[TENSORS]}
    _refused(server, {"f.zip": zip_of(files)}, "in 'a' and in 'b'")


def test_a_file_that_comes_twice_is_refused(server: LiveServer, good: Files) -> None:
    _refused(server, [*good.items(), (TENSORS, good[TENSORS])], f"{TENSORS} comes twice")
    _refused(server, [*good.items(), (f"b/{CONFIG}", good[CONFIG])], f"{CONFIG} comes twice")
    _refused(server, {"f.zip": zip_of({**good, f"b/{CONFIG}": good[CONFIG]})}, f"{CONFIG} comes twice")


def test_a_form_without_files_is_refused(server: LiveServer) -> None:
    boundary = {"Content-Type": "multipart/form-data; boundary=x"}
    for content, headers in (
        (b"--x--\r\n", boundary),
        (b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\ntext\r\n--x--\r\n', boundary),
        (b"files=1", {"Content-Type": "application/x-www-form-urlencoded"}),
        (b"{}", {"Content-Type": "application/json"}),
        (b"", {}),
    ):
        response = server.client.put(f"/prompts/{LIVE}", content=content, headers=headers)
        assert_error(response, 422, "invalid_request", "files")


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"", "multipart/form-data"),
        (b"", "multipart/form-data; boundary=x"),
        (b"no boundary at all", "multipart/form-data; boundary=x"),
        (
            b'--x\r\nContent-Disposition: form-data; filename="a"\r\n\r\n\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
        ),
    ],
)
def test_a_broken_form_is_the_clients_error(server: LiveServer, content: bytes, content_type: str) -> None:
    response = server.client.put(f"/prompts/{LIVE}", content=content, headers={"Content-Type": content_type})
    assert response.status_code in (400, 422)
    assert_error(response, response.status_code, "invalid_request")


def test_an_upload_that_breaks_off_publishes_nothing(server: LiveServer, good: Files) -> None:
    request = server.client.build_request("PUT", "/prompts/uploads-never", files=as_form(good))
    body = request.read()
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    for length in (0, len(body) // 2, len(body) - 4):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(f"PUT /prompts/uploads-never HTTP/1.1\r\n{head}\r\n".encode() + body[:length])
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert server.client.get("/prompts/uploads-never").status_code == 404


def _zip(entries: list[tuple[zipfile.ZipInfo | str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        f"../{CONFIG}",
        f"a/../../{CONFIG}",
        f"/{CONFIG}",
        f"/etc/{CONFIG}",
        f"..\\{CONFIG}",
        f"C:{CONFIG}",
        f"C:\\{CONFIG}",
        "../../evil",
        "/etc/passwd",
    ],
)
def test_a_zip_entry_that_leads_outside_is_refused(server: LiveServer, good: Files, name: str) -> None:
    info = zipfile.ZipInfo("placeholder")
    info.filename = name  # ZipInfo itself would mend some of them
    _refused(server, {"f.zip": _zip([*good.items(), (info, b"{}")])}, "leads outside")


def test_a_zip_with_a_link_is_refused(server: LiveServer, good: Files) -> None:
    for mode in (0o120777, 0o020666, 0o010644):  # a link, a device, a pipe
        link = zipfile.ZipInfo(TENSORS)
        link.external_attr = mode << 16
        entries: list[tuple[zipfile.ZipInfo | str, bytes]] = [(CONFIG, good[CONFIG]), (link, b"/etc/passwd")]
        _refused(server, {"f.zip": _zip(entries)}, "has a link or a device", TENSORS)


def test_a_zip_bomb_is_refused_while_it_unfolds(server: LiveServer, good: Files) -> None:
    bomb = zip_of({CONFIG: good[CONFIG], TENSORS: bytes(64 * MAX_UPLOAD_BYTES)})
    assert len(bomb) < MAX_UPLOAD_BYTES / 10
    assert_error(server.put(LIVE, {"f.zip": bomb}), 413, "payload_too_large", "unfold")


def test_a_zip_that_lies_about_a_size_is_refused(server: LiveServer, good: Files) -> None:
    real = len(good[TENSORS])
    honest = zip_of({TENSORS: good[TENSORS], CONFIG: good[CONFIG]})
    for claim in (0, 8, real - 1):
        lying = honest.replace(struct.pack("<I", real), struct.pack("<I", claim))
        assert lying != honest
        _refused(server, {"f.zip": lying})
    for claim in (real + 1, 2**31):  # more than there is: either refused, or what there is, which is live already
        lying = honest.replace(struct.pack("<I", real), struct.pack("<I", claim))
        assert server.put(LIVE, {"f.zip": lying}).status_code in (200, 422)
    size = 8 * MAX_UPLOAD_BYTES
    bomb = zip_of({TENSORS: bytes(size), CONFIG: good[CONFIG]})
    assert_error(server.put(LIVE, {"f.zip": bomb}), 413, "payload_too_large")
    for claim in (100, size // 16):
        lying = bomb.replace(struct.pack("<I", size), struct.pack("<I", claim))
        assert lying != bomb
        _refused(server, {"f.zip": lying})


def test_an_encrypted_zip_is_refused(server: LiveServer, good: Files) -> None:
    encrypted = bytearray(zip_of(good))
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := encrypted.find(magic, start + 1)) >= 0:
            encrypted[start + offset] |= 1
    _refused(server, {"f.zip": bytes(encrypted)}, "The zip is encrypted.")


def test_a_zip_with_too_many_entries_is_refused(server: LiveServer, good: Files) -> None:
    many = {**good, **{f"notes/{i}": b"" for i in range(100)}}
    _refused(server, {"f.zip": zip_of(many)}, f"{len(many)} entries")


def test_a_zip_whose_directory_is_huge_is_refused_before_it_is_read(server: LiveServer, good: Files) -> None:
    many = _zip([(f"{i}", b"") for i in range(3_000)], zipfile.ZIP_STORED)
    packed = zip_of(good)
    end = packed.rfind(b"PK\x05\x06")
    zip64 = packed[:end] + b"PK\x06\x07" + bytes(16) + packed[end:]  # points to a record that may say anything
    for content in (many, zip64):
        _refused(server, [("x.zip", content)], "at most 64")


def test_a_zip_entry_at_an_impossible_offset_is_refused(server: LiveServer, good: Files) -> None:
    packed = bytearray(zip_of(good))
    at = packed.rfind(b"PK\x01\x02")
    packed[at + 42 : at + 46] = b"\xff\xff\xff\xff"
    _refused(server, [("x.zip", bytes(packed))], "zip")


def test_a_zip_entry_without_a_name_is_no_error_of_the_server(server: LiveServer, good: Files) -> None:
    nameless = zipfile.ZipInfo("placeholder")
    nameless.filename = ""
    assert server.put(LIVE, {"f.zip": _zip([*good.items(), (nameless, b"x")])}).status_code in (200, 422)


def test_a_large_zip_with_an_impossible_offset_is_refused_too(tmp_path: Path, good: Files) -> None:
    # Over 1 MB an upload is a file, whose seek raises OSError where that of a smaller one's buffer raises ValueError.
    packed = bytearray(zip_of(good))
    end = packed.rfind(b"PK\x05\x06")
    packed[end + 16 : end + 20] = struct.pack("<I", end + 2000)  # the directory began before the zip does
    with tempfile.TemporaryFile() as file:
        file.write(packed)
        with pytest.raises(InvalidSoftPrompt, match="cannot be read"):
            unpack_upload([UploadFile(file, filename="x.zip")], tmp_path, MAX_UPLOAD_BYTES)


def test_entries_that_share_their_bytes_are_counted_as_often_as_they_are_taken(tmp_path: Path, good: Files) -> None:
    # One kernel of bytes, named by every entry: what unfolds is what is taken, and each name is taken once.
    packed = bytearray(zip_of({CONFIG: bytes(1000), TENSORS: b"", MANIFEST: b""}))
    at = -1
    while (at := packed.find(b"PK\x01\x02", at + 1)) >= 0:
        packed[at + 42 : at + 46] = bytes(4)
    with pytest.raises(InvalidSoftPrompt, match="cannot be read"):
        unpack_upload([UploadFile(io.BytesIO(packed), filename="x.zip")], tmp_path, MAX_UPLOAD_BYTES)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_is_packed_in_a_rare_way_is_refused(server: LiveServer, good: Files, compression: int) -> None:
    _refused(server, {"f.zip": _zip(list(good.items()), compression)}, "rare compression")


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"not a zip" * 100, zip_of({"x": b"y"})[:-30]], ids=["empty", "begun", "text", "cut"]
)
def test_what_is_not_a_zip_is_refused(server: LiveServer, content: bytes) -> None:
    _refused(server, {"f.zip": content}, "zip cannot be read")


def test_a_zip_without_the_files_is_refused(server: LiveServer) -> None:
    _refused(server, {"f.zip": zip_of({})}, f"{CONFIG} is missing")
    _refused(server, {"f.zip": zip_of({"notes.txt": b"hello"})}, f"{CONFIG} is missing")


def test_damage_at_any_byte_is_never_the_servers_error(own_server: LiveServer, good: Files) -> None:
    rng = random.Random(0)
    packed = zip_of(good)

    def damaged(content: bytes) -> bytes:
        broken = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        return bytes(broken[: rng.choice((len(broken), len(broken), rng.randrange(len(broken))))])

    replies: list[httpx.Response] = []
    for _ in range(100):
        replies.append(own_server.put("uploads-fuzz", {"f.zip": damaged(packed)}))
        header = 200  # most bytes are numbers, and other numbers are another soft prompt
        tensors = damaged(good[TENSORS][:header]) + good[TENSORS][header:]
        replies.append(own_server.put("uploads-fuzz", {**good, TENSORS: tensors, CONFIG: damaged(good[CONFIG])}))
    taken = {reply.status_code for reply in replies}
    assert taken <= {200, 201, 413, 422}, [reply.text for reply in replies if reply.status_code >= 500]
    assert 422 in taken
    for reply in replies:
        if reply.status_code >= 400:
            assert_error(reply, reply.status_code, reply.json()["code"])


# The temporary folder


SPOOLED = 2**20
"""Bytes of a file from which on Starlette keeps it on disk."""
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks for open files without a name")


def _open_temporary_files() -> list[str]:
    """Open files in the temporary folder; those of Starlette have no name there."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(link.readlink()))
    return [link for link in links if link.startswith(tempfile.gettempdir())]


@pytest.fixture
def roomy_server(tmp_path: Path) -> Iterator[LiveServer]:
    """One that takes uploads that are large enough to be spooled."""
    with live_server(tmp_path / "roomy", max_upload_bytes=64 * 2**20) as live:
        yield live


def _junk(size: int) -> Iterator[bytes]:
    """A form with a tensor file of so many bytes, which is no tensor file."""
    yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n' % CONFIG.encode()
    yield b'{"peft_type": "CPT"}\r\n'
    yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n' % TENSORS.encode()
    for _ in range(size // 2**16):
        yield bytes(2**16)
    yield b"\r\n--x--\r\n"


FORM = {"Content-Type": "multipart/form-data; boundary=x"}


def test_an_upload_goes_to_disk_and_not_into_memory(roomy_server: LiveServer) -> None:
    process = psutil.Process()
    assert roomy_server.client.put("/prompts/x", content=_junk(2 * SPOOLED), headers=FORM).status_code == 422
    before, peak = process.memory_info().rss, 0

    def watched() -> Iterator[bytes]:
        nonlocal peak
        for piece in _junk(60 * 2**20):
            peak = max(peak, process.memory_info().rss)
            yield piece

    response = roomy_server.client.put("/prompts/x", content=watched(), headers=FORM)
    peak = max(peak, process.memory_info().rss)
    assert_error(response, 422, "invalid_soft_prompt", "not a safetensors file")
    assert peak - before < 20 * 2**20


@needs_proc
def test_its_room_on_disk_is_free_again_after_success_and_refusal(roomy_server: LiveServer, good: Files) -> None:
    readme = {"README.md": bytes(2 * SPOOLED)}
    assert roomy_server.put("roomy", {**good, **readme}).status_code == 201
    wait_until(lambda: _open_temporary_files() == [])  # FastAPI closes them behind the reply
    assert roomy_server.client.put("/prompts/roomy", content=_junk(2 * SPOOLED), headers=FORM).status_code == 422
    wait_until(lambda: _open_temporary_files() == [])
    assert roomy_server.client.put("/prompts/roomy", content=_junk(80 * 2**20), headers=FORM).status_code == 413
    wait_until(lambda: _open_temporary_files() == [])


@needs_proc
def test_its_room_on_disk_is_free_again_when_the_client_goes_away(roomy_server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", roomy_server.port), timeout=5) as connection:
        head = "PUT /prompts/roomy HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(f"{head}Content-Type: {FORM['Content-Type']}\r\n\r\n".encode())
        for piece in list(_junk(3 * SPOOLED))[:-1]:
            connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        wait_until(lambda: len(_open_temporary_files()) == 1)
    wait_until(lambda: _open_temporary_files() == [])
    assert roomy_server.client.get("/health").status_code == 200


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_a_body_is_told_as_such(
    roomy_server: LiveServer, good: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", lambda *a, **k: open("/dev/full", "w+b", buffering=0))  # noqa: PTH123, SIM115
        for content in (_junk(2 * SPOOLED), b"".join(_junk(2 * SPOOLED))):
            response = roomy_server.client.put("/prompts/roomy", content=content, headers=FORM)
            assert "TMPDIR" in assert_error(response, 507, "store_full", "No space left")["remedy"]
    assert roomy_server.put("roomy", good).status_code == 201


def test_a_full_disk_under_the_files_is_told_as_such(
    server: LiveServer, good: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(uploads, "copy_within", full)
        for files in (good, {"f.zip": zip_of(good)}):
            assert_error(server.put("uploads-never", files), 507, "store_full", "No space left")


def test_a_temporary_folder_that_is_missing_is_the_servers_error(
    good: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        with pytest.raises(StoreError, match="No such file") as caught, unpacked_upload([], 1000):
            pass
    assert not isinstance(caught.value, StoreFull)
    assert caught.value.status == 500
