"""Measures the host's part of a step with many decoding rows: scheduling, indices, sampling, commit, detokenising.

The model is replaced by precomputed, very narrow logits, so that almost nothing is computed: the remaining time is the
time for which a GPU would wait. Only the thread's own processor time counts, so other processes have little effect.

    python benchmarks/host.py
    python benchmarks/host.py --rows 64 --rules greedy

Prints a line of JSON for each kind of rules.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from random_llama import make_module, model_with_bytes

from server.contracts import GenerationRequest, SamplingParams
from server.engine.attention.interface import ATTENTION_NAME, register_attention
from server.engine.engine import Engine
from server.engine.memory.kv_cache import KVCache
from server.engine.memory.prefix_cache import PrefixCache

RULES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
    "penalties and top-p": {
        "temperature": 0.7,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
    },
    "logprobs": {"logprobs": True, "top_logprobs": 5},
}
WIDTH = 32
"""Number of logits in a row."""
INPUT_IDS = tuple(range(WIDTH))
STEPS, WARM_UP = 100, 10


class Logits:
    """A substitute for captured graphs."""

    def __init__(self, rows: int) -> None:
        self._logits = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0))

    def takes(self, rows: int) -> bool:
        """Accept any number of rows."""
        return True

    def run(self, token_ids: Sequence[int], positions: Sequence[int], starts: Sequence[int]) -> torch.Tensor:
        """Return precomputed logits."""
        return self._logits[: len(token_ids)]


def measure(rows: int, rules: dict[str, Any]) -> dict[str, float]:
    """Milliseconds on the host per step."""
    register_attention()
    model = model_with_bytes(make_module(ATTENTION_NAME, torch.device("cpu"), tiny=True), max_model_len=256)
    engine = Engine(model, KVCache(model.spec, rows), PrefixCache(2**20), rows, max(4096, rows))
    for i in range(rows):
        sampling = SamplingParams(max_new_tokens=STEPS + WARM_UP + 2, ignore_eos=True, seed=i, **rules)
        engine.add(GenerationRequest(f"r{i}", INPUT_IDS, sampling, f"task {i % 8}"), None)
    engine.runner.forward = lambda batch, kept: torch.randn(len(kept), WIDTH)  # type: ignore[method-assign]
    while len(engine.scheduler.waiting) or any(sequence.num_pending > 1 for sequence in engine.scheduler.running):
        engine.step()
    engine.runner.graphs = Logits(rows)  # type: ignore[assignment]
    times = []
    for _ in range(WARM_UP + STEPS):
        began = time.thread_time()
        engine.step()
        times.append(1000 * (time.thread_time() - began))
    times = times[WARM_UP:]
    return {"median_ms": round(statistics.median(times), 3), "least_ms": round(min(times), 3)}


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.rules:
        print(json.dumps({"rules": name, "rows": options.rows} | measure(options.rows, RULES[name])), flush=True)


if __name__ == "__main__":
    main()
