"""One forward of the frozen model over a batch of rows with the learned prefix.

Rows travel as one flat row through the same modules and the same attention function as in serving; there is no padding
outside the attention and no mask. What is trained is therefore what is served.
"""

import itertools
from collections.abc import Sequence

import torch

from server.engine.attention.interface import Layout, PackedRows, SharedStart
from server.engine.fast.operators import at_least_float32
from server.engine.model.frozen import FrozenModel
from server.train.data import Example
from server.train.methods import KeyValues, LearnedPrefix


def target_logits(
    model: FrozenModel, prefix: LearnedPrefix | None, examples: Sequence[Example]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the target positions, and the targets; each row follows the learned prefix, if there is one.

    Logits are `[target tokens, vocab_size]`, at least in float32.
    """
    if prefix is None:
        return rows_logits(model, examples)
    virtual = {task: prefix.virtual_tokens(task) for task in {example.task for example in examples}}
    if len(virtual) == 1:
        [shared] = virtual.values()
        return rows_logits(model, examples, shared, prefix.key_values())
    of_rows = [vectors for example in examples if (vectors := virtual[example.task]) is not None]
    return rows_logits(model, examples, of_rows)


def rows_logits(
    model: FrozenModel,
    examples: Sequence[Example],
    virtual: torch.Tensor | Sequence[torch.Tensor] | None = None,
    key_values: KeyValues | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, after given virtual tokens `[n, hidden_size]`, or after keys and values before all rows.

    Virtual tokens that all rows share are computed once. If there is a tensor for each row, its virtual tokens are
    placed before that row.
    """
    fed = [example.fed_ids for example in examples]
    lengths = [len(ids) for ids in fed]
    embedded = model.embed(torch.tensor([token for ids in fed for token in ids], device=model.device))
    first, shared = 0, 0
    layout: Layout
    if isinstance(virtual, torch.Tensor):
        first = shared = virtual.shape[0]
        embedded = torch.cat([virtual.to(model.dtype), embedded])
        layout = SharedStart(shared, lengths)
    elif virtual is not None:
        pieces = zip(virtual, torch.split(embedded, lengths), strict=True)
        embedded = torch.cat([part.to(model.dtype) for piece in pieces for part in piece])
        lengths = [vectors.shape[0] + length for vectors, length in zip(virtual, lengths, strict=True)]
        layout = PackedRows(lengths)
    else:
        first = 0 if key_values is None else key_values[0][0].shape[1]
        layout = PackedRows(lengths, key_values)
    position_ids = torch.cat([torch.arange(shared), *(torch.arange(first, first + length) for length in lengths)])
    keep = _target_rows(examples, lengths, shared)
    logits = model.forward(embedded, position_ids.to(model.device), layout, keep.to(model.device))
    targets = torch.tensor([token for example in examples for token in example.target_ids], device=model.device)
    return at_least_float32(logits), targets


def _target_rows(examples: Sequence[Example], lengths: Sequence[int], start: int) -> torch.Tensor:
    """Positions in the flat row at which the targets are predicted; the first sequence begins at `start`."""
    ends = itertools.accumulate(lengths, initial=start)
    next(ends)
    return torch.cat(
        [torch.arange(end - len(example.target_ids), end) for example, end in zip(examples, ends, strict=True)]
    )


@torch.no_grad()
def key_values_of(model: FrozenModel, token_ids: Sequence[int], first: int = 0) -> KeyValues:
    """Keys and values of a text, per layer `[kv_heads, tokens, head_dim]`.

    Args:
        first: position of its first token; of a model with rotary embeddings it may be before the start.
    """
    ids = torch.tensor(token_ids, device=model.device)
    collected: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    positions = torch.arange(first, first + len(token_ids), device=model.device)
    last = torch.tensor([len(token_ids) - 1], device=model.device)
    model.forward(model.embed(ids), positions, PackedRows([len(token_ids)], collected=collected), last)
    return tuple((key.contiguous(), value.contiguous()) for _, (key, value) in sorted(collected.items()))
