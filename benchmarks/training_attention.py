"""Compares the attention of a training step on a CPU, forward and backward: SDPA and explicit operations.

    python benchmarks/training_attention.py

The sizes are SmolLM2's: 16 rows of 60 tokens, 9 heads over 3 key heads of 64 numbers, bfloat16. Prints the median of
interleaved rounds, and a line of JSON last.
"""

from __future__ import annotations

import json
import statistics
import time

import torch
import torch.nn.functional as F

from server.engine.attention.interface import AttentionRules, PackedRows

ROWS, TOKENS, HEADS, KV_HEADS, DIM, ROUNDS = 16, 60, 9, 3, 64, 30


def seconds(product: torch.Tensor) -> float:
    """Time the backward pass of a product."""
    started = time.perf_counter()
    product.sum().backward()
    return time.perf_counter() - started


def sdpa() -> float:
    """Time one forward and backward with scaled_dot_product_attention."""
    query = torch.randn(ROWS, HEADS, TOKENS, DIM, dtype=torch.bfloat16, requires_grad=True)
    key = torch.randn(ROWS, KV_HEADS, TOKENS, DIM, dtype=torch.bfloat16, requires_grad=True)
    started = time.perf_counter()
    product = F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    return time.perf_counter() - started + seconds(product)


def written_out() -> float:
    """Time one forward and backward with the layout that training uses, including padding."""
    query = torch.randn(HEADS, ROWS * TOKENS, DIM, dtype=torch.bfloat16, requires_grad=True)
    key = torch.randn(KV_HEADS, ROWS * TOKENS, DIM, dtype=torch.bfloat16, requires_grad=True)
    layout, rules = PackedRows([TOKENS] * ROWS), AttentionRules(DIM**-0.5)
    started = time.perf_counter()
    product = layout.attend(0, query, key, key, rules)
    return time.perf_counter() - started + seconds(product)


def main() -> None:
    """Interleave the two and print their medians."""
    times: dict[str, list[float]] = {"sdpa": [], "written_out": []}
    for _ in range(ROUNDS):
        times["sdpa"].append(sdpa())
        times["written_out"].append(written_out())
    medians = {name: round(statistics.median(values) * 1000, 2) for name, values in times.items()}
    ratio = round(medians["sdpa"] / medians["written_out"], 2)
    print(f"SDPA {medians['sdpa']} ms, written out {medians['written_out']} ms, ratio {ratio}")
    print(json.dumps({"milliseconds": medians, "ratio": ratio, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
