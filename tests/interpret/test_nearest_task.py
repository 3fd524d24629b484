"""Training from the nearest task: chosen by function, recorded in the manifest, and left out where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from server.engine.model.frozen import FrozenModel
from server.interpret import nearest_task
from server.interpret.nearest_task import with_start
from server.soft_prompts.formats import save_soft_prompt
from server.soft_prompts.start import declared_start
from server.train.config import NEAREST_TASK, TrainingConfig
from server.train.inputs import TaskFiles, read_task
from server.train.start import start_values
from server.train.train_task import train_task
from tests.support import random_kv_prompt, random_soft_prompt
from tests.train.rows import LEARNS, MOODS, TEMPLATE, write_rows

LONG = replace(LEARNS, steps=40, evaluations=1)
CONFIG = replace(LONG, init=NEAREST_TASK)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TaskFiles:
    folder = tmp_path_factory.mktemp("moods")
    training = write_rows(folder / "train.jsonl", MOODS * 5)
    return TaskFiles("mood", training, write_rows(folder / "validation.jsonl", MOODS), TEMPLATE)


def begun(
    model: FrozenModel, files: TaskFiles, candidates: dict[str, Path], config: TrainingConfig = CONFIG
) -> tuple[TaskFiles, TrainingConfig, list[str]]:
    said: list[str] = []
    return *with_start(model, files, config, read_task(files, config), candidates, said.append), said


def test_a_task_that_does_the_same_is_found_among_others(
    tiny32: FrozenModel, files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest_task, "BRIEF_STEPS", LONG.steps)  # a random model learns nothing in 20
    like = train_task(tiny32, files, LONG).soft_prompt
    prompts = {
        "like@2": like,
        "random": random_soft_prompt(tiny32.spec, LEARNS.num_virtual_tokens),
        "short": random_soft_prompt(tiny32.spec, 3),
        "states": random_kv_prompt(tiny32.spec, LEARNS.num_virtual_tokens),
    }
    candidates = {name: tmp_path / name for name in prompts} | {"broken": tmp_path}
    for name, soft_prompt in prompts.items():
        save_soft_prompt(candidates[name], soft_prompt, tiny32.spec)
    found, config, [said] = begun(tiny32, files, candidates)
    assert said.startswith("After 40 steps the validation loss is ")
    assert said.endswith(": training begins with like@2.")
    assert "random" in said
    assert "short" not in said
    assert "states" not in said
    assert (found.start, config.init, config.init_from) == (candidates["like@2"], "soft_prompt", "like@2")
    trained = train_task(tiny32, found, replace(config, steps=1)).soft_prompt
    start = declared_start(trained.manifest)
    assert start is not None
    assert (start.nearest_task, start.prefix_hash) == ("like@2", like.prefix_hash)
    assert start.similarity is not None
    training = trained.manifest.training or {}
    assert (training["init"], training["init_from"]) == ("nearest-task", "like@2")
    values = start_values(tiny32, trained, [like])
    assert values is not None
    assert (values == like.tensor).all()


def test_the_nearest_task_is_not_taken_where_brief_training_from_it_ends_worse(
    tiny32: FrozenModel, files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest_task, "BRIEF_STEPS", LONG.steps)
    like = train_task(tiny32, files, LONG).soft_prompt
    far = replace(like, tensor=like.tensor * 40)  # in the same direction, but too long to be moved by training
    save_soft_prompt(tmp_path / "far", far, tiny32.spec)
    monkeypatch.setattr(nearest_task, "_moved_towards", lambda *_: True)
    found, config, [said] = begun(tiny32, files, {"far": tmp_path / "far"})
    assert said.endswith(" from the usual start: training begins as usual.")
    assert (found, config.init, config.init_from) == (files, "auto", CONFIG.init_from)


def test_where_nothing_fits_or_is_near_training_begins_as_usual_and_says_so(
    tiny32: FrozenModel, files: TaskFiles, tmp_path: Path
) -> None:
    save_soft_prompt(tmp_path / "short", random_soft_prompt(tiny32.spec, 3), tiny32.spec)
    for candidates in ({}, {"short": tmp_path / "short"}):
        found, config, [said] = begun(tiny32, files, candidates)
        assert said == "No published task has 20 virtual tokens of prompt_tuning: training begins as usual."
        assert (found, config.init) == (files, "auto")
    unchanged = begun(tiny32, files, {}, LEARNS)
    assert unchanged == (files, LEARNS, [])
