"""PEFT directories in and out: what real PEFT writes is served, what does not fit is refused with cause and remedy."""

from __future__ import annotations

import json
import math
import os
import pickle
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from server.contracts import ModelSpec
from server.errors import BaseModelMismatch, InvalidSoftPrompt, PreludeError, UnsupportedPeftType
from server.soft_prompts.declared import SERVED_TYPES
from server.soft_prompts.formats import load_soft_prompts, save_soft_prompt
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.peft_files import (
    CONFIG,
    KINDS,
    MANIFEST,
    NUM_TASKS,
    TENSORS,
    edit_json,
    edit_tensors,
    peft_base,
    peft_directory,
    peft_model,
    write_safetensors,
)
from tests.support import TINY, random_kv_prompt, random_soft_prompt, tiny_model

MAX_VIRTUAL_TOKENS = 16


def load(directory: Path, spec: ModelSpec) -> list[SoftPrompt]:
    return load_soft_prompts(directory, spec, MAX_VIRTUAL_TOKENS)


def refusal(directory: Path, spec: ModelSpec) -> PreludeError:
    with pytest.raises(PreludeError) as caught:
        load(directory, spec)
    assert 400 <= caught.value.status < 500
    assert caught.value.message
    assert caught.value.remedy
    return caught.value


# What PEFT writes


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "MULTITASK_PROMPT_TUNING"])
def test_what_peft_saves_is_what_is_loaded(kind: str, tmp_path: Path, spec: ModelSpec) -> None:
    model = peft_model(kind, num_virtual_tokens=7, seed=3)
    model.save_pretrained(str(tmp_path))
    [soft_prompt] = load(tmp_path, spec)
    saved = model.get_prompt_embedding_to_save("default")
    assert soft_prompt.peft_type == kind
    assert soft_prompt.num_virtual_tokens == 7
    assert soft_prompt.tensor.shape == (7, spec.kv_width if soft_prompt.is_kv_prefix else spec.hidden_size)
    assert torch.equal(soft_prompt.tensor, saved.reshape(7, -1))


def test_a_multitask_soft_prompt_splits_into_one_per_row(tmp_path: Path, spec: ModelSpec) -> None:
    model = peft_model("MULTITASK_PROMPT_TUNING")
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / TENSORS)
    soft_prompts = load(tmp_path, spec)
    assert len(soft_prompts) == NUM_TASKS
    for task, soft_prompt in enumerate(soft_prompts):
        low_rank = saved["prefix_task_cols"][task] @ saved["prefix_task_rows"][task]
        with torch.no_grad():
            peft_own = model.get_prompt(batch_size=1, task_ids=torch.tensor([task]))[0]
        assert soft_prompt.peft_type == "PROMPT_TUNING"
        torch.testing.assert_close(soft_prompt.tensor, saved["prompt_embeddings"] * low_rank)
        torch.testing.assert_close(soft_prompt.tensor, peft_own)
    assert len({soft_prompt.digest for soft_prompt in soft_prompts}) == NUM_TASKS


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_peft_and_the_model_spec_agree_on_every_architecture(kind: str, architecture: str, tmp_path: Path) -> None:
    spec = tiny_model(architecture, dtype=torch.float32).spec
    [soft_prompt] = load(peft_directory(tmp_path, kind, architecture), spec)
    assert soft_prompt.num_virtual_tokens == 5


def test_the_projected_prefix_is_loaded_as_its_projection(tmp_path: Path, spec: ModelSpec) -> None:
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8
    )
    model = peft.get_peft_model(peft_base(), config)
    model.save_pretrained(str(tmp_path))
    [soft_prompt] = load(tmp_path, spec)
    assert torch.equal(soft_prompt.tensor, model.get_prompt_embedding_to_save("default").reshape(4, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_served_dtype_keeps_its_numbers(dtype: torch.dtype, tmp_path: Path, spec: ModelSpec) -> None:
    tensor = torch.randn(3, spec.hidden_size).to(dtype)
    save_soft_prompt(tmp_path, SoftPrompt("PROMPT_TUNING", tensor), spec)
    [soft_prompt] = load(tmp_path, spec)
    assert soft_prompt.tensor.dtype == dtype
    assert torch.equal(soft_prompt.tensor, tensor)


def test_unknown_and_missing_config_keys_are_tolerated(tmp_path: Path, spec: ModelSpec) -> None:
    peft_directory(tmp_path)
    before = load(tmp_path, spec)[0].digest
    edit_json(tmp_path / CONFIG, a_key_of_tomorrow={"deep": [1, None]}, base_model_name_or_path="/somewhere/else")
    assert load(tmp_path, spec)[0].digest == before
    (tmp_path / CONFIG).write_text('{"peft_type": "PROMPT_TUNING"}')
    assert load(tmp_path, spec)[0].digest == before


# What we write


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "MULTITASK_PROMPT_TUNING"])
def test_what_we_save_is_what_peft_loads(kind: str, tmp_path: Path, spec: ModelSpec) -> None:
    width = spec.kv_width if kind in ("PREFIX_TUNING", "CARTRIDGE") else spec.hidden_size
    ours = SoftPrompt(kind, torch.randn(6, width), Manifest(description="ours"))
    save_soft_prompt(tmp_path, ours, spec)
    model = peft.PeftModel.from_pretrained(peft_base(), str(tmp_path))
    encoder: Any = model.prompt_encoder["default"]
    assert torch.equal(encoder.embedding.weight, ours.tensor)


