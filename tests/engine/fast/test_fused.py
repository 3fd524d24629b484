"""A layer is replaced if its replacement answers the same, and not for what it looks like or is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from server.engine.attention.interface import PackedRows
from server.engine.fast.fused import FusedRotary
from server.engine.fast.linear import FrozenLinear
from server.engine.fast.optimise import optimise
from server.engine.kernels.library import Kernels
from tests.engine.optimised import (
    answers,
    assert_same,
    assert_untouched,
    engine_for,
    is_fused,
    layers,
    linears,
    logits,
    optimised,
    rough,
)
from tests.support import TINY

pytestmark = pytest.mark.usefixtures("one_thread")

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
}

GRANITE = {
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 2.0,
    "logits_scaling": 3.0,
}

Variant = Callable[..., str]


@pytest.fixture
def variant(monkeypatch: pytest.MonkeyPatch) -> Variant:
    """Make a tiny architecture with other fields; answers its name."""

    def make(architecture: str, **fields: Any) -> str:
        monkeypatch.setitem(TINY, architecture, TINY.get(architecture, TINY["llama"]) | fields)
        return architecture

    return make


LOOK_LIKE_LLAMA: dict[str, tuple[str, dict[str, Any]]] = {
    "residuals are scaled": ("granite", GRANITE),
    "some layers are not rotated": ("smollm3", {"no_rope_layers": [1, 0]}),
    "neighbours are paired": ("helium", {"head_dim": 8}),
    "neighbours are paired again": ("ernie4_5", {"head_dim": 8}),
}


@pytest.mark.parametrize("what", LOOK_LIKE_LLAMA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_layer_of_the_same_parts_but_other_arithmetic_is_left_alone(
    dtype: torch.dtype, what: str, variant: Variant
) -> None:
    architecture, fields = LOOK_LIKE_LLAMA[what]
    variant(architecture, **fields)
    fast = optimised(architecture, {"fused"}, dtype=dtype)
    assert_untouched(fast, architecture)
    assert torch.equal(logits(fast), logits(rough(architecture, dtype)))


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [("granite", GRANITE | {"residual_multiplier": 1.0}), ("smollm3", {"no_rope_layers": [1, 1]})],
    ids=["granite", "smollm3"],
)
def test_the_same_parts_with_the_same_arithmetic_are_fused_whatever_their_name(
    architecture: str, fields: dict[str, Any], variant: Variant
) -> None:
    """So it is what they compute that kept the ones above."""
    variant(architecture, **fields)
    fast = optimised(architecture, {"fused"})
    assert is_fused(fast)
    torch.testing.assert_close(logits(fast), logits(rough(architecture)), rtol=0, atol=1e-4)


class Doubling(LlamaDecoderLayer):  # type: ignore[no-untyped-call]
    """Adds twice what a layer adds to its input."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **others: Any) -> torch.Tensor:
        return 2 * super().forward(hidden_states, *args, **others) - hidden_states


@pytest.mark.parametrize("odd", [0, 1])
def test_one_layer_that_differs_leaves_all_of_them_as_they_are(odd: int) -> None:
    plain, fast = rough("llama"), rough("llama")
    for model in (plain, fast):
        layers(model)[odd].__class__ = Doubling
    before = layers(fast)
    optimise(fast, {"fused"}, None)
    assert layers(fast) == before
    assert not isinstance(fast.module.get_decoder().rotary_emb, FusedRotary)  # type: ignore[no-untyped-call]
    assert torch.equal(logits(fast), logits(plain))


class Own(nn.Linear):
    """Who knows why it is not a plain one."""


