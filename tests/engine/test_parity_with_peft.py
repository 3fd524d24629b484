"""Invariant 1: the engine answers what the model's own forward does after what PEFT makes of its files.

Tiny models in float64, token for token and probability for probability, alone and in a mixed batch with staggered
arrivals and chunked prefills.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from server.engine.model.frozen import FrozenModel
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.peft_files import KINDS, NUM_TASKS, peft_directory
from tests.peft_reference import peft_greedy
from tests.support import TINY, Outcome, make_engine, request, run_engine, tiny_model, tiny_module

NEW_TOKENS = 12
INPUTS = [[10, 20, 30], [7], list(range(40, 75)), [200, 3, 90, 14, 90, 14, 8]]


@dataclass(frozen=True)
class Reference:
    """Greedy tokens of one input, and the log-probability that the reference gave each of them."""

    token_ids: list[int]
    logprobs: list[float]

    def assert_equals(self, outcome: Outcome) -> None:
        assert outcome.token_ids == self.token_ids
        # The norms and softmaxes of transformers' models are float32 in any dtype.
        assert outcome.logprobs == pytest.approx(self.logprobs, abs=1e-4)


@pytest.fixture(scope="module", params=sorted(TINY))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(architecture: str) -> FrozenModel:
    return tiny_model(architecture)


@pytest.fixture(scope="module")
def soft_prompts(architecture: str, model: FrozenModel, directories: dict[str, Path]) -> dict[str, SoftPrompt]:
    """What we load from PEFT's directories; the last row of the multitask one."""
    return {kind: load_soft_prompts(directory, model.spec, 512)[-1] for kind, directory in directories.items()}


@pytest.fixture(scope="module")
def directories(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One PEFT directory of each kind, saved by PEFT itself."""
    root = tmp_path_factory.mktemp(architecture)
    return {kind: peft_directory(root / kind, kind, architecture) for kind in KINDS}


@pytest.fixture(scope="module")
def answered(model: FrozenModel, soft_prompts: dict[str, SoftPrompt]) -> dict[tuple[str, int], Outcome]:
    """The engine's answers for every kind and input, each alone."""
    return {
        (kind, i): run_engine(make_engine(model), [(asked, soft_prompts[kind])])["r"]
        for kind in KINDS
        for i, input_ids in enumerate(INPUTS)
        for asked in [request("r", input_ids, max_new_tokens=NEW_TOKENS, logprobs=True)]
    }


@pytest.fixture(scope="module")
def references(
    architecture: str, directories: dict[str, Path], answered: dict[tuple[str, int], Outcome]
) -> dict[tuple[str, int], Reference]:
    """PEFT's greedy answers for every kind and input; the engine's only say where to look first."""
    found: dict[tuple[str, int], Reference] = {}
    for kind, directory in directories.items():
        peft_model = PeftModel.from_pretrained(tiny_module(architecture, attention="eager"), str(directory))
        task = NUM_TASKS - 1 if kind == "MULTITASK_PROMPT_TUNING" else None
        for i, input_ids in enumerate(INPUTS):
            guess = answered[kind, i].token_ids
            found[kind, i] = reference(*peft_greedy(peft_model, input_ids, NEW_TOKENS, task, guess))
    return found


def reference(tokens: list[int], logits: torch.Tensor) -> Reference:
    rows = logits.log_softmax(dim=-1)
    return Reference(tokens, [float(row[token]) for row, token in zip(rows, tokens, strict=True)])


def greedy(module: Any, input_ids: list[int]) -> Reference:
    """What transformers' generate answers behind `input_ids`."""
    ids = torch.tensor([input_ids])
    output = module.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=257,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return reference(output.sequences[0, len(input_ids) :].tolist(), torch.cat(output.logits))


@pytest.mark.parametrize("kind", KINDS)
def test_one_request_alone_answers_as_peft(
    kind: str, answered: dict[tuple[str, int], Outcome], references: dict[tuple[str, int], Reference]
) -> None:
    for i in range(len(INPUTS)):
        references[kind, i].assert_equals(answered[kind, i])


@pytest.mark.parametrize("arrive_every", [0, 1, 3])
def test_a_mixed_batch_with_staggered_arrivals_answers_as_peft(
    arrive_every: int,
    model: FrozenModel,
    soft_prompts: dict[str, SoftPrompt],
    references: dict[tuple[str, int], Reference],
) -> None:
    requests = [
        (request(f"{kind} {i}", inputs, task=kind, max_new_tokens=NEW_TOKENS, logprobs=True), soft_prompts[kind])
        for i, inputs in enumerate(INPUTS)
        for kind in KINDS
    ]
    outcomes = run_engine(make_engine(model), requests, arrive_every=arrive_every)
    for (kind, i), reference in references.items():
        reference.assert_equals(outcomes[f"{kind} {i}"])


def test_the_frozen_model_alone_answers_as_transformers(architecture: str, model: FrozenModel) -> None:
    module = tiny_module(architecture, attention="eager")
    for input_ids in INPUTS:
        asked = request("r", input_ids, max_new_tokens=NEW_TOKENS, logprobs=True)
        greedy(module, input_ids).assert_equals(run_engine(make_engine(model), [(asked, None)])["r"])


def test_the_soft_prompt_changes_the_answer(references: dict[tuple[str, int], Reference]) -> None:
    """Otherwise the comparisons above would say nothing about soft prompts."""
    answers = {tuple(references[kind, 1].logprobs) for kind in KINDS}
    assert len(answers) >= len(KINDS) - 1  # the two KV kinds may be the same tensor