def test_what_we_save_is_what_we_load(tmp_path: Path, spec: ModelSpec) -> None:
    manifest = {
        "base_model": {"name": spec.name, "fingerprint": spec.fingerprint},
        "description": "Grüße",
        "generation": {"max_new_tokens": 3, "stop": ["\n"]},
        "input_template": "{input}\n",
        "labels": ["ham", "spam"],
        "metrics": {"exact_match": 0.95},
    }
    for soft_prompt in (random_soft_prompt(spec, manifest=manifest), random_kv_prompt(spec)):
        save_soft_prompt(tmp_path, soft_prompt, spec)
        [loaded] = load(tmp_path, spec)
        assert loaded.digest == soft_prompt.digest
        assert loaded.peft_type == soft_prompt.peft_type
        assert loaded.manifest == soft_prompt.manifest


def test_a_loaded_soft_prompt_does_not_change_when_its_file_is_rewritten(tmp_path: Path, spec: ModelSpec) -> None:
    for kind in ("PROMPT_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"):
        directory = peft_directory(tmp_path / kind, kind)
        [loaded, *_] = load(directory, spec)
        before = loaded.tensor.clone()
        with (directory / TENSORS).open("r+b") as file:
            size = file.seek(0, 2)
            file.seek(size // 2)
            file.write(b"\0" * (size - size // 2))
        assert torch.equal(loaded.tensor, before), kind


# What is refused


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


def _with(value: float, width: int = 32) -> torch.Tensor:
    tensor = torch.zeros(5, width)
    tensor[3, 7] = value
    return tensor


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
    "NaN": (_tensor(_with(float("nan"))), ["not finite", "virtual token 3", "learning rate"]),
    "infinity": (_tensor(_with(float("-inf"))), ["not finite", "virtual token 3"]),
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


def test_sizes_are_checked_before_anything_is_read(tmp_path: Path, spec: ModelSpec) -> None:
    # The header is honest and the file (sparse) is as large as it says: only a check by the header refuses it in time.
    rows = 2**34 // (spec.hidden_size * 4)
    header = {"prompt_embeddings": {"dtype": "F32", "shape": [rows, spec.hidden_size], "data_offsets": [0, 2**34]}}
    write_safetensors(peft_directory(tmp_path) / TENSORS, header, b"")
    with (tmp_path / TENSORS).open("r+b") as file:
        file.truncate((tmp_path / TENSORS).stat().st_size + 2**34)
    started = time.monotonic()
    assert f"{rows} virtual tokens" in refusal(tmp_path, spec).message
    assert time.monotonic() - started < 1


def test_numbers_that_the_serving_dtype_cannot_hold_are_refused(tmp_path: Path, spec: ModelSpec) -> None:
    edit_tensors(peft_directory(tmp_path), prompt_embeddings=_with(3.4e38))
    assert load(tmp_path, spec)
    error = refusal(tmp_path, replace(spec, dtype="bfloat16"))
    assert "after the cast to bfloat16" in error.message
    assert "virtual token 3" in error.message


def test_a_soft_prompt_that_fills_the_context_is_refused(tmp_path: Path, spec: ModelSpec) -> None:
    error = refusal(peft_directory(tmp_path), replace(spec, max_model_len=6))
    assert "no room in a context of 6" in error.message
    assert "PRELUDE_MAX_MODEL_LEN" in error.remedy


def test_keys_and_values_of_other_heads_are_refused_although_the_width_fits(tmp_path: Path, spec: ModelSpec) -> None:
    other = replace(spec, num_hidden_layers=4, num_key_value_heads=1)
    assert other.kv_width == spec.kv_width
    error = refusal(peft_directory(tmp_path, "PREFIX_TUNING"), other)
    assert "num_layers 2" in error.message
    assert "has 4" in error.message


BESIDE = {
    "the head of a classifier": ("base_model.score.weight", "head that was trained"),
    "an output layer": ("base_model.lm_head.weight", "vocabulary was resized"),
    "a resized vocabulary": ("base_model.model.embed_tokens.weight", "vocabulary was resized"),
    "a LoRA matrix": ("base_model.model.layers.0.self_attn.q_proj.lora_A.weight", "LoRA"),
    "anything else": ("prompt_encoder.mlp.0.weight", "no part of a soft prompt"),
    "a multitask factor": ("prefix_task_cols", "no part of a soft prompt"),
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "CPT"])
def test_a_tensor_that_would_be_dropped_is_refused_by_its_name(
    name: str, kind: str, tmp_path: Path, spec: ModelSpec
) -> None:
    tensor, meaning = BESIDE[name]
    edit_tensors(peft_directory(tmp_path, kind), **{tensor: torch.ones(3, spec.hidden_size)})
    error = refusal(tmp_path, spec)
    assert tensor in error.message
    assert meaning in error.message


DECLARED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a classifier": ("PROMPT_TUNING", {"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    "a token classifier": ("P_TUNING", {"task_type": "TOKEN_CLS"}, "task_type is 'TOKEN_CLS'"),
    "an encoder-decoder": ("PREFIX_TUNING", {"task_type": "SEQ_2_SEQ_LM"}, "task_type is 'SEQ_2_SEQ_LM'"),
    "features": ("CPT", {"task_type": "FEATURE_EXTRACTION"}, "task_type is 'FEATURE_EXTRACTION'"),
    "no text": ("PROMPT_TUNING", {"task_type": 7}, "task_type is 7"),
    "trained modules": ("PROMPT_TUNING", {"modules_to_save": ["score"]}, "modules_to_save is ['score']"),
    "trained tokens": ("PROMPT_TUNING", {"trainable_token_indices": [1]}, "trainable_token_indices is [1]"),
    "other layers": ("PROMPT_TUNING", {"num_layers": 32}, "num_layers 32"),
    "another width": ("P_TUNING", {"token_dim": 4096}, "token_dim 4096"),
    "other heads": ("PROMPT_TUNING", {"num_attention_heads": 99}, "num_attention_heads 99"),
    "another width of keys": ("PREFIX_TUNING", {"token_dim": 4096}, "token_dim 4096"),
    "ids of another length": ("CPT", {"cpt_token_ids": [1, 2], "num_virtual_tokens": 5}, "length of cpt_token_ids 2"),
    "other tasks": ("MULTITASK_PROMPT_TUNING", {"num_tasks": 9}, "num_tasks 9"),
    "other ranks": ("MULTITASK_PROMPT_TUNING", {"num_ranks": 9}, "num_ranks 9"),
    "a multitask of other layers": ("MULTITASK_PROMPT_TUNING", {"num_layers": 9}, "num_layers 9"),
}


@pytest.mark.parametrize("name", DECLARED)
def test_a_config_that_contradicts_what_would_be_served_is_refused(name: str, tmp_path: Path, spec: ModelSpec) -> None:
    kind, changes, words = DECLARED[name]
    edit_json(peft_directory(tmp_path, kind) / CONFIG, **changes)
    assert words in refusal(tmp_path, spec).message


def test_a_config_without_a_task_type_is_taken(tmp_path: Path, spec: ModelSpec) -> None:
    edit_json(peft_directory(tmp_path) / CONFIG, task_type=None)
    assert load(tmp_path, spec)[0].notes == ()


def test_what_is_taken_but_not_used_is_noted(tmp_path: Path, spec: ModelSpec) -> None:
    peft_directory(tmp_path)
    assert load(tmp_path, spec)[0].notes == ()
    edit_json(tmp_path / CONFIG, base_model_name_or_path="mistralai/Mistral-7B-v0.1", use_dora=True)
    (tmp_path / MANIFEST).write_text('{"lables": ["a", "b"]}')
    base, key, field = load(tmp_path, spec)[0].notes
    assert "mistralai/Mistral-7B-v0.1" in base
    assert spec.name in base
    assert "use_dora" in key
    assert "lables" in field
    edit_json(tmp_path / CONFIG, base_model_name_or_path=None, use_dora=None, num_tasks=3)
    assert "change nothing: num_tasks." in load(tmp_path, spec)[0].notes[0], "only a multitask soft prompt has tasks"


def test_a_local_copy_of_the_same_name_is_not_noted(tmp_path: Path, spec: ModelSpec) -> None:
    edit_json(peft_directory(tmp_path) / CONFIG, base_model_name_or_path=f"/data/models/{spec.name.upper()}/")
    assert load(tmp_path, spec)[0].notes == ()


def test_embeddings_under_the_name_of_a_prefix_are_refused(tmp_path: Path, spec: ModelSpec) -> None:
    edit_json(peft_directory(tmp_path) / CONFIG, peft_type="PREFIX_TUNING")
    message = refusal(tmp_path, spec).message
    assert "[5, 32]" in message
    assert f"[num_virtual_tokens, {spec.kv_width}]" in message


@pytest.mark.parametrize(
    ("cols", "rows"),
    [
        (None, (3, 2, 32)),
        ((3, 5, 2), None),
        ((3, 4, 2), (3, 2, 32)),
        ((3, 5, 2), (2, 2, 32)),
        ((3, 5, 2), (3, 3, 32)),
        ((3, 5, 2), (3, 2, 16)),
        ((0, 5, 2), (0, 2, 32)),
        ((3, 5, 0), (3, 0, 32)),
        ((1001, 5, 1), (1001, 1, 32)),
        ((5, 2), (2, 32)),
    ],
)
def test_multitask_tensors_that_do_not_fit_each_other_are_refused(
    cols: tuple[int, ...] | None, rows: tuple[int, ...] | None, tmp_path: Path, spec: ModelSpec
) -> None:
    edit_tensors(
        peft_directory(tmp_path, "MULTITASK_PROMPT_TUNING"),
        prefix_task_cols=None if cols is None else torch.ones(cols),
        prefix_task_rows=None if rows is None else torch.ones(rows),
    )
    assert "prefix_task" in refusal(tmp_path, spec).message


def test_a_small_multitask_file_cannot_unfold_to_gigabytes(tmp_path: Path, spec: ModelSpec) -> None:
    n, wide = 512, replace(spec, hidden_size=1024, max_model_len=1024)
    edit_json(peft_directory(tmp_path, "MULTITASK_PROMPT_TUNING") / CONFIG, num_virtual_tokens=n)
    edit_tensors(
        tmp_path,
        prompt_embeddings=torch.ones(n, 1024, dtype=torch.float16),
        prefix_task_cols=torch.ones(1000, n, 1, dtype=torch.float16),
        prefix_task_rows=torch.ones(1000, 1, 1024, dtype=torch.float16),
    )
    with pytest.raises(InvalidSoftPrompt, match="take more than"):
        load_soft_prompts(tmp_path, wide, n)


def test_a_multitask_factor_of_high_rank_is_refused_before_it_is_read(tmp_path: Path, spec: ModelSpec) -> None:
    wide = replace(spec, hidden_size=2048, max_model_len=1024)
    edit_json(peft_directory(tmp_path, "MULTITASK_PROMPT_TUNING") / CONFIG, num_virtual_tokens=1)
    shapes = {
        "prompt_embeddings": [1, 2048],
        "prefix_task_cols": [20, 1, 2048],
        "prefix_task_rows": [20, 2048, 2048],
    }
    header, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    write_safetensors(tmp_path / TENSORS, header, b"")
    with (tmp_path / TENSORS).open("r+b") as file:  # 336 MB of holes
        file.truncate((tmp_path / TENSORS).stat().st_size + at)
    with pytest.raises(InvalidSoftPrompt, match="take more than"):
        load_soft_prompts(tmp_path, wide, 16)


def test_a_multitask_row_that_overflows_is_refused(tmp_path: Path, spec: ModelSpec) -> None:
    edit_tensors(peft_directory(tmp_path, "MULTITASK_PROMPT_TUNING"), prefix_task_cols=torch.full((3, 5, 2), 3e38))
    assert "not finite" in refusal(tmp_path, spec).message


# The frozen model that it belongs to


def test_a_soft_prompt_of_another_frozen_model_is_refused_and_both_are_named(tmp_path: Path, spec: ModelSpec) -> None:
    edit_json(peft_directory(tmp_path) / MANIFEST, base_model={"name": "other-llm", "fingerprint": "abc123"})
    error = refusal(tmp_path, spec)
    assert isinstance(error, BaseModelMismatch)
    assert error.status == 409
    for name in ("other-llm", "abc123", spec.name, spec.fingerprint):
        assert name in error.message


@pytest.mark.parametrize("base_model", [None, {}, {"name": "other-llm"}])
def test_without_a_fingerprint_the_shape_decides(
    base_model: dict[str, str] | None, tmp_path: Path, spec: ModelSpec
) -> None:
    edit_json(peft_directory(tmp_path) / MANIFEST, base_model=base_model)
    assert load(tmp_path, spec)


def test_the_manifest_beside_the_tensor_is_taken(tmp_path: Path, spec: ModelSpec) -> None:
    (peft_directory(tmp_path) / MANIFEST).write_text(json.dumps({"labels": ["ham", "spam"], "licence": "CC0-1.0"}))
    [soft_prompt] = load(tmp_path, spec)
    assert soft_prompt.manifest.labels == ("ham", "spam")
    assert soft_prompt.manifest.licence == "CC0-1.0"
