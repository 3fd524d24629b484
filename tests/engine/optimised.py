"""Tiny models before and after the pass that makes them fast, and what to compare of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import nn

from server.engine.attention.compiled_rows import CompiledAttention
from server.engine.attention.interface import PackedRows
from server.engine.engine import Engine
from server.engine.fast.fused import FusedLayer
from server.engine.fast.optimise import optimise
from server.engine.kernels.library import Kernels
from server.engine.model.frozen import FrozenModel
from tests.support import Outcome, make_engine, random_kv_prompt, random_soft_prompt, request, run_engine, tiny_model

FUSED = {"llama", "mistral", "qwen2", "qwen3"}
NEW_TOKENS = 12
ALL = {"compiled", "fused", "packed"}


def rough(architecture: str, dtype: torch.dtype = torch.float64) -> FrozenModel:
    """A tiny model whose norms and biases are random too: ones and zeros would hide what is forgotten."""
    model = tiny_model(architecture, dtype=dtype, max_model_len=256)
    with torch.no_grad():
        for i, parameter in enumerate(model.module.parameters()):
            if parameter.dim() == 1:
                generator = torch.Generator().manual_seed(i)
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def optimised(architecture: str, parts: Collection[str], kernels: Kernels | None = None, **others: Any) -> FrozenModel:
    model = rough(architecture, **others)
    optimise(model, parts, kernels)
    return model


@torch.inference_mode()
def logits(model: FrozenModel, first_position: int = 0) -> torch.Tensor:
    """Of two rows, the longer one longer than every window."""
    rows = (7, 30)
    ids = torch.arange(3, 3 + 5 * sum(rows), 5) % 256
    positions = torch.cat([torch.arange(first_position, first_position + row) for row in rows])
    return model.forward(model.embed(ids), positions, PackedRows(rows), torch.arange(sum(rows)))


def engine_for(model: FrozenModel, kernels: Kernels | None = None) -> Engine:
    engine = make_engine(model)
    if kernels is not None:
        engine.runner.compiled = CompiledAttention.over(engine.kv_cache, model.attention_rules, kernels)
    return engine


def answers(engine: Engine, *, arrive_every: int = 0) -> dict[str, Outcome]:
    """Chunked prefills, soft prompts of both kinds, decoding far beyond every window."""
    spec = engine.model.spec
    prompts = [None, random_soft_prompt(spec, 5, 1), random_kv_prompt(spec, 7, 2)]
    inputs = [[10, 20, 30], list(range(40, 75)), [7], [200, 3, 90, 14, 90, 14, 8]]
    work = [
        (request(f"{i} {j}", ids, f"task {j}", max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=True), prompt)
        for i, ids in enumerate(inputs)
        for j, prompt in enumerate(prompts)
    ]
    return run_engine(engine, work, arrive_every=arrive_every)


def assert_same(got: dict[str, Outcome], expected: dict[str, Outcome]) -> None:
    for name, outcome in expected.items():
        assert got[name].token_ids == outcome.token_ids
        assert got[name].logprobs == pytest.approx(outcome.logprobs, abs=1e-4)


def layers(model: FrozenModel) -> list[nn.Module]:
    found = getattr(model.module.get_decoder(), "layers", ())  # type: ignore[no-untyped-call]
    return list(found)


def linears(model: FrozenModel, kind: type[nn.Module]) -> int:
    return sum(type(part) is kind for part in model.module.modules())


def is_fused(model: FrozenModel) -> bool:
    """All layers are, or none."""
    kinds = {isinstance(layer, FusedLayer) for layer in layers(model)}
    assert len(kinds) <= 1
    return kinds == {True}


def assert_untouched(model: FrozenModel, architecture: str) -> None:
    """The same modules as before."""
    kinds = [(name, type(part)) for name, part in rough(architecture).module.named_modules()]
    assert [(name, type(part)) for name, part in model.module.named_modules()] == kinds
