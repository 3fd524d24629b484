"""Checks the properties of flash attention that `varlen_rows.py` relies on, against the tests' reference.

Cases: slots in any order, NaN in all unfilled positions, heads of all sizes, windows, sinks, decodes and chunks; the
longest slot as the bound on keys, as in captured graphs; one sequence of 8,000 positions, which is split.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.devices import device_of
from benchmarks.gpu.stage import Run
from server.contracts import ModelSpec
from server.engine.attention.cached_rows import Span
from server.engine.attention.interface import AttentionRules
from server.engine.attention.varlen_rows import Part, VarlenAttention, VarlenRows, varlen_attention
from server.engine.memory.kv_cache import KVCache
from tests.engine.varlen_reference import reference_varlen_attn

LARGEST_DIFFERENCE = 2e-2
"""Largest difference between the device and float64 rounded to bfloat16, for values with a standard deviation of 1."""


@dataclass(frozen=True)
class Case:
    """A case of one or two calls."""

    head_dim: int
    heads: tuple[int, int]
    window: int | None
    kind: str
    sinks: bool = False
    longest: int = 512

    def __str__(self) -> str:
        with_sinks = ", sinks" if self.sinks else ""
        heads = "{} on {}".format(*self.heads)
        return f"{self.kind}, heads of {self.head_dim}, {heads}, window {self.window}, {self.longest}{with_sinks}"


def cases(*, rehearse: bool) -> Iterator[Case]:
    """All cases, the most common first."""
    dims, heads, windows = (64,), ((8, 2),), (None, 8)
    if not rehearse:
        dims, heads = (128, 64, 96, 256), ((32, 8), (8, 8), (8, 2))
        windows = (None, 1, 8, 1000)
    kinds = ("decodes", "chunks", "mixed", "graph")
    for dim, some, window, kind in itertools.product(dims, heads, windows, kinds):
        yield Case(dim, some, window, kind)
    for kind in kinds:
        yield Case(64, (8, 2), None, kind, sinks=True)
        yield Case(64, (8, 2), 8, kind, sinks=True)
    longest = 512 if rehearse else 8192
    yield from (Case(dims[0], heads[0], window, "alone", longest=longest) for window in windows)


def measure(run: Run) -> None:
    """Run every case; differences are problems."""
    device = device_of(run)
    if run.rehearse:
        run.skip("flash attention itself")
    largest, tried, bad = 0.0, 0, 0
    for number, case in enumerate(cases(rehearse=run.rehearse)):
        difference = _difference(case, device, number)
        tried, largest = tried + 1, max(largest, difference)
        if not difference <= LARGEST_DIFFERENCE:
            bad += 1
            run.check(bad > 5, f"{case}: differs by {difference:.3g}")
    run.note(cases=tried, wrong=bad, largest_difference=largest)
    run.check(bad <= 5, f"{bad} of {tried} cases differ")


@torch.inference_mode()
def _difference(case: Case, device: torch.device, seed: int) -> float:
    """The largest difference between the device's result and the reference; NaN counts as a difference."""
    heads, kv_heads = case.heads
    on_host, on_device = (KVCache(_spec(case, torch.device(place)), 4, shortest_slot=32) for place in ("cpu", device))
    dice = random.Random(seed)
    spans = _spans(on_host, case, dice)
    generator = torch.Generator().manual_seed(seed)
    on_host.states.copy_(torch.randn(on_host.states.shape, generator=generator))
    filled = torch.zeros(on_host.states.shape[2], dtype=torch.bool)
    for span in spans:
        filled[span.slot.start : span.slot.start + span.end] = True
    on_host.states[:, :, ~filled] = float("nan")
    on_device.states.copy_(on_host.states)
    row = torch.randn(sum(span.count for span in spans), heads + 2 * kv_heads, case.head_dim, generator=generator)
    parts = torch.split(row.bfloat16(), [heads, kv_heads, kv_heads], dim=1)
    sinks = torch.randn(heads, generator=generator) if case.sinks else None
    answers = []
    for cache in (on_host, on_device):
        place = cache.states.device
        rules = AttentionRules(case.head_dim**-0.5, case.window, sinks=None if sinks is None else sinks.to(place))
        attention = reference_varlen_attn if cache is on_host else _attention(case, place, rules)
        layout = _layout(cache, attention, spans, case)
        states = [part.to(place).transpose(0, 1) for part in parts]
        answers.append(layout.attend(0, states[0], states[1], states[2], rules).cpu().double())
    expected, got = answers
    return float((got - expected).abs().max().nan_to_num(nan=float("inf")))


def _attention(case: Case, device: torch.device, rules: AttentionRules) -> VarlenAttention:
    if device.type == "cpu":
        return reference_varlen_attn
    found = varlen_attention(_spec(case, device), [rules])
    assert found is not None, "the log says why there is no fast path"
    return found


def _spec(case: Case, device: torch.device) -> ModelSpec:
    return ModelSpec("contract", "", 64, 1, case.heads[1], case.head_dim, 64, case.longest, "bfloat16", str(device))


def _spans(cache: KVCache, case: Case, dice: random.Random) -> list[Span]:
    """Sequences in slots of any length and order; decodes first, as in a step."""
    if case.kind == "alone":
        slot = cache.allocator.allocate(case.longest)
        assert slot is not None
        return [Span(slot, case.longest - 1 - dice.randrange(100), 1)]
    slots = [slot for n in (100, 10, 400, 60, 20, 30, 128, 5, 31) if (slot := cache.allocator.allocate(n)) is not None]
    dice.shuffle(slots)
    spans = []
    for number, slot in enumerate(slots):
        is_one = case.kind in ("decodes", "graph") or (case.kind == "mixed" and number % 2)
        count = 1 if is_one else dice.randint(2, slot.length)
        spans.append(Span(slot, dice.randint(0, slot.length - count), count))
    return sorted(spans, key=lambda span: span.count > 1)


def _layout(cache: KVCache, attention: VarlenAttention, spans: Sequence[Span], case: Case) -> VarlenRows:
    if case.kind != "graph":
        return VarlenRows.of(cache, attention, spans)
    # Like in a captured graph, the bound on keys is the longest slot, whatever its content.
    device = cache.states.device
    starts = torch.tensor([*(span.slot.start for span in spans), 0], dtype=torch.int32, device=device)
    ends = torch.tensor([span.end for span in spans], dtype=torch.int32, device=device)
    first_rows = torch.arange(len(spans) + 1, dtype=torch.int32, device=device)
    part = Part(starts, ends, first_rows, max_q=1, max_k=cache.allocator.slab_length)
    positions = (ends - 1).long()
    return VarlenRows(cache, attention, positions, positions + starts[:-1], [(len(spans), part)])
