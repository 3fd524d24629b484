from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.model.frozen import FrozenModel
from server.errors import InvalidTrainingData
from server.soft_prompts.formats import save_soft_prompt
from server.train.config import TrainingConfig
from server.train.forward import key_values_of
from server.train.methods import join_key_values
from tests.support import random_kv_prompt, random_soft_prompt
from tests.train.rows import initial_values


def rows_of(model: FrozenModel, embeddings: torch.Tensor) -> list[int]:
    """Which token each virtual token was copied from; fails if one is no embedding row."""
    weight = model.embed(torch.arange(model.spec.vocab_size))
    matches = [(weight == row).all(dim=1).nonzero().flatten().tolist() for row in embeddings]
    assert all(matches), "a virtual token is not an embedding row"
    return [match[0] for match in matches]


def initial(
    model: FrozenModel,
    init: Any,
    n: int = 8,
    labels: tuple[str, ...] | None = None,
    start: Path | None = None,
    **given: Any,
) -> Any:
    return initial_values(model, TrainingConfig(init=init, num_virtual_tokens=n, **given), labels, start)


def test_vocab_takes_embedding_rows_of_ordinary_tokens(tiny32: FrozenModel) -> None:
    embeddings = initial(tiny32, "vocab", n=2000)
    assert embeddings.shape == (2000, tiny32.spec.hidden_size)
    assert embeddings.dtype == torch.float32
    tokens = rows_of(tiny32, embeddings)
    assert not set(tokens) & set(tiny32.tokenizer.all_special_ids)
    assert len(set(tokens)) > 50


@pytest.mark.parametrize("init", ["vocab", "random"])
def test_what_is_drawn_is_decided_by_the_seed(tiny32: FrozenModel, init: str) -> None:
    assert torch.equal(initial(tiny32, init, seed=3), initial(tiny32, init, seed=3))
    assert not torch.equal(initial(tiny32, init, seed=3), initial(tiny32, init, seed=4))


def test_the_values_are_a_copy_in_float32_whatever_the_model_serves_in(tiny: FrozenModel) -> None:
    embeddings = initial(tiny, "vocab")
    assert embeddings.dtype == torch.float32
    everything = torch.arange(tiny.spec.vocab_size)
    before = tiny.embed(everything).clone()
    embeddings.zero_()
    assert torch.equal(tiny.embed(everything), before)


def test_labels_come_first_and_are_filled_up_with_sampled_tokens(tiny32: FrozenModel) -> None:
    embeddings = initial(tiny32, "labels", seed=5, labels=("yes", "no"))
    tokens = rows_of(tiny32, embeddings)
    assert tokens[:5] == tiny32.tokenizer.encode("yesno")
    assert tokens[5:] == rows_of(tiny32, initial(tiny32, "vocab", seed=5))[:3]
    assert torch.equal(initial(tiny32, "auto", seed=5, labels=("yes", "no")), embeddings)
    assert torch.equal(initial(tiny32, "auto", seed=5), initial(tiny32, "vocab", seed=5))


def test_text_longer_than_the_soft_prompt_is_cut(tiny32: FrozenModel) -> None:
    embeddings = initial(tiny32, "text", n=4, init_text="classify")
    assert rows_of(tiny32, embeddings) == tiny32.tokenizer.encode("clas")


def test_random_vectors_are_as_large_as_those_of_tokens(tiny32: FrozenModel) -> None:
    embeddings = initial(tiny32, "random", n=500)
    assert float(embeddings.std()) == pytest.approx(float(initial(tiny32, "vocab", n=500).std()), rel=0.05)


def test_prefix_tuning_begins_with_the_keys_and_values_of_real_tokens(tiny32: FrozenModel) -> None:
    states = initial(tiny32, "text", n=4, init_text="classify", method="prefix_tuning")
    for ours, theirs in zip(states, key_values_of(tiny32, tiny32.tokenizer.encode("clas")), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_start_that_is_no_soft_prompt_is_named(tiny32: FrozenModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidTrainingData, match=r"^other cannot be the start: .* Name the PEFT directory"):
        initial(tiny32, "soft_prompt", start=tmp_path, init_from="other")


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_another_soft_prompt_is_where_its_like_begins(tiny32: FrozenModel, tmp_path: Path, method: str) -> None:
    make = random_kv_prompt if method == "prefix_tuning" else random_soft_prompt
    other = make(tiny32.spec)
    save_soft_prompt(tmp_path, other, tiny32.spec)
    given: dict[str, Any] = {"init_from": "other", "method": method, "start": tmp_path}
    values = initial(tiny32, "soft_prompt", n=other.num_virtual_tokens, **given)
    if method == "prompt_tuning":
        assert torch.equal(values, other.tensor.float())
    else:
        assert torch.equal(join_key_values(values), other.tensor.float())
    with pytest.raises(InvalidTrainingData, match=r"^other holds .* Start from one of the same kind"):
        initial(tiny32, "soft_prompt", n=other.num_virtual_tokens + 1, **given)
