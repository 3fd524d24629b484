"""A chain of all layers computes, bit by bit, what the layers compute one after another."""

from __future__ import annotations

import gc
from typing import NoReturn

import pytest
import torch
from torch import nn

from server.engine.attention.cached_rows import Span
from server.engine.attention.compiled_rows import CompiledAttention, CompiledRows
from server.engine.engine import Engine
from server.engine.fast import chained as module
from server.engine.fast.chained import ChainedLayers, can_chain
from server.engine.fast.tiled import TiledLinear, can_tile
from server.engine.kernels.library import Kernels
from server.engine.memory.kv_cache import KVCache
from server.engine.model.frozen import FrozenModel
from tests.engine.optimised import ALL, answers, engine_for, logits, optimised
from tests.support import TINY


@pytest.fixture(autouse=True)
def whole_tiles(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    """Sizes that are multiples of a tile's."""
    if not can_tile(torch.zeros(32, 32, dtype=torch.bfloat16), kernels):
        pytest.skip("this processor has no AMX")
    for name in ("llama", "qwen2", "qwen3", "mistral"):
        monkeypatch.setitem(TINY, name, TINY[name] | {"intermediate_size": 64})


def chain_of(model: FrozenModel) -> ChainedLayers:
    (chained,) = model.module.get_decoder().layers  # type: ignore[no-untyped-call]
    assert isinstance(chained, ChainedLayers)
    return chained


def one_by_one(model: FrozenModel) -> FrozenModel:
    """The same model without the chain."""
    model.module.get_decoder().layers = chain_of(model).layers  # type: ignore[no-untyped-call]
    return model


def fail(*_: object) -> NoReturn:
    raise MemoryError


def tokens_of(engine: Engine) -> dict[str, list[int]]:
    return {name: outcome.token_ids for name, outcome in answers(engine).items()}


@torch.inference_mode()
def prefilled(model: FrozenModel, kernels: Kernels, count: int, kept: list[int]) -> torch.Tensor:
    """Logits of some rows of short sequences side by side, without padding."""
    kv_cache = KVCache(model.spec, num_slabs=-(-count // 16))
    attention = CompiledAttention.over(kv_cache, model.attention_rules, kernels)
    assert attention is not None
    spans = []
    for first in range(0, count, 20):
        slot = kv_cache.allocate(20)
        assert slot is not None, "a slab for each"
        spans.append(Span(slot, 0, min(20, count - first)))
    layout = CompiledRows(attention, spans)
    ids = torch.arange(3, 3 + 7 * count, 7) % 256
    keep = torch.tensor(kept, dtype=torch.long)
    return model.forward(model.embed(ids), layout.position_ids, layout, keep)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
def test_a_chain_answers_as_its_layers_do_one_by_one(architecture: str, kernels: Kernels) -> None:
    """Qwen 2 has biases, Mistral a window; chunked prefills beside decoding, and padding."""
    model = optimised(architecture, ALL, kernels, dtype=torch.bfloat16)
    all_at_once, some_later = answers(engine_for(model, kernels)), answers(engine_for(model, kernels), arrive_every=2)
    layers = one_by_one(model)
    assert all_at_once == answers(engine_for(layers, kernels))
    assert some_later == answers(engine_for(layers, kernels), arrive_every=2)


def test_other_layouts_run_layer_by_layer(kernels: Kernels) -> None:
    model = optimised("llama", ALL, kernels, dtype=torch.bfloat16)
    chained = logits(model)
    assert torch.equal(chained, logits(one_by_one(model)))


def test_layers_with_other_parts_are_not_chained(kernels: Kernels) -> None:
    """Qwen 3 norms its heads."""
    model = optimised("qwen3", ALL, kernels, dtype=torch.bfloat16)
    layers: nn.ModuleList = model.module.get_decoder().layers  # type: ignore[no-untyped-call]
    assert len(layers) == 2
    assert not any(isinstance(layer, ChainedLayers) for layer in layers)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_any_number_of_threads_answers_the_same(threads: int, kernels: Kernels) -> None:
    model = optimised("llama", ALL, kernels, dtype=torch.bfloat16)
    expected, before = answers(engine_for(model, kernels)), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert answers(engine_for(model, kernels)) == expected
    finally:
        torch.set_num_threads(before)


def test_engines_in_turn_share_a_model(kernels: Kernels) -> None:
    """Each has a KV cache of its own, and one is gone before the next begins."""
    model = optimised("mistral", ALL, kernels, dtype=torch.bfloat16)
    expected = tokens_of(engine_for(model, kernels))
    first, second = engine_for(model, kernels), engine_for(model, kernels)
    for engine in (first, second, first):
        assert tokens_of(engine) == expected
    del first, second, engine
    gc.collect()
    assert tokens_of(engine_for(model, kernels)) == expected


@pytest.mark.parametrize("broken", ["_fill", "prepare", "result"])
def test_a_step_that_fails_leaves_nothing_behind(
    broken: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = optimised("llama", ALL, kernels, dtype=torch.bfloat16)
    expected = prefilled(model, kernels, 40, [3, 39])
    with monkeypatch.context() as patch:
        patch.setattr(module._Table, broken, fail)
        with pytest.raises(MemoryError):
            prefilled(model, kernels, 70, [69])
    assert torch.equal(prefilled(model, kernels, 40, [3, 39]), expected)


def test_layers_of_different_sizes_are_not_chained(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """One memory serves all layers."""
    narrow = [*chain_of(optimised("llama", ALL, kernels, dtype=torch.bfloat16)).layers]
    monkeypatch.setitem(TINY, "llama", TINY["llama"] | {"intermediate_size": 96})
    wide = [*chain_of(optimised("llama", ALL, kernels, dtype=torch.bfloat16)).layers]
    assert can_chain(narrow)
    assert can_chain(wide)
    assert not can_chain([narrow[0], wide[1]])


@pytest.mark.parametrize("parts", [set(), {"fused"}, {"packed"}, {"fused", "packed"}, {"compiled", "fused"}])
def test_only_all_optimisations_together_chain(parts: set[str], kernels: Kernels) -> None:
    used = kernels if "compiled" in parts else None
    model = optimised("llama", parts, used, dtype=torch.bfloat16)
    assert not any(isinstance(part, ChainedLayers) for part in model.module.modules())
    exact = optimised("llama", ALL, kernels, dtype=torch.float32)
    assert not any(isinstance(part, ChainedLayers | TiledLinear) for part in exact.module.modules())


def test_a_row_has_the_same_logits_beside_others_and_beside_padding(kernels: Kernels) -> None:
    """From one row to more than a unit of work has; rows that are not kept are not computed in the last layer."""
    model = optimised("llama", ALL, kernels, dtype=torch.bfloat16)
    whole = prefilled(model, kernels, 300, list(range(300)))
    for count in (1, 2, 15, 17, 40, 257):
        assert torch.equal(prefilled(model, kernels, count, list(range(count))), whole[:count])
        assert torch.equal(prefilled(model, kernels, count, [count - 1]), whole[count - 1 : count])
        assert len(prefilled(model, kernels, count, [])) == 0
