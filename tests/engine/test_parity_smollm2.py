"""Invariant 1 on the embedded model: float32 as transformers' own forward, bfloat16 no worse than it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from server.engine.model.frozen import FrozenModel
from server.engine.model.weights import resolve_checkpoint
from server.settings import Settings
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.peft_reference import peft_logits
from tests.support import RecordingModel, fast_smollm2, logits_of_requests, make_engine, run_engine
from tests.support import request as engine_request

TEXTS = ["The capital of France is", "Once upon a time", "def add(a, b):\n    return", "1 2 3 4 5"]
NEW_TOKENS = 4
KINDS = ("PROMPT_TUNING", "PREFIX_TUNING")


@cache
def reference_module(dtype: torch.dtype) -> Any:
    """The embedded model as transformers loads and runs it."""
    settings = Settings.load()
    checkpoint = resolve_checkpoint(settings.model, None, settings.cache_dir)
    return AutoModelForCausalLM.from_pretrained(checkpoint.location, dtype=dtype, attn_implementation="sdpa")


@pytest.fixture(scope="module")
def directories(smollm2: FrozenModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Adapters of plausible size, saved by PEFT: embeddings like the vocabulary's, a small KV prefix."""
    found = {}
    for kind in KINDS:
        config = {"PROMPT_TUNING": PromptTuningConfig, "PREFIX_TUNING": PrefixTuningConfig}[kind]
        model = get_peft_model(reference_module(torch.float32), config(task_type="CAUSAL_LM", num_virtual_tokens=20))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "prompt_encoder" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        found[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(str(found[kind]))
    yield found
    reference_module.cache_clear()
    reference_logits.cache_clear()


def answer(model: FrozenModel, soft_prompt: SoftPrompt) -> list[list[int]]:
    """Greedy tokens for every text, in one batch."""
    requests = [
        (engine_request(text, model.text.encode(text), max_new_tokens=NEW_TOKENS, ignore_eos=True), soft_prompt)
        for text in TEXTS
    ]
    outcomes = run_engine(make_engine(model, max_batch_tokens=24), requests, arrive_every=2)
    return [outcomes[text].token_ids for text in TEXTS]


def forced_logits(model: FrozenModel, soft_prompt: SoftPrompt, answers: list[list[int]]) -> torch.Tensor:
    """The engine's logits `[texts * NEW_TOKENS, vocab_size]` at each token of the answers, whatever it would choose.

    Every beginning of an answer is a request of its own, so the batch is full, mixed and chunked.
    """
    recording = RecordingModel(model)
    engine = make_engine(recording, max_sequences=6, max_batch_tokens=24)
    for text, tokens in zip(TEXTS, answers, strict=True):
        for length in range(NEW_TOKENS):
            ids = model.text.encode(text) + tokens[:length]
            engine.add(engine_request(f"{text} {length}", ids, max_new_tokens=1), soft_prompt)
    logits = logits_of_requests(engine, recording)
    return torch.cat([logits[f"{text} {length}"] for text in TEXTS for length in range(NEW_TOKENS)])


def expected_logits(directory: Path, dtype: torch.dtype, model: FrozenModel, answers: list[list[int]]) -> torch.Tensor:
    """The logits of transformers' own forward at the same places, each row in one."""
    rows = tuple((*model.text.encode(text), *tokens[:-1]) for text, tokens in zip(TEXTS, answers, strict=True))
    return reference_logits(directory, dtype, rows)


@cache
def reference_logits(directory: Path, dtype: torch.dtype, rows: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Of the last tokens of each row."""
    peft_model = PeftModel.from_pretrained(reference_module(dtype), str(directory))
    return torch.cat([peft_logits(peft_model, row)[-NEW_TOKENS:].float() for row in rows])


@pytest.mark.parametrize("model", ["smollm2", "served_smollm2"])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_logits_equal_pefts_and_tokens_wherever_the_margin_allows(
    kind: str, model: str, directories: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    ours: FrozenModel = request.getfixturevalue(model)
    soft_prompt = load_soft_prompts(directories[kind], ours.spec, 512)[0]
    answers = answer(ours, soft_prompt)
    expected = expected_logits(directories[kind], torch.float32, ours, answers)
    assert (forced_logits(ours, soft_prompt, answers) - expected).abs().max() < 2e-3, "the same sums in another order"
    top = expected.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > 2e-3
    assert clear.sum() > 0.9 * len(clear)
    assert torch.equal(torch.tensor(answers).flatten()[clear], expected.argmax(dim=-1)[clear])


def test_bfloat16_is_as_close_to_float32_as_transformers_own(
    smollm2: FrozenModel, directories: dict[str, Path]
) -> None:
    directory = directories["PROMPT_TUNING"]
    soft_prompt = load_soft_prompts(directory, smollm2.spec, 512)[0]
    answers = answer(smollm2, soft_prompt)
    exact = expected_logits(directory, torch.float32, smollm2, answers)
    theirs = expected_logits(directory, torch.bfloat16, smollm2, answers)
    for model in (FrozenModel.load(Settings.load(dtype="bfloat16")), fast_smollm2("bfloat16")):
        ours = forced_logits(model, soft_prompt, answers).float()
        assert (ours - exact).square().mean().sqrt() <= 1.1 * (theirs - exact).square().mean().sqrt()


def test_the_fingerprint_depends_neither_on_the_dtype_nor_on_the_context(smollm2: FrozenModel) -> None:
    other = FrozenModel.load(Settings.load(dtype="bfloat16", max_model_len=512))
    assert other.spec.fingerprint == smollm2.spec.fingerprint
