"""Decoding by replayed graphs gives the bits of decoding without them, and what fills up a batch touches nobody."""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from server.engine.attention.varlen_rows import flash_attention
from server.engine.engine import Engine
from server.engine.fast.decode_graphs import LARGEST_BUCKET, CudaRecorder, DecodeGraphs, Forward, buckets, capture
from server.engine.fast.optimise import optimise
from server.engine.model.frozen import FrozenModel
from tests.engine.fake_cuda import FakeCuda, HostWait, StrayWrite, opaque_varlen_attn
from tests.engine.optimised import answers, assert_same, optimised, rough
from tests.engine.tiny_families import tiny_family
from tests.engine.varlen_reference import reference_varlen_attn
from tests.support import (
    TINY,
    VOCAB_SIZE,
    byte_tokenizer,
    make_engine,
    random_soft_prompt,
    request,
    run_engine,
    tiny_model,
)


class RowByRow(TorchFunctionMode):
    """Products and norms of one row at a time: on a CPU they round otherwise by how many rows there are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.linear, F.rms_norm):
            return func(*args, **(kwargs or {}))
        x, *others = args
        rows = [func(row, *others, **(kwargs or {})) for row in x.reshape(-1, 1, x.shape[-1])]
        return torch.cat(rows).view(*x.shape[:-1], -1)


class Tape:
    """A recorder for tests: runs the captured work again, on the same memory, into the same memory."""

    def __init__(self) -> None:
        self.replayed: list[int] = []

    def __call__(self, forward: Forward) -> Forward:
        logits = forward().clone()

        def replay() -> torch.Tensor:
            self.replayed.append(len(logits))
            return logits.copy_(forward())

        return replay


def engine_of(model: FrozenModel, tape: Tape | None = None, **limits: int) -> Engine:
    engine = make_engine(model, **limits)
    engine.runner.varlen = reference_varlen_attn
    if tape is not None:
        engine.runner.graphs = capture(model, engine.kv_cache, engine.runner.varlen, 6, tape)
        assert engine.runner.graphs is not None
    return engine


@pytest.mark.parametrize(
    ("max_sequences", "expected"),
    [
        (1, [1]),
        (2, [1, 2]),
        (6, [1, 2, 4, 6]),
        (64, [1, 2, 4, 8, 16, 32, 64]),
        (100, [1, 2, 4, 8, 16, 32, 64, 100]),
        (4096, [1, 2, 4, 8, 16, 32, 64, 128, 256, LARGEST_BUCKET]),
    ],
)
def test_buckets_are_powers_of_two_and_the_largest_batch(max_sequences: int, expected: list[int]) -> None:
    assert buckets(max_sequences) == expected


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_replayed_steps_answer_bit_for_bit_what_eager_ones_do(architecture: str, one_thread: None) -> None:
    tape = Tape()
    with RowByRow():
        got, expected = (
            answers(engine_of(optimised(architecture, {"fused"}, dtype=torch.float32), recorder), arrive_every=3)
            for recorder in (tape, None)
        )
    assert got == expected
    assert all(outcome.logprobs for outcome in got.values())
    assert {1, 2, 4, 6} <= set(tape.replayed)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_any_model_answers_the_same_by_graphs_as_by_the_layout_for_cpus(architecture: str) -> None:
    tape = Tape()
    got = answers(engine_of(rough(architecture), tape), arrive_every=3)
    assert_same(got, answers(make_engine(rough(architecture)), arrive_every=3))
    assert {1, 2, 4, 6} <= set(tape.replayed)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6])
def test_rows_that_fill_up_a_batch_write_to_the_scratch_position_only(rows: int) -> None:
    model = tiny_model(dtype=torch.float32)
    engine = engine_of(model, Tape())
    assert engine.runner.graphs is not None
    cache = engine.kv_cache
    cache.states.normal_(generator=torch.Generator().manual_seed(0))
    before = cache.states.clone()
    positions, starts = [3 + 2 * row for row in range(rows)], [32 * row for row in reversed(range(rows))]
    engine.runner.graphs.run(list(range(rows)), positions, starts)
    changed = (cache.states != before).any(dim=(0, 1, 3, 4)).nonzero().squeeze(1).tolist()
    own = sorted(start + position for start, position in zip(starts, positions, strict=True))
    assert changed == own + ([] if rows in engine.runner.graphs.buckets else [cache.scratch])


def test_the_scratch_position_is_in_no_slot() -> None:
    cache = make_engine(tiny_model()).kv_cache
    assert cache.scratch == cache.allocator.num_positions == cache.states.shape[2] - 1


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_left_in_other_slots_reaches_no_row(poison: float) -> None:
    def outcome(fill: float) -> list[int]:
        engine = engine_of(tiny_model(dtype=torch.float32), Tape())
        engine.kv_cache.states[:, :, 32 : engine.kv_cache.scratch] = fill
        return run_engine(engine, [(request("a", [5, 6, 7], max_new_tokens=8, ignore_eos=True), None)])["a"].token_ids

    assert outcome(poison) == outcome(0.0)


def test_only_steps_in_which_everybody_decodes_are_replayed() -> None:
    """A virtual token has no id, so it is computed eagerly, even if it is alone in its step."""
    tape = Tape()
    model = tiny_model(dtype=torch.float32)
    engine = engine_of(model, tape, max_sequences=1, max_batch_tokens=1)
    prompt = random_soft_prompt(model.spec, 1)
    eager, graphs = engine_of(model), engine
    asked = [(request("a", [5, 6, 7], max_new_tokens=4, ignore_eos=True), prompt)]
    got, expected = run_engine(graphs, asked), run_engine(eager, asked)
    assert got["a"].token_ids == expected["a"].token_ids
    # The last input token and three of the new ones: each is one token that asks for the next.
    assert tape.replayed[-4:] == [1] * 4
    assert len(tape.replayed) == 4


def test_a_batch_beyond_the_largest_bucket_runs_eagerly() -> None:
    tape = Tape()
    model = tiny_model(dtype=torch.float32)
    engine = make_engine(model)
    engine.runner.varlen = reference_varlen_attn
    engine.runner.graphs = capture(model, engine.kv_cache, engine.runner.varlen, 2, tape)
    work = [(request(str(i), [5 + i], max_new_tokens=6 if i else 12, ignore_eos=True), None) for i in range(5)]
    expected = run_engine(engine_of(model), work)
    got = run_engine(engine, work)
    assert [got[str(i)].token_ids for i in range(5)] == [expected[str(i)].token_ids for i in range(5)]
    assert set(tape.replayed) == {1}


def test_what_cannot_be_captured_is_said_in_one_line_and_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    def record(forward: Forward) -> Callable[[], torch.Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be …")

    model = tiny_model()
    engine = make_engine(model)
    with caplog.at_level(logging.INFO):
        assert capture(model, engine.kv_cache, reference_varlen_attn, 2, record) is None
    assert caplog.messages == [
        "decoding runs without CUDA graphs, because they cannot be captured: "
        "operation not permitted when stream is capturing"
    ]


def test_without_cuda_nothing_is_captured_and_nothing_said(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    engine = make_engine(model)
    assert engine.runner.varlen is None
    assert capture(model, engine.kv_cache, engine.runner.varlen, 2) is None
    assert caplog.messages == []


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("architecture", sorted(TINY.keys() - {"gemma2"}))
def test_what_is_captured_asks_the_device_for_no_number(architecture: str, fused: bool) -> None:
    """Which would make the host wait, and cannot be captured. Fake tensors have no numbers to answer with."""
    model = rough(architecture, torch.bfloat16)
    optimise(model, {"fused"} if fused else set(), None)
    recorded: list[Forward] = []

    def record(forward: Forward) -> Forward:
        recorded.append(forward)
        return forward

    assert capture(model, make_engine(model).kv_cache, flash_attention, 4, record) is not None
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
        assert [tuple(forward().shape) for forward in recorded] == [(4, VOCAB_SIZE), (2, VOCAB_SIZE), (1, VOCAB_SIZE)]
        with pytest.raises(DataDependentOutputException):
            recorded[0]()[0, 0].item()


CAPTURED = [
    ("llama", True),
    ("llama", False),
    ("qwen3", True),
    ("gpt2", False),
    ("olmo2", False),
    ("phi3", False),
    ("gemma3_text", False),
    ("mistral", True),
    ("mistral", False),
    ("gpt_neox", False),
    ("opt", False),
    ("qwen3_moe", False),
]


@torch.inference_mode()
@pytest.mark.parametrize(("architecture", "fused"), CAPTURED)
def test_a_graph_reads_nothing_that_was_freed_and_neither_waits_nor_writes_elsewhere(
    architecture: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake graphs raise for all of these; replays of other buckets come in between, as they do in a server."""
    if architecture in TINY:
        model = rough(architecture, torch.float32)
    else:
        model = FrozenModel(tiny_family(architecture), byte_tokenizer(), name="tiny", max_model_len=128)
    optimise(model, {"fused"} if fused else set(), None)
    cache = make_engine(model).kv_cache
    cuda = FakeCuda(may_write={cache.states.untyped_storage().data_ptr()})
    cuda.install(monkeypatch)
    graphs = DecodeGraphs(model, cache, opaque_varlen_attn, 6, CudaRecorder(torch.device("cpu")))
    eager = DecodeGraphs(model, cache, opaque_varlen_attn, 6, lambda forward: forward)
    gc.collect()
    assert len(cuda.graphs) == len(graphs.buckets) == 4
    dice = random.Random(0)
    cache.states.normal_(generator=torch.Generator().manual_seed(0))
    for rows in (6, 1, 3, 2, 5, 1, 4):
        ids, positions = ([dice.randrange(end) for _ in range(rows)] for end in (256, 31))
        starts = [32 * slot for slot in dice.sample(range(8), rows)]
        expected = eager.run(ids, positions, starts).clone()
        torch.testing.assert_close(graphs.run(ids, positions, starts), expected)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda outside, row: row + outside.max().item(), HostWait),
        (lambda outside, row: row[row > 0].sum() + row, HostWait),
        (lambda outside, row: outside.add_(row), StrayWrite),
    ],
)
def test_the_fake_graphs_refuse_what_a_device_would(
    spoil: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCuda().install(monkeypatch)
    outside = torch.ones(4)
    with pytest.raises(error):
        CudaRecorder(torch.device("cpu"))(lambda: spoil(outside, torch.arange(4.0)))


def test_what_makes_the_host_wait_is_never_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    with pytest.raises(HostWait):
        CudaRecorder(torch.device("cpu"))(lambda: torch.arange(4.0) + torch.ones(4).max().item())
    assert not cuda.graphs, "a capture that fails leaves the allocator in a bad state"
    assert float(torch.ones(1)) == 1, "waiting is allowed again"


@pytest.mark.cuda
@torch.inference_mode()
def test_captured_graphs_give_the_logits_of_eager_steps() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    model.module.to("cuda")  # type: ignore[arg-type]
    on_device = FrozenModel(model.module, model.tokenizer, name="tiny", max_model_len=128)
    optimise(on_device, {"fused"}, None)
    engine = make_engine(on_device)
    assert engine.runner.varlen is not None
    row = [1, 2, 3], [4, 9, 0], [64, 0, 32]
    eager = DecodeGraphs(on_device, engine.kv_cache, engine.runner.varlen, 6, lambda forward: forward).run(*row).clone()
    graphs = DecodeGraphs(on_device, engine.kv_cache, engine.runner.varlen, 6, CudaRecorder(on_device.device))
    for _ in range(3):
        torch.testing.assert_close(graphs.run(*row), eager, rtol=1e-2, atol=1e-2)
