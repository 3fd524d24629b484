"""What cannot be loaded is refused before any weight is: for want of memory or packages, with sizes and names."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from server.engine.model import preflight
from server.engine.model.exactness import own_logits
from server.engine.model.frozen import FrozenModel
from server.engine.model.preflight import NEEDED, GiB, Stored, free_memory, quantisation, weight_bytes
from server.errors import ConfigurationError, InsufficientMemory, UnsupportedModel
from server.settings import Settings
from tests.engine.tiny_families import tiny_family
from tests.support import byte_tokenizer, make_engine, request, run_engine, tiny_module

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_module(dtype=torch.float32, attention="eager").save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def load(model: Path) -> FrozenModel:
    return FrozenModel.load(Settings.load(model=str(model), dtype="float32", device="cpu"))


def fail(*_: object, **__: object) -> None:
    raise AssertionError("weights were loaded")


def test_free_memory_is_what_the_machine_has() -> None:
    total = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    assert 0 < free_memory(CPU) <= total


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_container_has_cached_of_files_is_room_for_weights(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "CGROUP", tmp_path)
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    limit, used = preflight.CGROUP_V1_FILES if version == 1 else ("memory.max", "memory.current")
    prefix = "total_" if version == 1 else ""
    (folder / limit).write_text("1000\n")
    (folder / used).write_text("900\n")
    (folder / "memory.stat").write_text(f"anon 200\n{prefix}inactive_file 500\n{prefix}active_file 100\n")
    assert free_memory(CPU) == 100
    assert free_memory(CPU, with_cache=True) == 700


@pytest.mark.parametrize(
    ("dtype", "method", "device", "expected"),
    [
        ("F32", None, CPU, 20),
        ("BF16", None, CUDA, 20),
        ("I32", "gptq", CUDA, 40),
        ("U8", "bitsandbytes", CUDA, 10),
        ("F8_E4M3", "fp8", CUDA, 10),
        ("F8_E4M3", "fp8", CPU, 20),
        ("U8", "mxfp4", CPU, 40),
        ("U8", "mxfp4", CUDA, 10),
    ],
)
def test_weights_take_what_they_become(dtype: str, method: str | None, device: torch.device, expected: int) -> None:
    assert weight_bytes([Stored(dtype, 10)], method, device, torch.bfloat16) == expected


@pytest.mark.parametrize(
    ("dtype", "method", "capability", "has_kernels", "expected"),
    [
        ("F8_E4M3", "fp8", (9, 0), False, 10),
        ("F8_E4M3", "fp8", (8, 0), True, 20),
        ("U8", "mxfp4", (9, 0), True, 10),
        ("U8", "mxfp4", (9, 0), False, 40),
        ("U8", "mxfp4", (7, 0), True, 40),
        ("U8", "bitsandbytes", (7, 0), False, 10),
    ],
)
def test_what_a_gpu_does_not_multiply_takes_what_it_becomes(
    dtype: str,
    method: str,
    capability: tuple[int, int],
    has_kernels: bool,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(preflight, "_is_installed", lambda _: has_kernels)
    assert weight_bytes([Stored(dtype, 10)], method, CUDA, torch.bfloat16) == expected


@pytest.mark.parametrize("stored", ["safetensors", "torch"])
def test_a_model_larger_than_memory_is_refused_before_it_is_loaded(
    stored: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(whole, tmp_path / "model")
    if stored == "torch":
        torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(preflight, "GiB", 2**10)
    monkeypatch.setattr(preflight, "free_memory", lambda *_, **__: 20 * 2**10)
    with pytest.raises(
        InsufficientMemory, match=r"take 1\d\d\.\d GiB in float32, and 20\.0 GiB are free on cpu"
    ) as caught:
        load(directory)
    assert "PRELUDE_DTYPE=bfloat16" in caught.value.remedy


def test_weights_that_are_unpacked_are_refused_by_what_they_become(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = with_quantisation(shutil.copytree(whole, tmp_path / "model"), quant_method="compressed-tensors")
    packed = {f"layers.{layer}.weight_packed": torch.zeros(8, dtype=torch.int32) for layer in range(2)}
    save_file(packed, directory / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(preflight, "_is_installed", lambda _: True)
    monkeypatch.setattr(preflight, "GiB", 2**10)
    monkeypatch.setattr(preflight, "free_memory", lambda *_, **__: 20 * 2**10)
    with pytest.raises(InsufficientMemory, match=r"take 1\d\d\.\d GiB in float32, and 20\.0 GiB are free on cpu"):
        load(directory)


def test_a_model_larger_than_one_gpu_is_refused_with_what_the_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70 * GiB, 80 * GiB))
    with pytest.raises(InsufficientMemory, match=r"take 140\.0 GiB in bfloat16, and 70\.0 GiB are free") as caught:
        preflight.refuse_too_large("llama-70b", [Stored("BF16", 70 * GiB)], None, CUDA, torch.bfloat16)
    assert "80.0 GiB in all, and one model is served by one GPU" in caught.value.remedy


def test_memory_that_runs_out_while_loading_is_a_sentence(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 224 MiB.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", too_much)
    with pytest.raises(InsufficientMemory, match="Tried to allocate 224 MiB"):
        load(whole)


def with_quantisation(directory: Path, **fields: Any) -> Path:
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": fields}))
    return directory


@pytest.mark.parametrize("method", NEEDED)
def test_packages_that_a_quantised_checkpoint_needs_are_named_before_it_is_loaded(
    method: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    directory = with_quantisation(shutil.copytree(whole, tmp_path / "model"), quant_method=method, bits=4)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(UnsupportedModel, match=f"quantised with {method}.* not installed: ") as caught:
        load(directory)
    for package in NEEDED[method]:
        assert package in str(caught.value)
        assert package in caught.value.remedy
    assert "pip install" in caught.value.remedy


def test_bitsandbytes_is_known_by_its_own_fields(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_is_installed", lambda _: False)
    directory = with_quantisation(shutil.copytree(whole, tmp_path / "model"), load_in_4bit=True)
    with pytest.raises(UnsupportedModel, match="bitsandbytes"):
        load(directory)


@pytest.mark.parametrize("kind", ["nonsense", "llama9"])
def test_an_unknown_architecture_is_a_sentence_that_names_it(kind: str, whole: Path, tmp_path: Path) -> None:
    config = shutil.copytree(whole, tmp_path / "model") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": kind}))
    with pytest.raises(ConfigurationError, match=rf"transformers \d+\.\d+.* knows no '{kind}' models\.") as caught:
        load(config.parent)
    assert "Update transformers" in caught.value.remedy


def test_a_model_that_is_no_language_model_is_a_sentence(whole: Path, tmp_path: Path) -> None:
    config = shutil.copytree(whole, tmp_path / "model") / "config.json"
    config.write_text(json.dumps({"model_type": "vit", "num_hidden_layers": 2}))
    with pytest.raises(ConfigurationError, match="no language model that generates text"):
        load(config.parent)


def test_an_fp8_checkpoint_is_served_as_its_dequantised_weights(whole: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(whole, tmp_path / "plain")
    directory = shutil.copytree(whole, tmp_path / "fp8")
    weights, quantised = load_file(whole / "model.safetensors"), {}
    for name, weight in weights.items():
        if not name.endswith("proj.weight"):
            quantised[name] = weight
            continue
        quantised[name] = (weight / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn)
        quantised[f"{name}_scale_inv"] = torch.full((1, 1), 0.01)
        weights[name] = quantised[name].float() * 0.01
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    save_file(quantised, directory / "model.safetensors", {"format": "pt"})
    with_quantisation(directory, quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic")
    assert_answers_alike(plain, directory)


@pytest.mark.parametrize("kind", ["int", "float"])
def test_a_compressed_tensors_checkpoint_is_served_as_its_dequantised_weights(
    kind: str, whole: Path, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason="no part of the development environment")
    plain = shutil.copytree(whole, tmp_path / "plain")
    directory = shutil.copytree(whole, tmp_path / "quantised")
    weights, quantised = load_file(whole / "model.safetensors"), {}
    for name, weight in weights.items():
        if not name.endswith("proj.weight"):
            quantised[name] = weight
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        rounded = (weight / scale).round()
        quantised[name] = rounded.to(torch.int8 if kind == "int" else torch.float8_e4m3fn)
        quantised[f"{name}_scale"] = scale
        weights[name] = quantised[name].float() * scale
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    save_file(quantised, directory / "model.safetensors", {"format": "pt"})
    numbers = {"num_bits": 8, "type": kind, "symmetric": True}
    by_token = numbers | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": numbers | {"strategy": "channel"}, "input_activations": by_token}
    with_quantisation(
        directory,
        quant_method="compressed-tensors",
        format=f"{kind}-quantized",
        quantization_status="compressed",
        config_groups={"group_0": group},
        ignore=["lm_head"],
    )
    assert_answers_alike(plain, directory)
    assert quantisation(load(directory).module.config) is None, "its layers can be fused"


def assert_answers_alike(plain: Path, directory: Path) -> None:
    answers = [
        run_engine(make_engine(load(path)), [(request("r", [5, 6, 7], max_new_tokens=6, logprobs=True), None)])["r"]
        for path in (plain, directory)
    ]
    assert answers[1].token_ids == answers[0].token_ids
    assert answers[1].logprobs == pytest.approx(answers[0].logprobs, abs=1e-5)


def test_of_a_checkpoint_that_reads_images_the_text_part_is_served(tmp_path: Path) -> None:
    """Mistral Small 3 is no causal language model to transformers."""
    module = tiny_family("mistral3")
    module.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path)
    ids = [5, 6, 7, 8]
    outcome = run_engine(make_engine(loaded), [(request("r", ids, max_new_tokens=5, ignore_eos=True), None)])["r"]
    with torch.inference_mode():
        for token in outcome.token_ids:
            logits = own_logits(loaded.module, input_ids=torch.tensor(ids))
            assert token == int(logits[-1].argmax())
            ids.append(token)
