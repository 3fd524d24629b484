"""The layout for CUDA attends like the one for CPUs, whatever the order and the lengths of the slots."""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from server.contracts import ModelSpec
from server.engine.attention.cached_rows import CachedRows, Span
from server.engine.attention.interface import AttentionRules
from server.engine.attention.varlen_rows import (
    OPERATOR,
    VarlenRows,
    flash_attention,
    log_attention,
    operator_arguments,
    varlen_attention,
)
from server.engine.memory.kv_cache import KVCache
from server.engine.model.frozen import FrozenModel
from tests.engine.optimised import answers, assert_same, rough
from tests.engine.tiny_families import tiny_family
from tests.engine.varlen_reference import log_denominators, reference_varlen_attn
from tests.support import byte_tokenizer, make_engine, tiny_model

WINDOWS = [None, 1, 3, 8, 1000]


def spans_of(cache: KVCache, rng: random.Random, *, only_decodes: bool = False) -> list[Span]:
    """Sequences anywhere in the pool, in any order, decoding or prefilling."""
    slots = [slot for n in (100, 10, 60, 20, 30, 128, 5) if (slot := cache.allocator.allocate(n)) is not None]
    rng.shuffle(slots)
    counts = [1 if only_decodes or rng.random() < 0.5 else rng.randint(1, slot.length) for slot in slots]
    return [Span(slot, rng.randint(0, slot.length - count), count) for slot, count in zip(slots, counts, strict=True)]


def states(cache: KVCache, tokens: int, seed: int, heads: int = 4) -> list[torch.Tensor]:
    """Query, key and value of a flat row, views as a layer hands them over."""
    kv_heads, dim = cache.states.shape[3:]
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(tokens, heads + 2 * kv_heads, dim, generator=generator, dtype=torch.float64)
    return list(torch.split(row.to(cache.states), [heads, kv_heads, kv_heads], dim=1))


def filled(spec: ModelSpec, seed: int) -> KVCache:
    cache = KVCache(spec, num_slabs=6, shortest_slot=16)
    cache.states.copy_(torch.randn(cache.states.shape, generator=torch.Generator().manual_seed(seed)))
    return cache


@pytest.mark.parametrize("only_decodes", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, -2.0, 0.5, 3.0])], ids=["plain", "sinks"])
@pytest.mark.parametrize("seed", range(3))
def test_it_attends_like_the_layout_for_cpus(
    tiny: FrozenModel, seed: int, sinks: torch.Tensor | None, window: int | None, only_decodes: bool
) -> None:
    plain, varlen = filled(tiny.spec, seed), filled(tiny.spec, seed)
    spans = spans_of(plain, random.Random(seed), only_decodes=only_decodes)
    rows = [part.transpose(0, 1) for part in states(plain, sum(span.count for span in spans), seed)]
    layouts = CachedRows(plain, spans), VarlenRows.of(varlen, reference_varlen_attn, spans)
    rules = AttentionRules(0.3, window, sinks=sinks)
    for layer in range(2):
        expected, got = (layout.attend(layer, rows[0], rows[1], rows[2], rules) for layout in layouts)
        torch.testing.assert_close(got, expected)
    assert layouts[1].position_ids.tolist() == layouts[0].position_ids.tolist()
    assert torch.equal(plain.states, varlen.states)


@pytest.mark.parametrize("only_decodes", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_nothing_is_read_but_what_is_filled(tiny: FrozenModel, window: int | None, only_decodes: bool) -> None:
    clean, poisoned = filled(tiny.spec, 1), filled(tiny.spec, 1)
    spans = spans_of(clean, random.Random(1), only_decodes=only_decodes)
    outside = torch.ones(clean.states.shape[2], dtype=torch.bool)
    for span in spans:
        outside[span.slot.start : span.slot.start + span.end] = False
    poisoned.states[:, :, outside] = float("nan")
    rows = [part.transpose(0, 1) for part in states(clean, sum(span.count for span in spans), 1)]
    got, expected = (
        VarlenRows.of(cache, reference_varlen_attn, spans).attend(
            1, rows[0], rows[1], rows[2], AttentionRules(1, window)
        )
        for cache in (poisoned, clean)
    )
    assert torch.isfinite(got).all()
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("only_decodes", "sliding", "asked"),
    [(True, None, (-1, -1)), (True, 8, (-1, -1)), (False, None, (-1, 0)), (False, 8, (7, 0))],
)
def test_decodes_are_a_call_of_their_own_that_asks_for_no_mask(
    tiny: FrozenModel, only_decodes: bool, sliding: int | None, asked: tuple[int, int]
) -> None:
    """Only then does flash attention put the heads that share keys together, and split long sequences."""
    cache = filled(tiny.spec, 0)
    spans = sorted(spans_of(cache, random.Random(3), only_decodes=only_decodes), key=lambda span: span.count > 1)
    seen = []

    def attention(*args: Any, window_size: tuple[int, int], **others: Any) -> torch.Tensor:
        seen.append((args[5] == 1, window_size))
        return reference_varlen_attn(*args, window_size=window_size, **others)

    rows = [part.transpose(0, 1) for part in states(cache, sum(span.count for span in spans), 0)]
    VarlenRows.of(cache, attention, spans).attend(0, rows[0], rows[1], rows[2], AttentionRules(0.3, sliding))
    assert seen == [(True, (-1, -1))] + ([] if only_decodes else [(False, asked)])


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_an_engine_answers_the_same_by_either_layout(architecture: str) -> None:
    engine = make_engine(rough(architecture))
    engine.runner.varlen = reference_varlen_attn
    assert_same(answers(engine, arrive_every=2), answers(make_engine(rough(architecture)), arrive_every=2))


