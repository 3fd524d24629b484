"""Bad uploads: each gets a 4xx that says what is wrong and what to do, and changes nothing."""

from __future__ import annotations

import json
import pickle
import random
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from tests.api.live import (
    MAX_UPLOAD_BYTES,
    Files,
    LiveServer,
    as_form,
    assert_error,
    zip_of,
)
from tests.api.prompts.uploads.support import CONFIG, LIVE, MANIFEST, TENSORS, refused, zip_file

WIDTH = 32


class _Explosive:
    """Unpickling one makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.mkdir, (self.marker,)  # type: ignore[return-value]


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
    refused(server, {**good, TENSORS: content}, part)
    refused(server, {"files.zip": zip_of({**good, TENSORS: content})}, part)


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
    refused(server, {**good, CONFIG: content}, part, code=code)


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
    refused(server, {**good, MANIFEST: manifest}, part)


def test_a_soft_prompt_of_another_model_is_refused_and_both_named(server: LiveServer, good: Files) -> None:
    manifest = {"base_model": {"name": "big-llama", "fingerprint": "0123abcd"}}
    response = server.put(LIVE, {**good, MANIFEST: json.dumps(manifest).encode()})
    spec = server.model.spec
    assert_error(response, 409, "base_model_mismatch", "big-llama", "0123abcd", spec.name, spec.fingerprint)


@pytest.mark.parametrize("missing", [CONFIG, TENSORS])
def test_a_missing_file_is_named(server: LiveServer, good: Files, missing: str) -> None:
    files = {name: content for name, content in good.items() if name != missing}
    refused(server, files, f"{missing} is missing")
    refused(server, {"files.zip": zip_of(files)}, f"{missing} is missing")


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
    refused(server, {**good, TENSORS: explosive}, "not a safetensors file")
    assert not marker.exists()


def test_an_unknown_file_is_refused_by_name(server: LiveServer, good: Files) -> None:
    refused(server, {**good, "adapter_model.safetensor": b""}, "'adapter_model.safetensor'")
    refused(server, {**good, "extra.zip": zip_of(good)}, "'extra.zip'")
    refused(server, {"run.sh": b"#!/bin/sh"}, "'run.sh'")


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
    reply = server.put(LIVE, {"f.zip": zip_file(entries)})
    assert reply.status_code == 200, reply.text
    assert "ignored" not in reply.json()


def test_a_zip_with_files_of_two_soft_prompts_is_refused(server: LiveServer, good: Files) -> None:
    files = {f"a/{CONFIG}": good[CONFIG], f"b/{TENSORS}": good[TENSORS]}
    refused(server, {"f.zip": zip_of(files)}, "in 'a' and in 'b'")


def test_a_file_that_comes_twice_is_refused(server: LiveServer, good: Files) -> None:
    refused(server, [*good.items(), (TENSORS, good[TENSORS])], f"{TENSORS} comes twice")
    refused(server, [*good.items(), (f"b/{CONFIG}", good[CONFIG])], f"{CONFIG} comes twice")
    refused(server, {"f.zip": zip_of({**good, f"b/{CONFIG}": good[CONFIG]})}, f"{CONFIG} comes twice")


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
