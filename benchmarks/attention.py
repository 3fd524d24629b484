"""Compiled attention alone: what AMX saves in a prefill, and what reading a shared prefix from one slot saves.

Times the attention of all layers of the embedded model, in bfloat16 and with as many threads as the engine would use:
a prefill of 256 tokens, and 64 sequences that decode at position 170, of which the first 100 are virtual tokens of one
of 8 tasks. Variants are measured in turn.

    python benchmarks/attention.py              # half a minute

Prints a table of medians and their ranges and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass

from server.huge_pages import restart_with_huge_pages
from server.openmp import share_cores

if __name__ == "__main__":
    restart_with_huge_pages()
share_cores()  # before torch

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from server.contracts import ModelSpec  # noqa: E402
from server.engine.attention.cached_rows import Span  # noqa: E402
from server.engine.attention.compiled_rows import CompiledAttention, CompiledRows  # noqa: E402
from server.engine.attention.interface import AttentionRules  # noqa: E402
from server.engine.kernels.library import Kernels, use_kernels  # noqa: E402
from server.engine.memory.kv_cache import KVCache  # noqa: E402
from server.engine.memory.slots import Slot  # noqa: E402
from server.settings import Settings  # noqa: E402

LAYERS, HEADS, KV_HEADS, DIM = 30, 9, 3, 64
SEQUENCES, POSITION, TASKS, VIRTUAL_TOKENS, PREFILL = 64, 170, 8, 100, 256
SLOT = 256


@dataclass(frozen=True)
class VectorKernels(Kernels):
    """The kernels of a processor without AMX."""

    @property
    def has_tiles(self) -> bool:
        """Never."""
        return False


def spans(*, tasks: int) -> list[Span]:
    """A step in which all sequences decode; each has a prefix of its own if `tasks` is 0."""
    slots = [Slot(SLOT, SLOT * i) for i in range(SEQUENCES)]
    return [Span(slot, POSITION - 1, 1, 1 + i % tasks if tasks else 0, VIRTUAL_TOKENS) for i, slot in enumerate(slots)]


def run(attention: CompiledAttention, step: list[Span]) -> float:
    """Milliseconds of all layers' attention of a step."""
    rows = CompiledRows(attention, step)
    tokens = sum(span.count for span in step)
    query = torch.randn(HEADS, tokens, DIM).bfloat16()
    key, value = torch.randn(2, KV_HEADS, tokens, DIM).bfloat16()
    rules = AttentionRules(scaling=DIM**-0.5)
    began = time.perf_counter()
    for layer in range(LAYERS):
        rows.attend(layer, query, key, value, rules)
    return (time.perf_counter() - began) * 1000


def main() -> None:
    """Measure all variants in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="how often each variant is measured (default: 20)")
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    spec = ModelSpec("m", "", HEADS * DIM, LAYERS, KV_HEADS, DIM, 9, SLOT, "bfloat16", "cpu")
    kv_cache = KVCache(spec, num_slabs=SEQUENCES)
    kv_cache.states.normal_()
    kernels = use_kernels(Settings().cache_dir)
    vectors, own = CompiledAttention(kv_cache, VectorKernels(kernels.keep)), CompiledAttention(kv_cache, kernels)
    prefill = [Span(Slot(SLOT, 0), 0, PREFILL)]
    variants = {
        "decode 64, prefixes apart": (own, spans(tasks=0)),
        "decode 64, shared prefixes": (own, spans(tasks=TASKS)),
        "prefill 256, vectors": (vectors, prefill),
    }
    if kernels.has_tiles:
        variants["prefill 256, AMX"] = (own, prefill)
    for attention, step in variants.values():
        run(attention, step)  # compiles
    measured: dict[str, list[float]] = defaultdict(list)
    for _ in tqdm(range(rounds), desc="rounds"):
        for name, (attention, step) in variants.items():
            measured[name].append(run(attention, step))
    print(f"\nmilliseconds for {LAYERS} layers, {torch.get_num_threads()} threads")
    for name, times in measured.items():
        print(f"{name:28} {statistics.median(times):7.1f}  ({min(times):.1f} to {max(times):.1f})")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
