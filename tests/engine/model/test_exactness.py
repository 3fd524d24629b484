"""A model that answers differently through the engine is refused when it is loaded, with the cause, for few tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from server.engine.model.exactness import NUM_TOKENS, refuse_inexact
from server.engine.model.frozen import FrozenModel
from server.errors import UnsupportedModel
from server.settings import Settings
from tests.engine.tiny_families import tiny_family
from tests.support import TINY, byte_tokenizer, tiny_model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_right_model_passes_in_every_dtype(architecture: str, dtype: torch.dtype) -> None:
    refuse_inexact(tiny_model(architecture, dtype=dtype))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_rounding_that_sends_a_token_to_another_expert_refuses_no_model(family: str) -> None:
    module = tiny_family(family).to(torch.bfloat16)  # type: ignore[arg-type]
    refuse_inexact(FrozenModel(module, byte_tokenizer(), name=family, max_model_len=128))


def numbered_from_0(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook that gives a rotary embedding positions as if the flat row were one sequence."""
    positions = torch.arange(kwargs["position_ids"].shape[1])[None]
    return args, {**kwargs, "position_ids": positions}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_positions_is_refused(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    rotary = model.module.get_decoder().rotary_emb  # type: ignore[no-untyped-call]
    rotary.register_forward_pre_hook(numbered_from_0, with_kwargs=True)
    with pytest.raises(UnsupportedModel, match="ignores the positions"):
        refuse_inexact(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_layers_mix_neighbours_is_refused(dtype: torch.dtype) -> None:
    """As a short convolution does."""
    model = tiny_model("llama", dtype=dtype)
    layer = model.module.get_decoder().layers[1]  # type: ignore[no-untyped-call]
    layer.mlp.register_forward_hook(lambda _, __, out: out + 0.5 * out.roll(1, dims=1))
    with pytest.raises(UnsupportedModel, match=r"llama lets tokens see|from a token's neighbours"):
        refuse_inexact(model)


def test_a_model_that_ignores_which_logits_are_wanted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request would be answered from another's row."""
    model = tiny_model("llama", dtype=torch.float32)
    forward = model.module.forward
    monkeypatch.setattr(model.module, "forward", lambda logits_to_keep=None, **others: forward(**others))
    with pytest.raises(UnsupportedModel, match="rows whose logits are wanted"):
        refuse_inexact(model)


def test_the_check_reads_few_tokens() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    tokens: list[int] = []
    model.module.get_decoder().layers[0].mlp.register_forward_pre_hook(  # type: ignore[no-untyped-call]
        lambda _, args: tokens.append(args[0].shape[1])
    )
    refuse_inexact(model)
    assert sum(tokens) <= 3 * NUM_TOKENS
    assert len(tokens) <= 3


def test_a_model_is_checked_when_it_is_loaded(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bert", **TINY["gpt_neox"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="bert lets tokens see those after them") as caught:
        FrozenModel.load(Settings.load(model=str(tmp_path), dtype="float32", device="cpu"))
    assert "\n" not in str(caught.value)
    assert "docs/models.md" in caught.value.remedy


def test_a_window_that_the_attention_is_not_given_is_refused_unless_no_context_is_so_long() -> None:
    """PhiMoE masks by its window and hands it to no attention function."""
    module = tiny_family("phimoe", sliding_window=64)
    with pytest.raises(UnsupportedModel, match="a sliding window of 64 tokens that it does not hand") as caught:
        refuse_inexact(FrozenModel(module, byte_tokenizer(), name="phimoe", max_model_len=128))
    assert "PRELUDE_MAX_MODEL_LEN to at most 64" in caught.value.remedy
    assert module.config.sliding_window == 64
    refuse_inexact(FrozenModel(module, byte_tokenizer(), name="phimoe", max_model_len=64))
