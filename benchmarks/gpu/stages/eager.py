"""Measures steps without CUDA graphs: chunks beside decodes, calls of the attention, sampling rules.

Under realistic load, most steps contain prefills and are launched operator by operator.
"""

from __future__ import annotations

import importlib.util
import inspect
import statistics
import time
from typing import Any

import torch
import torch.nn.attention.varlen as torch_varlen
from host import RULES
from random_llama import inputs

from benchmarks.gpu.devices import seconds_of, wait
from benchmarks.gpu.engines import batch_of, end_all, load, tokens_per_second, until_all_decode
from benchmarks.gpu.stage import Run
from server.contracts import GenerationRequest, Grammar, GrammarKind, SamplingParams
from server.engine.attention.cached_rows import Span
from server.engine.attention.interface import AttentionRules
from server.engine.attention.varlen_rows import Part, VarlenAttention, VarlenRows, flash_attention
from server.engine.engine import Engine
from server.engine.memory.slots import Slot
from tests.engine.varlen_reference import reference_varlen_attn

ROUNDS = 3
SCHEMA = '{"type": "object", "properties": {"name": {"type": "string"}, "size": {"type": "integer"}}}'
LABELS = tuple((tuple(range(40 + i, 42 + i))) for i in range(4))


def measure(run: Run) -> None:
    """Measure steps, then attention calls, then sampling rules."""
    engine = load(run, max_sequences=256, max_model_len=16384, max_batch_tokens=8448, kv_memory="48GiB").engine()
    for decodes in (0, 4) if run.rehearse else (0, 64, 255):
        _chunks(run, engine, decodes, (16, 32) if run.rehearse else (512, 2048, 8192))
    if run.rehearse:
        run.skip("flash attention itself")
    _calls(run, engine)
    rows = 4 if run.rehearse else 256
    for name, rules in RULES.items():
        _rule(run, engine, rows, name, rules)
    _labels(run, engine, rows)
    if importlib.util.find_spec("llguidance") is None:
        run.skip("grammars", "needs llguidance, which is not installed")
        return
    grammar = Grammar(GrammarKind.JSON_SCHEMA, SCHEMA)
    work = batch_of(rows // 4, [None], 16, 8, grammar=grammar)
    run.note(json_schema_tokens_s=tokens_per_second(engine, work))


def _chunks(run: Run, engine: Engine, decodes: int, chunks: tuple[int, ...]) -> None:
    """Time steps that prefill one chunk beside decoding sequences."""
    work = batch_of(decodes, [None], 100, 8)
    until_all_decode(engine, work)
    for chunk in chunks:
        times, host = [], []
        for number in range(ROUNDS + 1):
            rules = SamplingParams(max_new_tokens=1, ignore_eos=True)
            engine.add(GenerationRequest(f"chunk {number}", inputs(number, chunk), rules), None)
            began, thread = time.perf_counter(), time.thread_time()
            engine.step()
            times.append(time.perf_counter() - began)
            host.append(time.thread_time() - thread)
            engine.abort(f"chunk {number}")
        name = f"chunk_{chunk}_beside_{decodes}"
        run.note(**{f"{name}_ms": 1000 * min(times[1:]), f"{name}_host_ms": 1000 * min(host[1:])})
    end_all(engine, work)


@torch.inference_mode()
def _calls(run: Run, engine: Engine) -> None:
    """Time a layer's attention for 255 decodes and a chunk of 4,096 tokens: in one call, and in two as in a step."""
    cache, heads = engine.kv_cache, engine.model.spec.num_attention_heads or 1
    decodes, chunk = (3, 40) if run.rehearse else (255, 4096)
    spans = [Span(Slot(256, 256 * i), 200, 1) for i in range(decodes)]
    spans.append(Span(Slot(2 * chunk, 256 * (decodes + 1)), 0, chunk))
    attention = reference_varlen_attn if run.rehearse else flash_attention
    kv_heads, dim = cache.states.shape[3:]
    tokens = sum(span.count for span in spans)
    row = torch.randn(tokens, heads + 2 * kv_heads, dim, dtype=cache.states.dtype, device=cache.states.device)
    query, key, value = torch.split(row.transpose(0, 1), [heads, kv_heads, kv_heads])
    two = VarlenRows.of(cache, attention, spans)
    device = cache.states.device
    starts = torch.tensor([*(span.slot.start for span in spans), 0], dtype=torch.int32, device=device)
    ends = torch.tensor([span.end for span in spans], dtype=torch.int32, device=device)
    counts = torch.tensor([0, *(span.count for span in spans)], device=device)
    part = Part(starts, ends, counts.cumsum(0).int(), max_q=chunk, max_k=max(chunk, 201))
    pool_positions = torch.cat([torch.arange(s.slot.start + s.start, s.slot.start + s.end) for s in spans]).to(device)
    one = VarlenRows(cache, attention, two.position_ids, pool_positions, [(tokens, part)])
    rules = AttentionRules(dim**-0.5)
    for name, layout in (("one_call", one), ("two_calls", two)):
        # Type: ignore[misc].
        seconds = seconds_of(lambda layout=layout: layout.attend(0, query, key, value, rules), device, 10)
        run.note(**{f"attention_{name}_ms": 1000 * seconds})
    _host_of_a_call(run, engine, attention, starts, ends)


def _host_of_a_call(
    run: Run, engine: Engine, attention: VarlenAttention, starts: torch.Tensor, ends: torch.Tensor
) -> None:
    """Microseconds on the host for one call of the operator, and of its wrapper function."""
    device, rows = starts.device, min(64, len(ends) - 1)
    keys, values = engine.kv_cache.states[0]
    heads = engine.model.spec.num_attention_heads or 1
    query = torch.randn(rows, heads, keys.shape[2], dtype=keys.dtype, device=device)
    first = torch.arange(rows + 1, dtype=torch.int32, device=device)
    given = (query, keys, values, first, starts[: rows + 1], 1, 8192)
    options: dict[str, Any] = {"scale": 0.1, "window_size": (-1, -1), "seqused_k": ends[:rows]}
    calls: dict[str, Any] = {"operator": lambda: attention(*given, **options)}
    if run.rehearse:
        run.skip("varlen_attn")
    elif {"seqused_k", "enable_gqa"} <= inspect.signature(torch_varlen.varlen_attn).parameters.keys():
        calls["varlen_attn"] = lambda: torch_varlen.varlen_attn(*given, **options, enable_gqa=True)
    else:
        run.skip("varlen_attn", "this torch has it without seqused_k")
    for name, call in calls.items():
        seconds_of(call, device, 3)
        began = time.thread_time()
        for _ in range(200):
            call()
        run.note(**{f"{name}_host_us": 1e6 * (time.thread_time() - began) / 200})
        wait(device)


def _rule(run: Run, engine: Engine, rows: int, name: str, rules: dict[str, Any]) -> None:
    """Time decoding steps in which all rows have the same sampling rules."""
    work = batch_of(rows, [None], 40, 8, **rules)
    until_all_decode(engine, work)
    times, host = [], []
    for _ in range(5 if run.rehearse else 20):
        began, thread = time.perf_counter(), time.thread_time()
        engine.step()
        times.append(1000 * (time.perf_counter() - began))
        host.append(1000 * (time.thread_time() - thread))
    run.note(**{f"{name}_step_ms": statistics.median(times), f"{name}_host_ms": statistics.median(host)})
    end_all(engine, work)


def _labels(run: Run, engine: Engine, rows: int) -> None:
    """Measure classifications per second, each with four labels of two tokens."""
    seconds = []
    for _ in range(2):
        rules = SamplingParams(max_new_tokens=0)
        for i in range(rows):
            engine.add(GenerationRequest(f"l{i}", inputs(i, 64), rules, labels=LABELS), None)
        began = time.perf_counter()
        while engine.has_work:
            engine.step()
        seconds.append(time.perf_counter() - began)
    run.note(labels_requests_s=rows / min(seconds))
