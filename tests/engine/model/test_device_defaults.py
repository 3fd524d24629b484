"""On CUDA more is served at once than on a CPU, unless a setting says otherwise; a CPU's defaults stay as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from server.engine.attention.interface import ATTENTION_NAME
from server.engine.model.device_defaults import filled_in, max_model_len
from server.engine.model.frozen import FrozenModel
from server.settings import Settings
from tests.support import byte_tokenizer, tiny_module

GiB = 2**30
LLAMA = LlamaConfig(
    hidden_size=4096,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_hidden_layers=32,
    max_position_embeddings=131_072,
)


@pytest.mark.parametrize(
    ("device", "options", "free", "expected"),
    [
        ("cpu", {}, 100 * GiB, (64, 512)),
        ("cuda:0", {}, 100 * GiB, (256, 8192)),
        ("cuda:0", {}, 7 * GiB, (256, 1024)),
        ("cuda:0", {}, GiB, (256, 512)),
        ("cuda:0", {"max_sequences": 64, "max_batch_tokens": 512}, 100 * GiB, (64, 512)),
        ("cuda:0", {"max_sequences": 4096}, GiB, (4096, 4096)),
        ("cuda:0", {"max_batch_tokens": 128}, 100 * GiB, (128, 128)),
    ],
)
def test_what_nobody_has_set_is_what_the_device_wants(
    tiny: FrozenModel, device: str, options: dict[str, Any], free: int, expected: tuple[int, int]
) -> None:
    spec = replace(tiny.spec, device=device, dtype="bfloat16", vocab_size=128_256)
    settings = filled_in(Settings(**options), spec, free)
    assert (settings.max_sequences, settings.max_batch_tokens) == expected
    assert filled_in(settings, spec, free) == settings


@pytest.mark.parametrize(
    ("device", "options", "free", "expected"),
    [
        ("cpu", {}, 100 * GiB, 2048),
        ("cuda:0", {}, 1000 * GiB, 131_072),
        ("cuda:0", {}, 110 * GiB, 16_384),
        ("cuda:0", {}, 7 * GiB, 2048),
        ("cuda:0", {"max_model_len": 65_536}, 7 * GiB, 65_536),
    ],
)
def test_the_longest_context_is_the_model_s_own_as_memory_allows(
    device: str, options: dict[str, Any], free: int, expected: int
) -> None:
    assert max_model_len(Settings(**options), LLAMA, torch.bfloat16, device, free) == expected


@pytest.mark.parametrize("family", ["gemma4_unified", "gemma4_unified_text", "blt"])
def test_a_config_without_one_size_for_all_heads_does_not_end_the_start_by_a_traceback(family: str) -> None:
    """Whether the engine can serve such a model is found out from its layers."""
    try:
        config = AutoConfig.for_model(family)
    except ValueError:
        pytest.skip("not in this version of transformers")
    assert 1 <= max_model_len(Settings(), config, torch.bfloat16, "cuda:0", 100 * GiB) <= 2048


@pytest.mark.parametrize("own", [0, -1, -4])
def test_a_context_of_no_positions_is_one_that_the_config_does_not_name(own: int) -> None:
    module = tiny_module(dtype=torch.float32, attention=ATTENTION_NAME)
    module.config.max_position_embeddings = own
    assert FrozenModel(module, byte_tokenizer(), name="tiny", max_model_len=64).spec.max_model_len == 64
    assert max_model_len(Settings(), module.config, torch.bfloat16, "cuda:0", 100 * GiB) == 2048


def test_a_setting_from_the_environment_counts_as_set(tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRELUDE_MAX_SEQUENCES", "64")
    spec = replace(tiny.spec, device="cuda:0")
    assert filled_in(Settings.load(), spec, 100 * GiB).max_sequences == 64