def test_the_reference_is_called_like_the_real_one() -> None:
    assert inspect.signature(reference_varlen_attn) == inspect.signature(flash_attention)


def flash_attention_on_a_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, ...]:
    """The reference, behind the checks of torch's `mha_varlen_fwd` and with its three surprises."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert query.shape[2] % 8 == 0
    assert query.shape[2] <= 256
    assert dropout_p == 0
    assert not return_debug_mask
    assert not any(value is not None for value in others.values())
    assert seqused_k is not None
    assert scale is not None
    left, right = -1 if window_size_left is None else window_size_left, window_size_right
    if is_causal:
        right = 0
    if max_q == 1:
        assert len(query) == len(seqused_k), (
            "heads that share keys become rows, which needs one token for each sequence"
        )
        assert left == right == -1, "causality is switched off for a lone query, and heads stay apart under a window"
    out = reference_varlen_attn(
        query,
        key,
        value,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        scale=scale,
        window_size=(left, -1 if right is None else right),
        seqused_k=seqused_k,
    )
    logs = log_denominators(
        query,
        key,
        cum_seq_q,
        cum_seq_k,
        max_q=max_q,
        max_k=max_k,
        scale=scale,
        window_size=(left, -1 if right is None else right),
        seqused_k=seqused_k,
    )
    return out, logs, out.new_empty(0), out.new_empty(0), out.new_empty(0)


@pytest.fixture
def flash_on_cpu() -> Iterator[None]:
    """Torch's own operator, with a kernel for CPUs."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(OPERATOR, flash_attention_on_a_cpu, "CPU")
        yield


@pytest.mark.usefixtures("flash_on_cpu")
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
def test_an_engine_calls_torch_s_operator_as_its_checks_allow(architecture: str) -> None:
    model = tiny_model(architecture, dtype=torch.bfloat16, max_model_len=256)
    got, expected = make_engine(model), make_engine(model)
    got.runner.varlen, expected.runner.varlen = flash_attention, reference_varlen_attn
    assert answers(got, arrive_every=2) == answers(expected, arrive_every=2)


@pytest.mark.usefixtures("flash_on_cpu")
@pytest.mark.parametrize("only_decodes", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_sinks_take_their_share_of_what_torch_s_operator_answers(
    tiny: FrozenModel, window: int | None, only_decodes: bool
) -> None:
    cache = filled(dataclasses.replace(tiny.spec, dtype="bfloat16"), 0)
    spans = sorted(spans_of(cache, random.Random(3), only_decodes=only_decodes), key=lambda span: span.count > 1)
    rows = [part.transpose(0, 1) for part in states(cache, sum(span.count for span in spans), 0)]
    rules = AttentionRules(0.3, window, sinks=torch.tensor([1.0, -2.0, 0.5, 3.0]))
    got, expected = (
        VarlenRows.of(cache, attention, spans).attend(0, rows[0], rows[1], rows[2], rules)
        for attention in (flash_attention, reference_varlen_attn)
    )
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.01)


def test_a_model_with_sinks_answers_the_same_by_either_layout() -> None:
    model = FrozenModel(tiny_family("gpt_oss"), byte_tokenizer(), name="gpt_oss", max_model_len=128)
    varlen = make_engine(model)
    varlen.runner.varlen = reference_varlen_attn
    assert_same(answers(varlen, arrive_every=2), answers(make_engine(model), arrive_every=2))


