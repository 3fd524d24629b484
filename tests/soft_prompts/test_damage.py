from __future__ import annotations

import json
import os
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from server.contracts import ModelSpec
from server.errors import InvalidSoftPrompt, UnsupportedPeftType
from server.soft_prompts.declared import SERVED_TYPES
from tests.peft_files import (
    CONFIG,
    KINDS,
    MANIFEST,
    TENSORS,
    edit_json,
    edit_tensors,
    peft_directory,
    write_safetensors,
)
from tests.soft_prompts.files import load, refusal, tensor_with


def _truncate(directory: Path) -> None:
    data = (directory / TENSORS).read_bytes()
    (directory / TENSORS).write_bytes(data[: len(data) - 40])


def _cut_inside_header(directory: Path) -> None:
    (directory / TENSORS).write_bytes((directory / TENSORS).read_bytes()[:30])


def _lie_about_header(length: int) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        data = (directory / TENSORS).read_bytes()
        (directory / TENSORS).write_bytes(length.to_bytes(8, "little") + data[8:])

    return damage


def _header(shape: list[int], claimed: int, held: int) -> Callable[[Path], None]:
    """A file whose header claims a tensor of `claimed` bytes while it holds `held`."""

    def damage(directory: Path) -> None:
        header = {"prompt_embeddings": {"dtype": "F32", "shape": shape, "data_offsets": [0, claimed]}}
        write_safetensors(directory / TENSORS, header, b"\0" * held)

    return damage


def _twice(directory: Path) -> None:
    """A header that names the tensor twice: readers would disagree on which one counts."""
    data = (directory / TENSORS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    entry = json.dumps({"prompt_embeddings": {"dtype": "F32", "shape": [0, 32], "data_offsets": [640, 640]}})
    header = header[:-1] + b"," + entry[1:].encode()
    (directory / TENSORS).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def _metadata(metadata: Any) -> Callable[[Path], None]:
    entry = {"dtype": "F32", "shape": [5, 32], "data_offsets": [0, 640]}
    header = {"__metadata__": metadata, "prompt_embeddings": entry}
    return lambda directory: write_safetensors(directory / TENSORS, header, b"\0" * 640)


def _tensor(tensor: torch.Tensor | None, **others: torch.Tensor) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory, prompt_embeddings=tensor, **others)


def _config(remove: tuple[str, ...] = (), **changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / CONFIG, remove, **changes)


def _manifest(**fields: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / MANIFEST, **fields)


def _text(name: str, text: str | bytes) -> Callable[[Path], None]:
    data = text if isinstance(text, bytes) else text.encode()

    def damage(directory: Path) -> None:
        (directory / name).write_bytes(data)

    return damage


def _remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


