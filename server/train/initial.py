"""Where the virtual tokens start: real embeddings, because random vectors lie off the model's manifold.

Lester et al. 2021, section 3.2: random initialisation is worst on small models; class labels and sampled vocabulary are
best. The vocabulary is sampled from its most common tokens, which are the first of a BPE vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from server.engine.model import FrozenModel
from server.errors import InvalidTrainingData

COMMON_TOKENS = 5000
METHODS = ("vocab", "labels", "text")


def initial_embeddings(
    model: FrozenModel,
    method: str,
    num_virtual_tokens: int,
    seed: int,
    *,
    text: str | None,
    labels: Sequence[str] | None,
) -> torch.Tensor:
    """Starting values `[num_virtual_tokens, hidden_size]` in float32.

    Args:
        model: the frozen model whose embedding rows are taken.
        method: 'vocab' samples common tokens; 'labels' takes the labels' tokens, 'text' those of `text`; both are
            filled up with sampled ones.
        num_virtual_tokens: rows.
        seed: of the sampling.
        text: for 'text'.
        labels: for 'labels'.

    Raises:
        InvalidTrainingData: the method is unknown, or what it needs is missing.
    """
    if method == "vocab":
        ids: list[int] = []
    elif method == "labels":
        if not labels:
            raise InvalidTrainingData(
                "init 'labels' needs data with class labels.", remedy="Use init 'vocab' or 'text'."
            )
        ids = [token for label in labels for token in model.tokenizer.encode(label, add_special_tokens=False)]
    elif method == "text":
        if not text:
            raise InvalidTrainingData("init 'text' needs a text.", remedy="Give it with --init-text.")
        ids = model.tokenizer.encode(text, add_special_tokens=False)
    else:
        raise InvalidTrainingData(f"Unknown init {method!r}.", remedy=f"Use one of {', '.join(METHODS)}.")
    generator = torch.Generator().manual_seed(seed)
    special = set(model.tokenizer.all_special_ids)
    common = torch.tensor([i for i in range(min(COMMON_TOKENS, model.spec.vocab_size)) if i not in special])
    sampled = common[torch.randint(len(common), (num_virtual_tokens,), generator=generator)].tolist()
    chosen = torch.tensor((ids + sampled)[:num_virtual_tokens], device=model.device)
    with torch.no_grad():
        return model.embed(chosen).float().cpu().clone()
