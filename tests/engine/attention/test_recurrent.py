"""Models with recurrent states answer as their own forward does, in any chunks, beside anybody, after anything."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from server.contracts import FinishReason, GenerationRequest
from server.engine.attention.interface import StateSlice
from server.engine.build_engine import build_engine, plan_memory
from server.engine.engine import Engine
from server.engine.fast.optimise import _try_out
from server.engine.kernels.library import Kernels
from server.engine.memory.kv_cache import Computed, KVCache, bytes_per_position
from server.engine.memory.state_pool import StatePool, bytes_per_state
from server.engine.model.exactness import errors, own_logits, refuse_inexact
from server.engine.model.frozen import FrozenModel
from server.engine.model.hybrids import ShortConvolution
from server.errors import InvalidSoftPrompt, UnsupportedModel
from server.settings import Settings
from server.soft_prompts.soft_prompt import SoftPrompt, check_shape
from tests.engine.hybrid_models import hybrid
from tests.engine.optimised import engine_for
from tests.engine.varlen_reference import reference_varlen_attn
from tests.support import (
    HYBRIDS,
    RecordingModel,
    logits_of_requests,
    make_engine,
    random_soft_prompt,
    request,
    run_engine,
    tiny_model,
)

INPUT = (72, 101, 108, 108, 111)
LENGTHS = {"short": 1, "of two": 2, "medium": 9, "long": 40}
Work = list[tuple[GenerationRequest, SoftPrompt | None]]


def own(model: FrozenModel, ids: Sequence[int], soft_prompt: SoftPrompt | None) -> torch.Tensor:
    """Logits `[tokens, vocab_size]` of the model's own forward over virtual tokens and tokens, without a cache."""
    embeddings = model.embed(torch.tensor(ids))
    if soft_prompt is not None:
        embeddings = torch.cat([soft_prompt.tensor.to(model.dtype), embeddings])
    return own_logits(model.module, inputs_embeds=embeddings)[-len(ids) :]


def work_of(model: FrozenModel) -> Work:
    """Inputs of all lengths, each of a key of its own, after no soft prompt, after three, and after one again."""
    prompts = {
        "none": None,
        "one": random_soft_prompt(model.spec, 1, 1),
        "few": random_soft_prompt(model.spec, 5, 2),
        "many": random_soft_prompt(model.spec, 20, 3),
        "few again": random_soft_prompt(model.spec, 5, 2),
    }
    return [
        (request(f"{length}, {task}", ids_of(length), task, key_id=length, max_new_tokens=6, ignore_eos=True), prompt)
        for length in LENGTHS
        for task, prompt in prompts.items()
    ]


def ids_of(length: str) -> list[int]:
    return [(7 * i + len(length)) % 256 for i in range(LENGTHS[length])]


@torch.inference_mode()
def assert_answers(engine: Engine, model: RecordingModel, work: Work) -> None:
    """What an engine answers is what the model's own forward says of the same tokens.

    The gated delta rule computes in float32 in any dtype, and weights as large as these enlarge its rounding: with the
    rule in float64 the largest error is 1e-7.
    """
    largest = 1e-4 if "qwen" in model.spec.name else 1e-5
    for asked, soft_prompt in work:
        engine.add(asked, soft_prompt)
    found = logits_of_requests(engine, model)
    engine.check_integrity()
    for asked, soft_prompt in work:
        logits = found[asked.request_id].float()
        answer = logits.argmax(-1).tolist()
        expected = own(model, [*asked.input_ids, *answer[:-1]], soft_prompt)[-len(answer) :]
        assert float(errors(logits, expected).max()) < largest, asked.request_id