DEEP = "[" * 100_000
DEEP_OBJECT = '{"a":' * 400 + "1" + "}" * 400
DAMAGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    # the tensor file
    "no tensor file": (_remove(TENSORS), [TENSORS, "missing", "save_pretrained"]),
    "empty tensor file": (_text(TENSORS, b""), ["not a safetensors file", "0 bytes"]),
    "random bytes": (_text(TENSORS, bytes(range(1, 256)) * 8), ["not a safetensors file", "cut off"]),
    "cut off in the data": (_truncate, ["damaged", "Send the whole file"]),
    "cut off in the header": (_cut_inside_header, ["30 bytes", "cut off"]),
    "header longer than the file": (_lie_about_header(5000), ["header claims 5000"]),
    "huge header": (_lie_about_header(2**63), [f"header claims {2**63}"]),
    "4 TiB in 1.5 KB": (_header([2**35, 32], 2**42, 1400), ["damaged"]),
    "4 TiB by its shape alone": (_header([2**35, 32], 640, 640), ["damaged"]),
    "shape that overflows": (_header([2**63, 2**63], 640, 640), ["damaged"]),
    # the tensor
    "wrong width": (_tensor(torch.zeros(5, 64)), ["[5, 64]", "tiny-llama", "[num_virtual_tokens, 32]", "Train it on"]),
    "wrong rank": (_tensor(torch.zeros(5, 1, 32)), ["[5, 1, 32]", "[num_virtual_tokens, 32]"]),
    "more rows than the config says": (_tensor(torch.zeros(6, 32)), ["num_virtual_tokens 5", "6 rows", "same save"]),
    "no rows": (_tensor(torch.zeros(0, 32)), ["0 virtual tokens", "1 to 16"]),
    "too many rows": (_tensor(torch.zeros(17, 32)), ["17 virtual tokens", "1 to 16", "PRELUDE_MAX_VIRTUAL_TOKENS"]),
    "NaN": (_tensor(tensor_with(float("nan"))), ["not finite", "virtual token 3", "learning rate"]),
    "infinity": (_tensor(tensor_with(float("-inf"))), ["not finite", "virtual token 3"]),
    "float64": (_tensor(torch.zeros(5, 32, dtype=torch.float64)), ["F64", "F32, F16, BF16", "float32"]),
    "integers": (_tensor(torch.zeros(5, 32, dtype=torch.int32)), ["I32", "F32, F16, BF16"]),
    "tensor of another name": (_tensor(None, other=torch.zeros(5, 32)), ["'prompt_embeddings'", "holds other"]),
    "no tensor at all": (_tensor(None), ["'prompt_embeddings'", "holds none"]),
    "a tensor twice": (_twice, ["damaged", "twice"]),
    "odd metadata": (_metadata({"format": 1}), ["damaged", "__metadata__"]),
    # the config
    "no config": (_remove(CONFIG), [CONFIG, "missing"]),
    "config is not JSON": (_text(CONFIG, "{'peft_type': 1}"), [CONFIG, "not valid JSON"]),
    "config is not text": (_text(CONFIG, b"\xff\xfe\x00{"), [CONFIG, "not valid JSON"]),
    "config is a list": (_text(CONFIG, "[1]"), [CONFIG, "object", "list"]),
    "config is nested too deeply": (_text(CONFIG, DEEP), [CONFIG, "not valid JSON"]),
    "config is huge": (_text(CONFIG, "{" + " " * 2**20 + "}"), [CONFIG, "larger than"]),
    "config without peft_type": (_config(remove=("peft_type",)), ["no peft_type", "PROMPT_TUNING"]),
    "peft_type is a number": (_config(peft_type=1), ["no peft_type", "PROMPT_TUNING"]),
    "config names a field twice": (_text(CONFIG, '{"peft_type": "CPT", "peft_type": "CPT"}'), [CONFIG, "twice"]),
    "config is UTF-16": (_text(CONFIG, '{"peft_type": "CPT"}'.encode("utf-16")), [CONFIG, "not valid JSON"]),
    "config says a list of rows": (_config(num_virtual_tokens=[1] * 50_000), ["num_virtual_tokens [1, 1,", "5 rows"]),
    "config says fewer rows": (_config(num_virtual_tokens=4), ["num_virtual_tokens 4", "5 rows"]),
    # the manifest
    "manifest is not JSON": (_text(MANIFEST, "{"), [MANIFEST, "not valid JSON"]),
    "manifest is a list": (_text(MANIFEST, "[]"), [MANIFEST, "object", "list"]),
    "manifest is nested too deeply": (_text(MANIFEST, DEEP_OBJECT), [MANIFEST]),
    "half of a surrogate pair": (_text(MANIFEST, r'{"description": "\ud800"}'), [MANIFEST, "half of a surrogate pair"]),
    "template without {input}": (_manifest(input_template="Text:"), ["input_template", "{input} exactly once"]),
    "template with two": (_manifest(input_template="{input}{input}"), ["input_template", "{input} exactly once"]),
    "unknown generation field": (_manifest(generation={"max_tokens": 3}), ["generation.max_tokens", "leave out"]),
    "generation that cannot be": (_manifest(generation={"top_p": 0}), ["generation.top_p", "greater than 0"]),
    "labels that are no list": (_manifest(labels="ham"), ["labels"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused_at_once_with_cause_and_remedy(
    damage: str, tmp_path: Path, spec: ModelSpec
) -> None:
    peft_directory(tmp_path)
    apply, words = DAMAGES[damage]
    apply(tmp_path)
    started = time.monotonic()
    error = refusal(tmp_path, spec)
    assert time.monotonic() - started < 1
    assert type(error) is InvalidSoftPrompt
    assert len(str(error)) < 500
    for word in words:
        assert word in str(error)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))  # the name of a socket may not be long


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.parent / "pipe")
    path.symlink_to("pipe")


