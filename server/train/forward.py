"""One forward of the frozen model over a batch of rows behind what is learned.

Rows travel as one flat row through the same modules and the same attention function as in serving; there is no padding
outside the attention and no mask. What is trained is therefore what is served.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from server.engine.attention import PackedRows
from server.engine.model import FrozenModel
from server.engine.operators import at_least_float32
from server.train.data import Example
from server.train.methods import KeyValues, LearnedPrefix


def target_logits(
    model: FrozenModel, prefix: LearnedPrefix | None, examples: Sequence[Example]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model expects where the targets stand, behind what is learned; without a prefix, behind nothing.

    Returns:
        Logits `[target tokens, vocab_size]`, at least in float32, and the targets themselves.
    """
    virtual = None if prefix is None else [prefix.virtual_tokens(example.task) for example in examples]
    rows = None if virtual is None or virtual[0] is None else [row for row in virtual if row is not None]
    return rows_logits(model, examples, rows, None if prefix is None else prefix.key_values())


def rows_logits(
    model: FrozenModel,
    examples: Sequence[Example],
    virtual: Sequence[torch.Tensor] | None = None,
    key_values: KeyValues | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, behind given virtual tokens `[n, hidden_size]` of each row, or keys and values before all of them."""
    device = model.device
    fed = [example.fed_ids for example in examples]
    embedded = model.embed(torch.tensor([token for ids in fed for token in ids], device=device))
    before = 0
    if virtual is not None:
        before = virtual[0].shape[0]
        pieces = torch.split(embedded, [len(ids) for ids in fed])
        embedded = torch.cat(
            [
                part
                for vectors, tokens in zip(virtual, pieces, strict=True)
                for part in (vectors.to(model.dtype), tokens)
            ]
        )
    lengths = [before + len(ids) for ids in fed]
    first = 0 if key_values is None else key_values[0][0].shape[1]
    position_ids = torch.cat([torch.arange(first, first + length, device=device) for length in lengths])
    keep: list[int] = []
    end = 0
    for example, length in zip(examples, lengths, strict=True):
        end += length
        keep += range(end - len(example.target_ids), end)
    layout = PackedRows(lengths, key_values)
    logits = model.forward(embedded, position_ids, layout, torch.tensor(keep, device=device))
    targets = torch.tensor([token for example in examples for token in example.target_ids], device=device)
    return at_least_float32(logits), targets


@torch.no_grad()
def key_values_of(model: FrozenModel, token_ids: Sequence[int]) -> KeyValues:
    """Keys and values of a text at the start of a sequence, per layer `[kv_heads, tokens, head_dim]`."""
    ids = torch.tensor(token_ids, device=model.device)
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    positions = torch.arange(len(token_ids), device=model.device)
    model.forward(model.embed(ids), positions, PackedRows([len(token_ids)], kept=kept), positions[-1:])
    return tuple((key.contiguous(), value.contiguous()) for _, (key, value) in sorted(kept.items()))
