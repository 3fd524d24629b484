"""Ids are compared with the model's rows wherever they come from: one request with a strange id ends no other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.contracts import Delta, GenerationRequest, Grammar, GrammarKind
from server.engine.attention.interface import ATTENTION_NAME
from server.engine.model.frozen import FrozenModel
from server.engine.text.choice_scoring import encode_labels
from server.engine.worker import EngineWorker
from server.errors import InvalidTrainingData, UnknownToken, UnsupportedModel
from server.soft_prompts.manifest import Manifest
from server.train.data import DataFile, encode_examples
from server.train.rows import Row
from tests.support import VOCAB_SIZE, byte_tokenizer, make_engine, request, tiny_module

TOOL = "<tool>"
"""A token that the tokenizer knows, and for which the model has no row: its id is VOCAB_SIZE."""


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    module = tiny_module(attention=ATTENTION_NAME)
    return FrozenModel(module, byte_tokenizer("<a>", "<b>", TOOL), name="tiny", max_model_len=128)


@pytest.fixture
async def worker(model: FrozenModel) -> AsyncIterator[EngineWorker]:
    worker = EngineWorker(make_engine(model))
    worker.start()
    yield worker
    await worker.stop()


async def collect(worker: EngineWorker, asked: GenerationRequest) -> list[Delta]:
    return [delta async for delta in worker.generate(asked, None)]


STRANGE: dict[str, dict[str, Any]] = {
    "input": {"input_ids": [1, VOCAB_SIZE]},
    "far input": {"input_ids": [2**40, 1]},
    "negative input": {"input_ids": [1, -1]},
    "label": {"input_ids": [1], "labels": [[1], [2, VOCAB_SIZE]]},
    "first of a label": {"input_ids": [1], "labels": [[VOCAB_SIZE, 1], [2]]},
    "bias": {"input_ids": [1], "logit_bias": ((VOCAB_SIZE, 1.0),)},
}


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
async def test_an_id_without_a_row_is_refused_alone(worker: EngineWorker, strange: dict[str, Any]) -> None:
    bystander = asyncio.ensure_future(collect(worker, request("bystander", [1, 2], max_new_tokens=60, ignore_eos=True)))
    with pytest.raises(UnknownToken, match="0 to 259 only"):
        await collect(worker, request("strange", max_new_tokens=2, **strange))
    assert len(await bystander) == 60


def test_a_text_with_a_token_without_a_row_is_refused_wherever_it_is_tokenised(model: FrozenModel) -> None:
    text = model.text
    assert text.encode("fine <a>")[-1] == VOCAB_SIZE - 2
    with pytest.raises(UnknownToken, match=r"holds the token 260 \('<tool>'\)"):
        text.encode(f"please use {TOOL} now")
    with pytest.raises(UnknownToken):
        encode_labels(text, ["yes", TOOL])
    with pytest.raises(UnknownToken):
        model.embeddings_of([VOCAB_SIZE])


@pytest.mark.parametrize("row", [Row(TOOL, "fine", 7), Row("fine", TOOL, 7)], ids=["input", "target"])
def test_a_row_with_a_token_without_a_row_is_named_by_its_line(model: FrozenModel, row: Row) -> None:
    data = DataFile(Path("train.jsonl"), (Row("a", "b", 1), row), "")
    with pytest.raises(InvalidTrainingData, match=r"train.jsonl, line 7: .* 260 \('<tool>'\)"):
        encode_examples(data, model, Manifest(), 0)


async def test_a_grammar_is_followed_although_the_tokenizer_knows_more_than_the_model(worker: EngineWorker) -> None:
    grammar = Grammar(GrammarKind.REGEX, "[ab]{3}")
    deltas = await collect(worker, request("r", [1], max_new_tokens=20, grammar=grammar))
    text = "".join(delta.token.text for delta in deltas if delta.token and not delta.token.special)
    assert len(text) == 3
    assert set(text) <= {"a", "b"}


def test_a_model_that_chooses_among_other_tokens_than_it_reads_is_refused() -> None:
    module = tiny_module(attention=ATTENTION_NAME)
    module.lm_head = torch.nn.Linear(32, VOCAB_SIZE + 4, dtype=torch.float64)
    with pytest.raises(UnsupportedModel, match="260 tokens and logits for 264"):
        FrozenModel(module, byte_tokenizer(), name="tiny", max_model_len=128)
