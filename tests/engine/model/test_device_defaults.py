"""On CUDA more is served at once than on a CPU, unless a setting says otherwise; a CPU's defaults stay as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from server.engine.model.device_defaults import filled_in, max_model_len
from server.engine.model.frozen import FrozenModel
from server.settings import Settings

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


def test_a_setting_from_the_environment_counts_as_set(tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRELUDE_MAX_SEQUENCES", "64")
    spec = replace(tiny.spec, device="cuda:0")
    assert filled_in(Settings.load(), spec, 100 * GiB).max_sequences == 64
