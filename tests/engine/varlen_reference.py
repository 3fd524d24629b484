"""`flash_attention` as torch documents its operator, written out: what layouts for CUDA are tested with."""

from __future__ import annotations

import torch


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
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
    return out
