"""An optimised model answers what it answered before, and is the model that soft prompts were trained for."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numba
import pytest
import torch
from torch import nn

from server.contracts import FinishReason
from server.engine.attention.compiled_rows import CompiledAttention
from server.engine.fast.linear import FrozenLinear
from server.engine.fast.optimise import _try_out, load_kernels, optimise
from server.engine.kernels import library
from server.engine.kernels.library import Kernels
from server.engine.kernels.threads import Loop
from server.engine.model.frozen import _fingerprint
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.engine.optimised import (
    ALL,
    FUSED,
    NEW_TOKENS,
    answers,
    assert_same,
    assert_untouched,
    engine_for,
    is_fused,
    linears,
    logits,
    optimised,
    rough,
)
from tests.support import TINY, make_engine, random_kv_prompt, random_soft_prompt, request, run_engine, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("architecture", sorted(TINY))
def test_every_architecture_keeps_its_logits_and_its_answers(architecture: str) -> None:
    plain, fast = rough(architecture), optimised(architecture, {"fused", "packed"})
    assert is_fused(fast) == (architecture in FUSED)
    # The norms of transformers' models are float32 in any dtype.
    torch.testing.assert_close(logits(fast), logits(plain), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(fast, 200), logits(plain, 200), rtol=0, atol=1e-4)
    assert_same(answers(engine_for(fast)), answers(engine_for(plain)))


@pytest.mark.parametrize("architecture", sorted(TINY))
def test_with_kernels_every_architecture_keeps_its_answers_in_float32(architecture: str, kernels: Kernels) -> None:
    plain, fast = rough(architecture, torch.float32), optimised(architecture, ALL, kernels, dtype=torch.float32)
    assert is_fused(fast) == (architecture in FUSED)
    torch.testing.assert_close(logits(fast), logits(plain), rtol=0, atol=1e-4)
    engine = engine_for(fast, kernels)
    assert (engine.runner.compiled is None) == (architecture == "gemma2")
    expected = answers(engine_for(plain))
    assert_same(answers(engine), expected)
    assert_same(answers(engine_for(fast, kernels), arrive_every=2), expected)


@pytest.mark.parametrize("parts", [set(), {"compiled"}, {"fused"}, {"packed"}, {"compiled", "fused"}, ALL], ids=sorted)
def test_each_part_alone_keeps_the_answers(parts: set[str], kernels: Kernels) -> None:
    used = kernels if "compiled" in parts else None
    plain, fast = rough("qwen3", torch.float32), optimised("qwen3", parts, used, dtype=torch.float32)
    assert is_fused(fast) == ("fused" in parts)
    assert (linears(fast, nn.Linear) == 0) == ("packed" in parts)
    torch.testing.assert_close(logits(fast), logits(plain), rtol=0, atol=1e-4)
    assert_same(answers(engine_for(fast, used)), answers(engine_for(plain)))


@pytest.mark.parametrize("architecture", sorted(FUSED))
@pytest.mark.parametrize("with_kernels", [False, True])
def test_in_bfloat16_it_is_as_near_to_the_exact_answer_as_transformers_is(
    with_kernels: bool, architecture: str, kernels: Kernels
) -> None:
    used = kernels if with_kernels else None
    plain = rough(architecture, torch.bfloat16)
    exact = rough(architecture, torch.bfloat16)
    exact.module.double()
    fast = optimised(architecture, ALL, used, dtype=torch.bfloat16)
    assert is_fused(fast)
    expected = logits(exact)
    errors = [float((logits(model) - expected).norm() / expected.norm()) for model in (plain, fast)]
    assert 0 < errors[1] < 1.25 * errors[0]


def test_a_mixed_batch_gives_everybody_what_they_get_alone(kernels: Kernels) -> None:
    fast = optimised("mistral", ALL, kernels, dtype=torch.float32)
    together = answers(engine_for(fast, kernels))
    prompts = [None, random_soft_prompt(fast.spec, 5, 1), random_kv_prompt(fast.spec, 7, 2)]
    for j, prompt in enumerate(prompts):
        asked = request("r", range(40, 75), f"task {j}", max_new_tokens=NEW_TOKENS, ignore_eos=True)
        alone = run_engine(engine_for(fast, kernels), [(asked, prompt)])["r"]
        assert alone.token_ids == together[f"1 {j}"].token_ids


def test_a_soft_prompt_that_overflows_fails_alone(kernels: Kernels) -> None:
    """In the only slab, whose slots it leaves to those that come after it."""
    fast = optimised("llama", ALL, kernels, dtype=torch.float32)
    good = request("good", [1, 2, 3], max_new_tokens=8, ignore_eos=True)
    expected = run_engine(engine_for(fast, kernels), [(good, None)])["good"].token_ids
    bad = SoftPrompt("PREFIX_TUNING", torch.full((5, fast.spec.kv_width), 3e38))
    engine = make_engine(fast, num_slabs=1)
    engine.runner.compiled = CompiledAttention.over(engine.kv_cache, fast.attention_rules, kernels)
    asked = request("bad", [1, 2, 3], "bad", max_new_tokens=8)
    for _ in range(3):
        outcomes = run_engine(engine, [(asked, bad), (good, None)])
        assert outcomes["bad"].finish_reason is FinishReason.FAILED
        assert outcomes["good"].token_ids == expected


def test_no_parts_change_nothing() -> None:
    fast = optimised("llama", set(), dtype=torch.float32)
    assert_untouched(fast, "llama")
    assert torch.equal(logits(fast), logits(rough("llama", torch.float32)))


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "opt"])
def test_packing_alone_packs_every_linear_layer(architecture: str) -> None:
    plain, fast = rough(architecture, torch.float32), optimised(architecture, {"packed"}, dtype=torch.float32)
    assert linears(fast, nn.Linear) == 0
    assert linears(fast, FrozenLinear) == linears(plain, nn.Linear) > 0
    assert all(part.is_packed for part in fast.module.modules() if isinstance(part, FrozenLinear))
    torch.testing.assert_close(logits(fast), logits(plain), rtol=0, atol=1e-4)
    assert_same(answers(engine_for(fast)), answers(engine_for(plain)))


@pytest.mark.parametrize("architecture", sorted(TINY))
def test_packing_does_nothing_in_float64(architecture: str) -> None:
    assert_untouched(optimised(architecture, {"packed"}), architecture)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_embeddings_and_the_fingerprint_stay(dtype: torch.dtype, architecture: str, kernels: Kernels) -> None:
    """Soft prompts name the model that they were trained for by it; with tied embeddings too, which gpt2 has."""
    plain, fast = rough(architecture, dtype), rough(architecture, dtype)
    spec, weight = fast.spec, fast.module.get_input_embeddings().weight
    optimise(fast, ALL, kernels)
    assert fast.spec == spec == plain.spec
    assert fast.module.get_input_embeddings().weight is weight
    assert isinstance(weight, torch.Tensor)
    original = plain.module.get_input_embeddings().weight
    assert isinstance(original, torch.Tensor)
    assert torch.equal(weight, original)
    config = fast.module.config.get_text_config()
    assert _fingerprint(config, weight, spec.num_key_value_heads, spec.head_dim) == spec.fingerprint
    assert (fast.device, fast.dtype) == (plain.device, plain.dtype)


def test_what_was_done_is_logged(caplog: pytest.LogCaptureFixture, kernels: Kernels) -> None:
    with caplog.at_level(logging.INFO, "server.engine.fast.optimise"):
        optimise(tiny_model(dtype=torch.float32), ALL, kernels)
        optimise(tiny_model("opt"), ALL, None)
    assert [record.getMessage() for record in caplog.records] == [
        "optimised: compiled kernels, fused layers, packed weights",
        "optimised: nothing",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_are_loaded_where_they_are_of_use(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    assert isinstance(load_kernels(model, ALL, None), Kernels)
    assert load_kernels(model, {"fused", "packed"}, None) is None
    assert load_kernels(model, set(), None) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_kernels_are_not_loaded_for_numbers_that_they_do_not_read(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    assert load_kernels(tiny_model(dtype=dtype), ALL, None) is None
    assert not caplog.records, "nothing is missing"


def test_a_machine_without_numba_serves_and_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "server.engine.kernels.library")
    monkeypatch.setitem(sys.modules, "numba", None)
    model = tiny_model(dtype=torch.float32)
    assert load_kernels(model, {"fused"}, None) is None
    assert not caplog.records, "nobody asked for it"
    assert load_kernels(model, ALL, None) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "numba is missing" in record.getMessage()


def test_kept_kernels_that_cannot_be_read_are_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of gemma2, whose attention is torch's: the other loops are compiled in a third of the time."""
    model = tiny_model("gemma2", dtype=torch.float32)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    for function in ("use_kernels", "small_loops"):  # forget what this process has compiled, as another one would
        monkeypatch.setattr(library, function, getattr(library, function).__wrapped__)

    def start() -> str:
        caplog.clear()
        assert load_kernels(model, {"compiled"}, tmp_path) is not None
        return caplog.text

    assert "cannot be read" not in start()
    indices = list(tmp_path.rglob("*.nbi"))
    assert indices, "nothing was kept"
    assert "cannot be read" not in start(), "they can be read"
    for index in indices:
        index.write_bytes(index.read_bytes()[:-20])
    assert "they are compiled again" in start()
    assert not any(map(Path.exists, indices)), "the next start would find them again"


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_every_product_of_a_step_is_tried_at_start(
    architecture: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept one that cannot be read would else end the server at its first step."""
    if not kernels.has_tiles:
        pytest.skip("this processor has no AMX")
    kinds: set[int] = set()
    product = Kernels.product

    def noted(self: Kernels, kind: int) -> Loop:
        kinds.add(kind)
        return product(self, kind)

    monkeypatch.setattr(Kernels, "product", noted)
    _try_out(kernels, rough(architecture, torch.bfloat16))
    tried = set(kinds)
    kinds.clear()
    answers(engine_for(optimised(architecture, ALL, kernels, dtype=torch.bfloat16), kernels))
    assert kinds, "the step has products by AMX"
    assert kinds <= tried


def test_kernels_are_kept_nowhere_rather_than_beside_the_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_text("")
    assert load_kernels(tiny_model(dtype=torch.float32), ALL, tmp_path / "file" / "kernels") is not None
    assert "cannot be written to" in caplog.text