COMMON = "Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k"
OF_ALL = f"{COMMON}, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None"
SINCE_2_5 = (
    f"{OF_ALL}, SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, "
    "Tensor? alibi_slopes=None"
)
SINCE_2_12 = f"{SINCE_2_5}, Tensor? block_table=None, int? num_splits=None"
QUANTISED = SINCE_2_5.replace(" *,", " Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, *,")
SCHEMAS = {
    "2.4": [f"aten::{OPERATOR}({OF_ALL})"],
    "2.9": [f"aten::{OPERATOR}({SINCE_2_5})"],
    "2.10": [f"aten::{OPERATOR}({SINCE_2_5})"],
    "2.11": [f"aten::{OPERATOR}({SINCE_2_5})", f"aten::{OPERATOR}.quantized({QUANTISED})"],
    "2.12": [f"aten::{OPERATOR}({SINCE_2_12})", f"aten::{OPERATOR}.quantized({QUANTISED})"],
    "2.13": [f"aten::{OPERATOR}({SINCE_2_12})", f"aten::{OPERATOR}.quantized({QUANTISED})"],
    "patched": [f"aten::{OPERATOR}({OF_ALL})", f"aten::{OPERATOR}.quantized({QUANTISED})"],
}
"""Overloads of the operator by version of torch, as in their native_functions.yaml."""


@pytest.mark.parametrize(("version", "takes"), [(version, version not in ("2.4", "patched")) for version in SCHEMAS])
def test_the_operator_s_schema_decides_and_the_log_says_why_not(
    version: str, takes: bool, tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    schemas = [torch._C.parse_schema(f"{schema} -> Tensor") for schema in SCHEMAS[version]]
    monkeypatch.setattr(torch._C, "_jit_get_schemas_for_operator", lambda name: schemas)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    spec = dataclasses.replace(tiny.spec, device="cuda:0", dtype="bfloat16", head_dim=64)
    with caplog.at_level("INFO"):
        assert (varlen_attention(spec, PLAIN) is flash_attention) == takes
        log_attention(spec, PLAIN)
    assert ("seqused_k" in caplog.text) != takes
    assert len(caplog.messages) == 1


def test_this_torch_has_the_operator() -> None:
    assert {"seqused_k", "window_size_left", "scale"} <= operator_arguments()


def test_rocm_is_left_to_the_other_layout(tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its flash attention takes lengths from `cu_seq_k`, which says here where slots begin."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    spec = dataclasses.replace(tiny.spec, device="cuda:0", dtype="bfloat16", head_dim=64)
    assert varlen_attention(spec, PLAIN) is None


PLAIN = [AttentionRules(0.1), AttentionRules(0.1, 8)]


@pytest.mark.parametrize(
    ("changes", "rules", "capability", "takes"),
    [
        ({}, PLAIN, (8, 0), True),
        ({}, PLAIN, (9, 0), True),
        ({}, PLAIN, (7, 5), False),
        ({"dtype": "float32"}, PLAIN, (9, 0), False),
        ({"head_dim": 12}, PLAIN, (9, 0), False),
        ({"head_dim": 512}, PLAIN, (9, 0), False),
        ({"device": "cpu"}, PLAIN, (9, 0), False),
        ({}, [*PLAIN, AttentionRules(0.1, softcap=5.0)], (9, 0), False),
    ],
)
def test_what_flash_attention_does_not_do_is_left_to_the_other_layout(
    monkeypatch: pytest.MonkeyPatch,
    tiny: FrozenModel,
    changes: dict[str, Any],
    rules: list[AttentionRules],
    capability: tuple[int, int],
    takes: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    spec = dataclasses.replace(tiny.spec, **{"device": "cuda:0", "dtype": "bfloat16", "head_dim": 64, **changes})
    assert varlen_attention(spec, rules) is (flash_attention if takes else None)


@pytest.mark.cuda
@pytest.mark.parametrize("only_decodes", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_torch_s_own_attention_does_what_the_reference_does(
    tiny: FrozenModel, head_dim: int, window: int | None, only_decodes: bool
) -> None:
    spec = dataclasses.replace(tiny.spec, dtype="bfloat16", head_dim=head_dim)
    spec_on_device = dataclasses.replace(spec, device="cuda")
    on_host, on_device = filled(spec, 2), KVCache(spec_on_device, 6, 16)
    spans = spans_of(on_host, random.Random(2), only_decodes=only_decodes)
    outside = torch.ones(on_host.states.shape[2], dtype=torch.bool)
    for span in spans:
        outside[span.slot.start : span.slot.start + span.end] = False
    on_host.states[:, :, outside] = float("nan")
    on_device.states.copy_(on_host.states)
    rows = [part.transpose(0, 1) for part in states(on_host, sum(span.count for span in spans), 2)]
    rules = AttentionRules(0.1, window)
    expected = VarlenRows.of(on_host, reference_varlen_attn, spans).attend(1, rows[0], rows[1], rows[2], rules)
    query, key, value = (part.cuda() for part in rows)
    with torch.inference_mode():
        attention = varlen_attention(spec_on_device, [rules])
        assert attention is not None
        got = VarlenRows.of(on_device, attention, spans).attend(1, query, key, value, rules)
    torch.testing.assert_close(got.cpu().float(), expected.float(), rtol=2e-2, atol=2e-2)
