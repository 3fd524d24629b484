"""PEFT directories in and out: what real PEFT writes is served, what does not fit is refused with cause and remedy."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from server.contracts import ModelSpec
from server.errors import BaseModelMismatch
from server.soft_prompts.formats import save_soft_prompt
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
from tests.soft_prompts.files import load, refusal, tensor_with
from tests.support import TINY, random_kv_prompt, random_soft_prompt, tiny_model

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
    edit_tensors(peft_directory(tmp_path), prompt_embeddings=tensor_with(3.4e38))
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
