from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from server.engine.model import FrozenModel
from server.errors import ConfigurationError, InvalidTrainingData
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.run import TaskFiles, check_writable, train_task, write_task
from server.train.trainer import Progress
from tests.support import EOS, random_soft_prompt, tiny_module
from tests.train.rows import LEARNS, MOODS, TEMPLATE, write_rows

REPEATED = MOODS * 5
"""Enough rows for the targets to be labels."""


def task_files(tmp_path: Path, training: Sequence[tuple[str, str]] = REPEATED) -> TaskFiles:
    return TaskFiles(
        "mood",
        write_rows(tmp_path / "train.jsonl", training),
        write_rows(tmp_path / "validation.jsonl", MOODS),
        TEMPLATE,
        description="Is it good?",
        licence="CC0",
    )


def no_step(progress: Progress) -> None:
    raise AssertionError("a step was run")


@pytest.fixture(scope="module")
def trained(tiny32: FrozenModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[SoftPrompt, Path, TaskFiles]:
    """A soft prompt that answers MOODS, and where it was written."""
    files = task_files(tmp_path_factory.mktemp("data"))
    soft_prompt, _ = train_task(tiny32, files, LEARNS, lambda progress: None)
    directory = tmp_path_factory.mktemp("prompts") / "mood"
    write_task(directory, soft_prompt, tiny32)
    return soft_prompt, directory, files


@pytest.mark.parametrize("broken", ["training", "validation"])
def test_bad_data_is_refused_before_any_step(tiny32: FrozenModel, tmp_path: Path, broken: str) -> None:
    files = task_files(tmp_path)
    path: Path = getattr(files, broken)
    path.write_text(path.read_text() + '{"input": "last"}\n')
    with pytest.raises(InvalidTrainingData, match=rf"{path.name}, line \d+: no string field 'target'"):
        train_task(tiny32, files, LEARNS, no_step)


@pytest.mark.parametrize("broken", ["training", "validation"])
def test_a_row_too_long_for_the_context_is_refused_before_any_step(
    tiny32: FrozenModel, tmp_path: Path, broken: str
) -> None:
    files = task_files(tmp_path)
    path: Path = getattr(files, broken)
    write_rows(path, [*MOODS, ("x" * 110, "yes")])
    with pytest.raises(InvalidTrainingData, match=rf"{path.name}, line 5: 134 tokens .* the context holds 128"):
        train_task(tiny32, files, LEARNS, no_step)


@pytest.mark.parametrize("template", ["no field", "{input} and {input}"])
def test_a_template_must_hold_the_input_once(tiny32: FrozenModel, tmp_path: Path, template: str) -> None:
    files = replace(task_files(tmp_path), input_template=template)
    with pytest.raises(InvalidTrainingData, match=r"does not hold \{input\} exactly once\. Write \{input\} where"):
        train_task(tiny32, files, LEARNS, no_step)


def test_a_directory_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"cannot be written to .*file/mood: Not a directory\. Let --out name"):
        check_writable(tmp_path / "file" / "mood")
    check_writable(tmp_path / "new" / "mood")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is made before there is something to write"


def test_what_is_written_is_served_with_the_digest_of_its_manifest(
    tiny32: FrozenModel, trained: tuple[SoftPrompt, Path, TaskFiles]
) -> None:
    soft_prompt, directory, _ = trained
    [loaded] = load_soft_prompts(directory, tiny32.spec, 512)
    assert loaded.digest == loaded.manifest.digest == soft_prompt.digest
    assert loaded.prefix_hash == loaded.manifest.prefix_hash
    assert torch.equal(loaded.tensor, soft_prompt.tensor)


def test_what_is_written_is_loaded_by_peft_and_answers_there_as_it_was_taught(
    tiny32: FrozenModel, trained: tuple[SoftPrompt, Path, TaskFiles]
) -> None:
    soft_prompt, directory, _ = trained
    peft_model: Any = PeftModel.from_pretrained(tiny_module(dtype=torch.float32, attention="eager"), str(directory))
    assert torch.equal(peft_model.get_prompt_embedding_to_save("default"), soft_prompt.tensor)
    for text, target in MOODS:
        ids = torch.tensor([tiny32.encode(soft_prompt.manifest.render(text))])
        output = peft_model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        assert output[0, ids.shape[1] :].tolist() == [*tiny32.encode(target), EOS]


def test_the_manifest_says_how_it_was_made(tiny32: FrozenModel, trained: tuple[SoftPrompt, Path, TaskFiles]) -> None:
    _, directory, files = trained
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["task"] == "mood"
    assert manifest["base_model"] == {"name": tiny32.spec.name, "fingerprint": tiny32.spec.fingerprint}
    assert (manifest["peft_type"], manifest["num_virtual_tokens"], manifest["hidden_size"]) == ("PROMPT_TUNING", 20, 32)
    assert (manifest["input_template"], manifest["labels"]) == (TEMPLATE, ["no", "yes"])
    assert (manifest["description"], manifest["licence"]) == ("Is it good?", "CC0")
    training = manifest["training"]
    assert training["data_sha256"] == hashlib.sha256(files.training.read_bytes()).hexdigest()
    assert training["validation_sha256"] == hashlib.sha256(files.validation.read_bytes()).hexdigest()
    assert (training["rows"], training["dtype"]) == (len(REPEATED), "float32")
    assert asdict(LEARNS).items() <= training.items()
    assert manifest["metrics"]["validation_exact_match"] == 1.0
    assert manifest["metrics"]["validation_rows"] == len(MOODS)


def test_the_generation_default_has_room_for_the_longest_target_and_its_end_token(
    trained: tuple[SoftPrompt, Path, TaskFiles],
) -> None:
    assert trained[0].manifest.generation.max_new_tokens == len("yes") + 1


def test_training_twice_writes_the_same_content(
    tiny32: FrozenModel, trained: tuple[SoftPrompt, Path, TaskFiles]
) -> None:
    again, _ = train_task(tiny32, trained[2], LEARNS, lambda progress: None)
    assert again.digest == trained[0].digest


def test_writing_over_a_task_replaces_its_files_and_leaves_the_others(tiny32: FrozenModel, tmp_path: Path) -> None:
    directory = tmp_path / "mood"
    first, second = (random_soft_prompt(tiny32.spec, seed=seed) for seed in (1, 2))
    write_task(directory, first, tiny32)
    (directory / "README.md").write_text("a card")
    write_task(directory, second, tiny32)
    [loaded] = load_soft_prompts(directory, tiny32.spec, 512)
    assert loaded.digest == second.digest
    assert (directory / "README.md").read_text() == "a card"
    assert [path.name for path in tmp_path.iterdir()] == ["mood"]
    assert len(list(directory.iterdir())) == 4