class Scaled(Own):
    """A product of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("kind", [Own, Scaled])
def test_a_linear_layer_of_another_class_is_not_touched(kind: type[nn.Linear], name: str) -> None:
    plain, fast = rough("llama", torch.float32), rough("llama", torch.float32)
    for model in (plain, fast):
        layers(model)[1].get_submodule(name).__class__ = kind
    optimise(fast, {"fused", "packed"}, None)
    assert not is_fused(fast)
    assert type(layers(fast)[1].get_submodule(name)) is kind
    assert linears(fast, FrozenLinear) == linears(plain, nn.Linear)
    torch.testing.assert_close(logits(fast), logits(plain), rtol=0, atol=1e-4)


def test_a_rotary_embedding_of_a_part_of_each_head_is_not_fused() -> None:
    class Half(nn.Module):
        def __init__(self, whole: nn.Module) -> None:
            super().__init__()
            self.whole = whole

        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            cos, sin = self.whole(x, position_ids)
            return cos[..., ::2], sin[..., ::2]

    fast = rough("llama")
    decoder = fast.module.get_decoder()  # type: ignore[no-untyped-call]
    decoder.rotary_emb = half = Half(decoder.rotary_emb)
    before = layers(fast)
    optimise(fast, {"fused"}, None)
    assert layers(fast) == before
    assert decoder.rotary_emb is half


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"attention_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("llama", {"rms_norm_eps": 0.3}),
        ("qwen3", {"rms_norm_eps": 0.3}),
        ("llama", {"hidden_act": "gelu"}),
        # Heads for which attention is compiled anyway: see tests/engine/attention/heads.py.
        ("llama", {"num_key_value_heads": 1, "head_dim": 96}),
        ("llama", {"num_attention_heads": 2, "head_dim": 8}),
        ("llama", {"num_attention_heads": 16, "head_dim": 4}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_kernels", [False, True])
def test_what_a_config_may_vary_is_fused_and_right(
    with_kernels: bool, architecture: str, fields: dict[str, Any], variant: Variant, kernels: Kernels
) -> None:
    variant(architecture, **fields)
    dtype, used = (torch.float32, kernels) if with_kernels else (torch.float64, None)
    plain, fast = rough(architecture, dtype), optimised(architecture, {"fused", "packed"}, used, dtype=dtype)
    assert is_fused(fast)
    torch.testing.assert_close(logits(fast), logits(plain), rtol=0, atol=1e-4)
    assert_same(answers(engine_for(fast)), answers(engine_for(plain)))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("with_kernels", [False, True])
def test_scaled_rotary_embeddings_are_fused_and_right(
    with_kernels: bool, rope: str, variant: Variant, kernels: Kernels
) -> None:
    variant("llama", rope_parameters={"rope_theta": 1e4} | ROPES[rope])
    dtype, used = (torch.float32, kernels) if with_kernels else (torch.float64, None)
    plain, fast = rough("llama", dtype), optimised("llama", {"fused"}, used, dtype=dtype)
    assert is_fused(fast)
    for first_position in (0, 60, 220):
        expected = logits(plain, first_position)
        torch.testing.assert_close(logits(fast, first_position), expected, rtol=0, atol=1e-4)
    variant("llama", rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    assert not torch.allclose(logits(rough("llama", dtype)), logits(plain), atol=1e-3), "the scaling does something"


MINISTRAL = {
    "head_dim": 8,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "llama_4_scaling_beta": 0.1,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_layer_that_differs_far_into_the_context_only_is_left_alone(dtype: torch.dtype, variant: Variant) -> None:
    variant("ministral3", **MINISTRAL)
    fast, plain = optimised("ministral3", {"fused"}, dtype=dtype), rough("ministral3", dtype)
    assert torch.equal(logits(fast, 200), logits(plain, 200))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_layer_that_differs_by_less_than_bfloat16_rounds_is_left_alone(dtype: torch.dtype, variant: Variant) -> None:
    variant("granite", **GRANITE | {"residual_multiplier": 0.97})
    assert torch.equal(logits(optimised("granite", {"fused"}, dtype=dtype)), logits(rough("granite", dtype)))


@pytest.mark.parametrize("kept", [[], [4], [0, 6, 36], list(range(37))])
def test_the_last_layer_computes_only_rows_whose_logits_are_wanted(kept: list[int]) -> None:
    plain, fast = rough("llama"), optimised("llama", {"fused"})
    ids, rows = torch.arange(3, 3 + 5 * 37, 5) % 256, (7, 30)
    positions = torch.cat([torch.arange(row) for row in rows])
    last = layers(fast)[-1]
    seen: list[int] = []
    last.register_forward_hook(lambda _, __, answer: seen.append(answer.shape[1]))
    with torch.inference_mode():
        got, expected = (
            model.forward(model.embed(ids), positions, PackedRows(rows), torch.tensor(kept, dtype=torch.long))
            for model in (fast, plain)
        )
    assert seen == [len(kept)]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_a_layer_of_two_dtypes_is_left_alone(kernels: Kernels) -> None:
    """Compiled norms read their weights as what they norm."""
    model = rough("llama", torch.bfloat16)
    norm = layers(model)[1].post_attention_layernorm
    assert isinstance(norm, nn.Module)
    norm.float()
    optimise(model, {"compiled", "fused"}, kernels)
    assert not is_fused(model)