@pytest.mark.timeout(20)  # what waits for a writer waits for ever
@pytest.mark.parametrize("make", [_pipe, _socket, _device, _link_to_a_pipe, Path.mkdir])
@pytest.mark.parametrize("name", [CONFIG, TENSORS, MANIFEST])
def test_only_a_regular_file_is_read(
    name: str, make: Callable[[Path], None], tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(peft_directory(tmp_path))
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    error = refusal(tmp_path, spec)
    assert isinstance(error, InvalidSoftPrompt)
    assert error.message == f"{name} is not a regular file."


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_pipe_that_takes_a_files_place_at_the_last_moment_is_not_waited_for(
    name: str, tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft_directory(tmp_path)
    really_open = os.open

    def replace_and_open(path: Path, *args: Any) -> int:
        if path == tmp_path / name:
            path.unlink()
            os.mkfifo(path)
        return really_open(path, *args)

    monkeypatch.setattr(os, "open", replace_and_open)
    assert refusal(tmp_path, spec).message == f"{name} is not a regular file."


@pytest.mark.parametrize("name", [CONFIG, TENSORS, MANIFEST])
def test_a_link_that_leads_nowhere_is_a_missing_file_and_not_none(name: str, tmp_path: Path, spec: ModelSpec) -> None:
    peft_directory(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("nowhere")
    assert refusal(tmp_path, spec).message == f"{name} is missing."


def test_a_link_to_a_file_is_read_as_the_file(tmp_path: Path, spec: ModelSpec) -> None:
    peft_directory(tmp_path)
    for name in (CONFIG, TENSORS):
        os.rename(tmp_path / name, tmp_path / f"{name}.1")
        (tmp_path / name).symlink_to(f"{name}.1")
    assert load(tmp_path, spec)


def test_an_adapter_of_another_kind_is_refused_by_name_with_what_is_served(tmp_path: Path, spec: ModelSpec) -> None:
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    lora.save_pretrained(str(tmp_path))
    error = refusal(tmp_path, spec)
    assert isinstance(error, UnsupportedPeftType)
    assert "'LORA'" in error.message
    assert all(kind in error.message for kind in SERVED_TYPES)
    assert "soft prompt" in error.remedy
    assert set(SERVED_TYPES) == set(KINDS)


def test_the_soft_prompt_of_an_encoder_decoder_is_refused(tmp_path: Path, spec: ModelSpec) -> None:
    edit_json(peft_directory(tmp_path) / CONFIG, num_transformer_submodules=2)
    error = refusal(tmp_path, spec)
    assert isinstance(error, UnsupportedPeftType)
    assert "encoder-decoder" in error.message
    assert "decoder-only" in error.remedy


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["adapter_model.bin", TENSORS])
def test_a_pickle_is_never_opened(name: str, tmp_path: Path, spec: ModelSpec) -> None:
    directory, trace = peft_directory(tmp_path / "task"), tmp_path / "ran"
    (directory / TENSORS).unlink()
    payload = pickle.dumps(_Payload(trace))
    (directory / name).write_bytes(payload)
    error = refusal(directory, spec)
    assert isinstance(error, InvalidSoftPrompt)
    assert not trace.exists()
    if name != TENSORS:
        assert "adapter_model.bin is a pickle" in error.message
        assert "safe_serialization=True" in error.remedy
    pickle.loads(payload)
    assert trace.exists(), "the payload would have run"
