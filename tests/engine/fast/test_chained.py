"""A chain of all layers computes, bit by bit, what the layers compute one after another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from server.engine.fast.chained import ChainedLayers
from server.engine.fast.tiled import can_tile
from server.engine.kernels.library import Kernels
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


def one_by_one(model: FrozenModel) -> FrozenModel:
    """The same model without the chain."""
    decoder = model.module.get_decoder()  # type: ignore[no-untyped-call]
    (chained,) = decoder.layers
    assert isinstance(chained, ChainedLayers)
    decoder.layers = chained.layers
    return model


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
