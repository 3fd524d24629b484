"""Evaluations of tiny models, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from server.engine.attention.interface import ATTENTION_NAME
from server.engine.engine import Engine
from server.engine.model.frozen import FrozenModel
from server.evaluation.data import EvaluationData
from server.evaluation.evaluation import Evaluation, prepare
from server.evaluation.questions import Answer
from server.evaluation.standalone import OwnEngine
from server.evaluation.systems import RequestedBaselines
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.data import DataFile
from server.train.rows import Row
from tests.support import byte_tokenizer, make_engine, random_soft_prompt, tiny_module
from tests.train.rows import TEMPLATE

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
)


def chat_model() -> FrozenModel:
    """A tiny model that can be asked as a chat model is."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    module = tiny_module(dtype=torch.float64, attention=ATTENTION_NAME)
    return FrozenModel(module, tokenizer, name="tiny-chat", max_model_len=192)


def rows_of(pairs: Iterable[tuple[str, str]]) -> tuple[Row, ...]:
    return tuple(Row(text, target, line) for line, (text, target) in enumerate(pairs, 1))


def data_of(
    pairs: Sequence[tuple[str, str]], references: Sequence[Sequence[str]] | None = None, **fields: Any
) -> EvaluationData:
    """Rows as a file holds them, without the file."""
    texts = [(target,) for _, target in pairs] if references is None else [tuple(several) for several in references]
    return EvaluationData("rows.jsonl", rows_of(pairs), tuple(texts), "0", **fields)


def shots_of(pairs: Sequence[tuple[str, str]]) -> DataFile:
    return DataFile(Path("train.jsonl"), rows_of(pairs), "1")


def soft_prompt_of(model: FrozenModel, seed: int = 0, **manifest: Any) -> SoftPrompt:
    """A random soft prompt whose answers are short."""
    fields = {"input_template": TEMPLATE, "generation": {"max_new_tokens": 4}, **manifest}
    return random_soft_prompt(model.spec, seed=seed, manifest=fields)


def prepared(
    model: FrozenModel, data: EvaluationData, soft_prompt: SoftPrompt | None = None, *baselines: str, **options: Any
) -> tuple[Engine, Evaluation]:
    """An engine of its own, and an evaluation to run on it."""
    engine = make_engine(model)
    subject = ("mood", soft_prompt or soft_prompt_of(model))
    return engine, prepare(OwnEngine(engine), data, subject, wanted=RequestedBaselines.parse(baselines), **options)


def texts(*written: str) -> list[Answer]:
    """Answers that were generated."""
    return [Answer(text, chosen=0, loss=1.0, tokens=1) for text in written]