@pytest.mark.parametrize(
    ("architecture", "dtype", "max_batch_tokens"),
    [
        ("lfm2", torch.float32, 5),
        ("lfm2", torch.float64, 6),
        ("lfm2", torch.float64, 7),
        ("lfm2", torch.float32, 16),
        ("lfm2", torch.float32, 200),
        ("qwen3_5_text", torch.float32, 7),
        ("qwen3_5_text", torch.float64, 200),
    ],
)
def test_logits_are_the_models_own_in_any_chunks_beside_anybody_and_from_a_cached_prefix(
    architecture: str, dtype: torch.dtype, max_batch_tokens: int
) -> None:
    model = RecordingModel(tiny_model(architecture, dtype=dtype))
    engine = make_engine(model, max_sequences=5, max_batch_tokens=max_batch_tokens)
    assert_answers(engine, model, work_of(model))
    assert_answers(engine, model, work_of(model))  # all prefixes are known now, and every slot has had an owner
    assert (engine.prefixes.computed, len(engine.prefixes)) == (3, 3)


@pytest.mark.parametrize("fields", [{"conv_L_cache": 2}, {"conv_L_cache": 4, "conv_bias": True}])
def test_convolutions_of_any_length_and_with_a_bias_are_the_models_own(fields: dict[str, Any]) -> None:
    model = RecordingModel(hybrid(**fields))
    refuse_inexact(model)
    assert_answers(make_engine(model, max_batch_tokens=9), model, work_of(model))


def test_attention_for_cuda_and_compiled_attention_serve_states_too(kernels: Kernels) -> None:
    model = RecordingModel(tiny_model("lfm2", dtype=torch.float32))
    _try_out(kernels, model)
    compiled = engine_for(model, kernels)
    assert compiled.runner.compiled is not None
    assert_answers(compiled, model, work_of(model))
    on_cuda = make_engine(model)
    on_cuda.runner.varlen = reference_varlen_attn
    assert_answers(on_cuda, model, work_of(model))


@pytest.mark.parametrize("step", [1, 3, 6])
def test_after_an_abort_at_any_moment_the_next_owner_of_a_state_begins_anew(lfm2: FrozenModel, step: int) -> None:
    model = RecordingModel(lfm2)
    engine = make_engine(model, max_sequences=4, max_batch_tokens=8, num_slabs=1)
    soft_prompt = random_soft_prompt(model.spec, 12)
    asked = [(request("gone", range(30), "task", n=3, max_new_tokens=20, ignore_eos=True), soft_prompt)]
    run_engine(engine, asked, abort={step: "gone"})
    assert_answers(engine, model, work_of(model))


@pytest.mark.parametrize("num_virtual_tokens", [0, 7])
def test_choices_begin_with_the_state_after_their_input(lfm2: FrozenModel, num_virtual_tokens: int) -> None:
    soft_prompt = random_soft_prompt(lfm2.spec, num_virtual_tokens) if num_virtual_tokens else None
    alone = run_engine(make_engine(lfm2), [(request("r", INPUT, max_new_tokens=9), soft_prompt)])["r"]
    several = run_engine(make_engine(lfm2), [(request("r", INPUT, n=3, max_new_tokens=9), soft_prompt)])
    assert [several[name].token_ids for name in ("r", "r/1", "r/2")] == [alone.token_ids] * 3
    assert len(set(alone.token_ids)) > 1


@pytest.mark.parametrize("max_batch_tokens", [8, 64])
@pytest.mark.parametrize("num_virtual_tokens", [0, 7])
def test_labels_and_inputs_are_scored_as_the_model_sees_them(
    lfm2: FrozenModel, num_virtual_tokens: int, max_batch_tokens: int
) -> None:
    soft_prompt = random_soft_prompt(lfm2.spec, num_virtual_tokens) if num_virtual_tokens else None
    labels = [(7,), (7, 9), (200, 3, 5, 5)]
    work = [
        (request("labels", INPUT, labels=labels), soft_prompt),
        (request("scored", INPUT, input_logprobs=True, max_new_tokens=0), soft_prompt),
    ]
    outcomes = run_engine(make_engine(lfm2, max_batch_tokens=max_batch_tokens), work)
    for index, label in enumerate(labels):
        expected = own(lfm2, [*INPUT, *label[:-1]], soft_prompt).log_softmax(-1)[len(INPUT) - 1 :]
        scored = outcomes[f"labels/{index}" if index else "labels"].scored
        assert [one.logprob for one in scored] == pytest.approx(
            expected.gather(1, as_column(label))[:, 0].tolist(), abs=1e-4
        )
    expected = own(lfm2, INPUT, soft_prompt).log_softmax(-1)[:-1].gather(1, as_column(INPUT[1:]))[:, 0]
    assert [one.logprob for one in outcomes["scored"].scored[1:]] == pytest.approx(expected.tolist(), abs=1e-4)


