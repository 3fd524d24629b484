"""`flash_attention` as torch documents its operator, written out: what layouts for CUDA are tested with."""

from __future__ import annotations

from typing import Any

import torch


def log_denominators(
    query: torch.Tensor, key: torch.Tensor, cu_seq_q: torch.Tensor, starts: torch.Tensor, **others: Any
) -> torch.Tensor:
    """The log of each softmax's denominator, `[heads, tokens]`, as torch's operator gives it beside the answer.

    An answer over values that are all 1, with a sink of 0, is D / (D + 1).
    """
    share = reference_varlen_attn(
        query.double(),
        key.double(),
        torch.ones_like(key, dtype=torch.float64),
        cu_seq_q,
        starts,
        **others,
        sinks=torch.zeros(query.shape[1]),
    )[..., 0]
    return (share.log() - (-share).log1p()).transpose(0, 1).float()


def reference_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    seqused_k: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each sequence by itself, in float64 inside, reading nothing but its own keys; checks what torch's checks."""
    count = len(seqused_k)
    for indices in (cu_seq_q, cu_seq_k, seqused_k):
        assert indices.dtype == torch.int32
        assert indices.is_contiguous()
    assert len(cu_seq_q) == len(cu_seq_k) == count + 1
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert query.shape[1] % key.shape[1] == 0
    group = query.shape[1] // key.shape[1]
    left, right = window_size
    out = torch.full(query.shape, float("nan"), dtype=query.dtype)
    for first, last, start, used in zip(
        cu_seq_q.tolist(), cu_seq_q.tolist()[1:], cu_seq_k.tolist(), seqused_k.tolist(), strict=False
    ):
        n = last - first
        assert n <= max_q
        assert 0 < used <= max_k
        keys, values = (pool[start : start + used].double().repeat_interleave(group, dim=1) for pool in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[first:last].double(), keys) * scale
        distance = torch.arange(used)[None, :] - (torch.arange(n)[:, None] + used - n)
        hidden = (distance > right if right >= 0 else distance > used) | (distance < -left if left >= 0 else False)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, n, 1)], dim=-1)
        weights = scores.softmax(dim=-1)[..., :used]
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
    return out
