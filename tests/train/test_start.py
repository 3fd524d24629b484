"""A trained soft prompt says what it began as, and that can be computed again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.model.frozen import FrozenModel
from server.soft_prompts.formats import load_soft_prompts, save_soft_prompt
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from server.soft_prompts.start import TrainingStart, declared_start, hash_of_ids
from server.train.config import TrainingConfig
from server.train.distil import Teacher
from server.train.inputs import TaskFiles
from server.train.start import declared_tokens, start_values
from server.train.train_task import train_task
from tests.support import random_kv_prompt, random_soft_prompt
from tests.train.rows import LEARNS

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(
    path.parent for path in [*ROOT.glob("prompts/*/manifest.json"), *ROOT.glob("examples/*/manifest.json")]
)
TEACHER = "Say what you think of it: {input}\nAnswer:"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"input": "{word}", "target": "yes"}}\n' for word in ("good", "bad", "fine", "poor")))
    return path


@pytest.mark.parametrize(
    "given",
    [
        {"init": "vocab"},
        {"init": "random"},
        {"init": "text", "init_text": "classify", "method": "prefix_tuning"},
        {"init": "teacher", "method": "prefix_tuning", "teacher_template": TEACHER, "labels": ("yes", "no")},
        {"init": "vocab", "method": "p_tuning"},
        {"init": "soft_prompt", "init_from": "other"},
    ],
    ids=lambda given: f"{given['init']}-{given.get('method', 'prompt_tuning')}",
)
def test_the_start_that_training_declares_is_where_it_began(
    tiny32: FrozenModel, rows: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    """With a learning rate of next to nothing, what is trained is still the start."""
    other = random_soft_prompt(tiny32.spec, 8)
    save_soft_prompt(tmp_path / "other", other, tiny32.spec)
    config = replace(LEARNS, num_virtual_tokens=8, steps=1, evaluations=1, learning_rate=1e-30, **given)
    trained = train_task(tiny32, TaskFiles("mood", rows, start=tmp_path / "other"), config)
    soft_prompt = trained.soft_prompt
    values = start_values(tiny32, soft_prompt, [other])
    assert values is not None
    torch.testing.assert_close(values, soft_prompt.tensor, rtol=0, atol=1e-6)


def changed(soft_prompt: SoftPrompt, start: object) -> SoftPrompt:
    return replace(soft_prompt, manifest=Manifest.model_validate({"training": {"start": start}}))


@pytest.mark.parametrize(
    "start",
    [
        None,
        "vocabulary",
        {"initial_token_ids": [1, 2]},
        {"initial_token_ids": [1, 2, 3, 4, 10**9]},
        {"initial_token_ids": ["a"] * 5},
        {"initial_token_ids": [1, 2, 3, 4, 5], "prefix_hash": "0"},
        {"prefix_hash": "0" * 64},
        {"teacher_tokens": 10, "token_ids_sha256": "0"},
        {},
        {"of_a_newer_prelude": 1},
        {"initial_token_ids": [1, 2, 3, 4, 5], "random_seed": 2**70},
        {"initial_token_ids": [-1] * 5},
    ],
)
def test_a_start_that_is_not_declared_or_does_not_fit_is_unknown(tiny32: FrozenModel, start: object) -> None:
    soft_prompt = random_soft_prompt(tiny32.spec, 5)
    assert start_values(tiny32, changed(soft_prompt, start)) is None


@pytest.mark.parametrize(
    ("template", "said"),
    [("no place", {}), ("{input}" * 2, {}), ("abcdefgh {input}", {"num_virtual_tokens": 10**9, "kept": [0, 1, 2]})],
    ids=["no place for the input", "two places", "more virtual tokens than the text has tokens"],
)
def test_a_teacher_that_cannot_have_been_the_start_is_unknown(
    tiny32: FrozenModel, template: str, said: dict[str, object]
) -> None:
    """An uploaded manifest may declare any `num_virtual_tokens`; no memory is reserved for it."""
    ids = tiny32.text.encode("abcdefgh ")
    start = {"teacher_tokens": 10**9, "token_ids_sha256": hash_of_ids([*ids, *tiny32.text.encode("-")]), **said}
    training = {"start": start, "teacher_template": template}
    soft_prompt = replace(random_kv_prompt(tiny32.spec, 3), manifest=Manifest(training=training))
    assert start_values(tiny32, soft_prompt) is None


def test_the_start_is_no_part_of_a_versions_identity(tiny32: FrozenModel) -> None:
    soft_prompt = random_soft_prompt(tiny32.spec, 1)
    assert changed(soft_prompt, {"initial_token_ids": [1]}).digest == soft_prompt.digest


def test_a_start_is_one_thing() -> None:
    with pytest.raises(ValueError, match="only one of them"):
        TrainingStart(initial_token_ids=(1,), teacher_tokens=3)


@pytest.mark.parametrize("directory", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_soft_prompt_declares_the_start_that_its_seed_gives(smollm2: FrozenModel, directory: Path) -> None:
    manifest = Manifest.parse((directory / "manifest.json").read_bytes())
    start, training = declared_start(manifest), manifest.training or {}
    assert start is not None
    [soft_prompt] = load_soft_prompts(directory, smollm2.spec, 128)
    with_start = [directory] if start.prefix_hash is None else SHIPPED
    others = [one for path in with_start for one in load_soft_prompts(path, smollm2.spec, 128)]
    values = start_values(smollm2, soft_prompt, others)
    assert values is not None, "it cannot be computed, or no shipped task has it"
    assert values.shape == soft_prompt.tensor.shape
    if start.prefix_hash is not None:  # it began as another shipped task
        return
    config = TrainingConfig(
        **{name: training[name] for name in TrainingConfig.__dataclass_fields__ if name in training}
    )
    if config.may_begin_as_teacher:
        ids = Teacher(smollm2, config.teacher_template or "", config.teacher_chat).encode("-")
        assert start.teacher_tokens is not None
        assert hash_of_ids(ids[: start.teacher_tokens]) == start.token_ids_sha256
    else:
        assert start == declared_tokens(smollm2, config, manifest.labels)
