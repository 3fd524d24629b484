from __future__ import annotations

from typing import Any

import pytest
import torch

from server.engine.model import FrozenModel
from server.errors import InvalidTrainingData
from server.train.initial import initial_embeddings


def rows_of(model: FrozenModel, embeddings: torch.Tensor) -> list[int]:
    """Which token each virtual token was copied from; fails if one is no embedding row."""
    weight = model.embed(torch.arange(model.spec.vocab_size))
    matches = [(weight == row).all(dim=1).nonzero().flatten().tolist() for row in embeddings]
    assert all(matches), "a virtual token is not an embedding row"
    return [match[0] for match in matches]


def initial(model: FrozenModel, method: str, n: int = 8, seed: int = 0, **given: Any) -> torch.Tensor:
    return initial_embeddings(model, method, n, seed, **({"text": None, "labels": None} | given))


def test_vocab_takes_embedding_rows_of_ordinary_tokens(tiny32: FrozenModel) -> None:
    embeddings = initial(tiny32, "vocab", n=2000)
    assert embeddings.shape == (2000, tiny32.spec.hidden_size)
    assert embeddings.dtype == torch.float32
    tokens = rows_of(tiny32, embeddings)
    assert not set(tokens) & set(tiny32.tokenizer.all_special_ids)
    assert len(set(tokens)) > 50


def test_vocab_is_decided_by_the_seed(tiny32: FrozenModel) -> None:
    assert torch.equal(initial(tiny32, "vocab", seed=3), initial(tiny32, "vocab", seed=3))
    assert not torch.equal(initial(tiny32, "vocab", seed=3), initial(tiny32, "vocab", seed=4))


def test_the_values_are_a_copy_in_float32_whatever_the_model_serves_in(tiny: FrozenModel) -> None:
    embeddings = initial(tiny, "vocab")
    assert embeddings.dtype == torch.float32
    everything = torch.arange(tiny.spec.vocab_size)
    before = tiny.embed(everything).clone()
    embeddings.zero_()
    assert torch.equal(tiny.embed(everything), before)


def test_labels_come_first_and_are_filled_up_with_sampled_tokens(tiny32: FrozenModel) -> None:
    tokens = rows_of(tiny32, initial(tiny32, "labels", n=8, seed=5, labels=("yes", "no")))
    assert tokens[:5] == tiny32.tokenizer.encode("yesno")
    assert tokens[5:] == rows_of(tiny32, initial(tiny32, "vocab", n=8, seed=5))[:3]


def test_text_longer_than_the_soft_prompt_is_cut(tiny32: FrozenModel) -> None:
    assert rows_of(tiny32, initial(tiny32, "text", n=4, text="classify")) == tiny32.tokenizer.encode("clas")


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("text", {}, r"init 'text' needs a text\. Give it with --init-text\."),
        ("labels", {}, r"init 'labels' needs data with class labels\. Use init 'vocab' or 'text'\."),
        ("labels", {"labels": ()}, r"init 'labels' needs data"),
        ("random", {}, r"Unknown init 'random'\. Use one of vocab, labels, text\."),
    ],
)
def test_an_unknown_or_incomplete_method_is_refused_with_a_remedy(
    tiny32: FrozenModel, method: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidTrainingData, match=message):
        initial(tiny32, method, **given)
