"""Sizes and movement of virtual tokens: norms, cosines to the start, effective rank."""

import torch
import torch.nn.functional as F

from server.interpret.results import Geometry, LayerGeometry, VirtualTokenGeometry
from server.train.methods import KeyValues


def effective_rank(matrix: torch.Tensor) -> float:
    """The exponential of the entropy of the normalised singular values of `[n, d]` (Roy and Vetterli 2007)."""
    singular = torch.linalg.svdvals(matrix.double())
    shares = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


@torch.no_grad()
def embedding_geometry(learned: torch.Tensor, start: torch.Tensor | None, vocabulary_norms: torch.Tensor) -> Geometry:
    """Geometry of input embeddings.

    Args:
        learned: `[n, d]`.
        start: `[n, d]`, if it is known.
        vocabulary_norms: `[V]`.
    """
    norms = learned.norm(dim=1)
    ordered = vocabulary_norms.to(norms).sort().values
    percentiles = 100 * torch.searchsorted(ordered, norms.contiguous()) / len(ordered)
    cosines, moved = _movement(learned, start)
    tokens = [
        VirtualTokenGeometry(norm=norm, norm_percentile=percentile, cosine_to_start=cosine, relative_change=change)
        for norm, percentile, cosine, change in zip(norms.tolist(), percentiles.tolist(), cosines, moved, strict=True)
    ]
    return Geometry(
        effective_rank=effective_rank(learned),
        effective_rank_of_change=None if start is None else effective_rank(learned - start),
        tokens=tuple(tokens),
    )


@torch.no_grad()
def prefix_geometry(learned: KeyValues, start: KeyValues | None) -> Geometry:
    """Geometry of a KV prefix, keys and values apart; per layer `[kv_heads, n, head_dim]`."""
    layers, changes = [], []
    for index, pair in enumerate(learned):
        key, value = map(_rows, pair)
        key_0, value_0 = (None, None) if start is None else map(_rows, start[index])
        keys, values = _movement(key, key_0), _movement(value, value_0)
        layers.append(
            LayerGeometry(
                layer=index,
                key_norm=float(key.norm(dim=1).mean()),
                value_norm=float(value.norm(dim=1).mean()),
                key_cosine_to_start=_mean(keys[0]),
                value_cosine_to_start=_mean(values[0]),
                key_relative_change=_mean(keys[1]),
                value_relative_change=_mean(values[1]),
            )
        )
        changes.append(tuple(change for change in values[1] if change is not None))
    everything = _all_values(learned)
    return Geometry(
        effective_rank=effective_rank(everything),
        effective_rank_of_change=None if start is None else effective_rank(everything - _all_values(start)),
        layers=tuple(layers),
        value_change=() if start is None else tuple(changes),
    )


def _movement(learned: torch.Tensor, start: torch.Tensor | None) -> tuple[list[float | None], list[float | None]]:
    """Of each row the cosine to its start, and the length of its change relative to the start's."""
    if start is None:
        return [None] * len(learned), [None] * len(learned)
    lengths = start.norm(dim=1).clamp_min(torch.finfo(start.dtype).tiny)
    return F.cosine_similarity(learned, start, dim=1).tolist(), ((learned - start).norm(dim=1) / lengths).tolist()


def _rows(states: torch.Tensor) -> torch.Tensor:
    """`[kv_heads, n, head_dim]` to `[n, kv_heads * head_dim]`."""
    return states.transpose(0, 1).flatten(1)


def _all_values(states: KeyValues) -> torch.Tensor:
    return torch.cat([_rows(value) for _, value in states], dim=1)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
