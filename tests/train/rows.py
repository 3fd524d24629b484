"""Tiny tasks that a soft prompt can really teach a tiny random model, in a second."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from server.engine.model.frozen import FrozenModel
from server.soft_prompts.manifest import Manifest
from server.train.config import TrainingConfig
from server.train.data import DataFile, Example, encode_examples
from server.train.methods import KeyValues, LearnedPrefix, PromptTuning
from server.train.objectives import Lesson, Targets
from server.train.rows import Row
from server.train.start import begin
from server.train.trainer import TrainingProblem

MOODS = (("good", "yes"), ("fine", "yes"), ("bad", "no"), ("poor", "no"))
TEMPLATE = "{input}\n"
LEARNS = TrainingConfig(learning_rate=0.3, num_virtual_tokens=20, steps=160, batch_size=4, evaluations=4, init="vocab")
"""Enough for exact match 1.0 on MOODS."""


def write_rows(path: Path, rows: Iterable[tuple[str, str]]) -> Path:
    """Write a data file."""
    lines = [json.dumps({"input": text, "target": target}, ensure_ascii=False) + "\n" for text, target in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def initial_values(
    model: FrozenModel, config: TrainingConfig, labels: Sequence[str] | None, start: Path | None = None
) -> torch.Tensor | KeyValues:
    """The values that a run of this configuration begins with."""
    return begin(model, config, DataFile(Path("rows.jsonl"), (), ""), labels, start)[0]


def data_of(rows: Iterable[tuple[str, str]]) -> DataFile:
    """A data file that was read, without the file."""
    return DataFile(Path("rows.jsonl"), tuple(Row(text, target, i) for i, (text, target) in enumerate(rows, 1)), "0")


def examples_of(model: FrozenModel, rows: Iterable[tuple[str, str]] = MOODS, virtual: int = 20) -> list[Example]:
    """Rows as the model sees them."""
    return encode_examples(data_of(rows), model, Manifest(input_template=TEMPLATE), virtual)


def lessons_of(examples: Iterable[Example]) -> list[Lesson]:
    """One for each row."""
    return [Lesson((example,)) for example in examples]


def work_of(
    model: FrozenModel,
    prefix: LearnedPrefix | torch.Tensor,
    training: Sequence[Example] | None = None,
    validation: Sequence[Example] | None = None,
) -> TrainingProblem:
    """Learn targets, those of MOODS unless others are given."""
    if isinstance(prefix, torch.Tensor):
        prefix = PromptTuning(prefix)
    known = examples_of(model) if training is None else training
    return TrainingProblem(
        model, prefix, Targets(), lessons_of(known), lessons_of(known if validation is None else validation)
    )


def random_embeddings(model: FrozenModel, num_virtual_tokens: int = 5, seed: int = 0) -> torch.Tensor:
    """Virtual tokens of the size of a soft prompt's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_virtual_tokens, model.spec.hidden_size, generator=generator)