def as_column(ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor(ids)[:, None]


def test_a_poisonous_soft_prompt_fails_alone_whether_it_ends_or_hangs_up(lfm2: FrozenModel) -> None:
    poison = SoftPrompt("PROMPT_TUNING", torch.full((5, lfm2.spec.hidden_size), float("inf")))
    good = request("good", INPUT, max_new_tokens=8)
    expected = run_engine(make_engine(lfm2), [(good, None)])["good"].token_ids
    engine = make_engine(lfm2, num_slabs=1, max_sequences=4)
    outcomes = run_engine(engine, [(request("bad", INPUT, max_new_tokens=8), poison), (good, None)])
    assert outcomes["bad"].finish_reason is FinishReason.FAILED
    assert outcomes["good"].token_ids == expected
    engine.add(request("evil", range(100), max_new_tokens=4), poison)
    engine.step()
    engine.step()
    assert not states_of(engine).states.isfinite().all(), "the attack does nothing here"
    engine.abort("evil")
    again = [(request(f"again {i}", INPUT, max_new_tokens=8), None) for i in range(8)]
    assert all(outcome.token_ids == expected for outcome in run_engine(engine, again).values())
    assert not len(engine.prefixes)


def states_of(engine: Engine) -> StatePool:
    assert engine.kv_cache.recurrent is not None
    return engine.kv_cache.recurrent


def test_a_copy_with_a_state_that_is_not_finite_is_not_finite() -> None:
    keys_and_values = torch.zeros(1, 2, 3, 1, 4)
    assert Computed(keys_and_values, torch.zeros(3)).is_finite
    assert not Computed(keys_and_values, torch.tensor([0.0, float("nan")])).is_finite
    assert not Computed(keys_and_values.fill_(float("inf")), torch.zeros(3)).is_finite


def test_a_failed_step_leaves_states_as_they_were(lfm2: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike keys and values, what is added to a state twice is there twice."""
    engine = make_engine(lfm2)
    engine.add(request("r", INPUT, max_new_tokens=9, ignore_eos=True), None)
    engine.step()
    before = states_of(engine).states.clone()
    computed: list[weakref.ref[torch.Tensor]] = []
    keep = StatePool.keep

    def keep_and_note(pool: StatePool, place: StateSlice, rows: torch.Tensor, states: torch.Tensor) -> None:
        computed.append(weakref.ref(states))
        keep(pool, place, rows, states)

    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patched:
        patched.setattr("server.engine.runner.begin_choosing", no_memory)
        patched.setattr(StatePool, "keep", keep_and_note)
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
    assert len(computed) == 2, "one for each convolution"
    assert not any(states() is not None for states in computed), "a failed step holds memory that the next one needs"
    assert torch.equal(states_of(engine).states, before)
    expected = run_engine(make_engine(lfm2), [(request("r", INPUT, max_new_tokens=9, ignore_eos=True), None)])
    found = [delta.token.id for _ in range(8) for delta in engine.step() if delta.token is not None]
    assert found == expected["r"].token_ids[1:]


def test_a_sequence_waits_for_a_state_as_it_does_for_a_slot(lfm2: FrozenModel) -> None:
    cache = KVCache(lfm2.spec, num_slabs=4, max_sequences=1)
    first = cache.allocate(10)
    assert first is not None
    assert cache.allocate(10) is None
    cache.check_integrity([first])
    cache.release(first)
    assert cache.allocate(10) is not None
    with pytest.raises(AssertionError, match="leaked"):
        cache.check_integrity([])


def test_keys_and_values_are_kept_of_layers_with_attention_only(lfm2: FrozenModel) -> None:
    spec = lfm2.spec
    assert (spec.num_hidden_layers, spec.num_kv_layers) == (3, 1)
    assert KVCache(spec, 1).states.shape[0] == 1
    assert spec.state_width == 2 * 2 * spec.hidden_size  # two layers, each with two inputs of three
    assert bytes_per_state(replace(spec, dtype="bfloat16")) == 4 * spec.state_width


def test_the_memory_plan_counts_states_and_a_copy_of_one(lfm2: FrozenModel) -> None:
    spec = replace(lfm2.spec, state_width=2**20)
    state, slab = bytes_per_state(spec), 128 * bytes_per_position(spec)
    settings = Settings(max_sequences=4, max_batch_tokens=16)
    plan = plan_memory(settings, spec, free=100 * state)
    assert plan.state_bytes == 5 * state  # with a place that is kept
    assert plan.shared_bytes >= slab + state
    assert "recurrent states: 40 MiB" in str(plan)
    needed = plan.granted + plan.prefix_bytes + plan.shared_bytes + plan.state_bytes
    smaller = plan_memory(settings, spec, free=needed - slab)
    assert smaller.granted < plan.granted
    assert smaller.granted + smaller.prefix_bytes + smaller.shared_bytes + smaller.state_bytes <= needed - slab


def test_the_engine_is_built_with_a_state_for_each_sequence_and_without_graphs(
    lfm2: FrozenModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.engine.runner.varlen_attention", lambda *_: reference_varlen_attn)
    with caplog.at_level(logging.INFO, "server.engine.build_engine"):
        engine = build_engine(Settings(max_sequences=4, max_batch_tokens=32), lfm2)
    assert engine.scheduler.max_running == 5
    assert len(states_of(engine).states) == 4, "there are no more slots"
    assert engine.runner.graphs is None
    assert sum("without CUDA graphs" in message for message in caplog.messages) == 1


def test_a_soft_prompt_of_keys_and_values_is_refused_with_the_reason(lfm2: FrozenModel) -> None:
    for peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        with pytest.raises(InvalidSoftPrompt, match="recurrent state of what it has read") as caught:
            check_shape(peft_type, (5, lfm2.spec.kv_width), lfm2.spec, 100)
        assert "PROMPT_TUNING" in caught.value.remedy
    check_shape("PROMPT_TUNING", (5, lfm2.spec.hidden_size), lfm2.spec, 100)


def test_a_model_is_prepared_once_however_often_it_is_looked_at(lfm2: FrozenModel) -> None:
    again = FrozenModel(lfm2.module, lfm2.tokenizer, name=lfm2.spec.name, max_model_len=128)
    assert again.spec == lfm2.spec
    parts = [part for part in lfm2.module.modules() if isinstance(part, ShortConvolution)]
    assert len(parts) == 2
    assert not any(isinstance(part.own, ShortConvolution) for part in parts)


def test_a_version_of_transformers_whose_layers_do_not_get_the_layout_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_layout(layer: ShortConvolution, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        found: torch.Tensor = layer.own(hidden_states)
        return found

    monkeypatch.setattr(ShortConvolution, "forward", without_layout)
    with pytest.raises(UnsupportedModel, match=rf"In transformers {transformers.__version__}, lfm2 does not") as caught:
        tiny_model("lfm2")
    assert "Update transformers" in caught.value.remedy


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_in_bfloat16_states_are_kept_in_float32(architecture: str) -> None:
    model = tiny_model(architecture, dtype=torch.bfloat16)
    refuse_inexact(model)
    assert states_of(make_engine(model)).states.dtype == torch.float32
