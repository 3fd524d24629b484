from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from server.engine.model.frozen import FrozenModel
from server.errors import ConfigurationError, InvalidSoftPrompt, InvalidTrainingData
from server.jobs.check import Frame, check_spec
from server.jobs.job import JobSpec
from server.soft_prompts.formats import load_soft_prompts, save_soft_prompt
from server.soft_prompts.manifest import Manifest
from server.train.config import Method
from server.train.inputs import TaskFiles
from server.train.learning_rate import PEAKS, Tried
from server.train.output import Trained, check_writable, write_task
from server.train.run_history import TeacherForcedScore, TrainingProgress, TrainingResult
from server.train.train_task import train_task
from tests.peft_reference import peft_greedy
from tests.support import EOS, make_engine, random_soft_prompt, request, run_engine, tiny_model, tiny_module
from tests.train.rows import LEARNS, MOODS, TEMPLATE, write_rows

REPEATED = MOODS * 5
"""Enough rows for the targets to be labels."""
TAUGHT = replace(LEARNS, batch_size=20)


def task_files(tmp_path: Path, training: Sequence[tuple[str, str]] = REPEATED) -> TaskFiles:
    return TaskFiles(
        "mood",
        write_rows(tmp_path / "train.jsonl", training),
        write_rows(tmp_path / "validation.jsonl", MOODS),
        TEMPLATE,
        description="Is it good?",
        system_message="refuse",
        licence="CC0",
    )


def no_step(progress: TrainingProgress) -> None:
    raise AssertionError("a step was run")


@pytest.fixture(scope="module")
def trained(tiny32: FrozenModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path, TaskFiles]:
    """A soft prompt that answers MOODS, and where it was written."""
    files = task_files(tmp_path_factory.mktemp("data"))
    found = train_task(tiny32, files, TAUGHT)
    directory = tmp_path_factory.mktemp("prompts") / "mood"
    write_task(directory, found, tiny32.spec)
    return found, directory, files


@pytest.mark.parametrize("broken", ["training", "validation"])
def test_bad_data_is_refused_before_any_step(tiny32: FrozenModel, tmp_path: Path, broken: str) -> None:
    files = task_files(tmp_path)
    path = getattr(files, broken)
    assert isinstance(path, Path)
    path.write_text(path.read_text() + '{"input": "last"}\n')
    with pytest.raises(InvalidTrainingData, match=rf"{path.name}, line \d+: no string field 'target'"):
        train_task(tiny32, files, TAUGHT, no_step)


@pytest.mark.parametrize("broken", ["training", "validation"])
def test_a_row_too_long_for_the_context_is_refused_before_any_step(
    tiny32: FrozenModel, tmp_path: Path, broken: str
) -> None:
    files = task_files(tmp_path)
    path = getattr(files, broken)
    assert isinstance(path, Path)
    write_rows(path, [*MOODS, ("x" * 110, "yes")])
    with pytest.raises(InvalidTrainingData, match=rf"{path.name}, line 5: 134 tokens .* the context holds 128"):
        train_task(tiny32, files, TAUGHT, no_step)


@pytest.mark.parametrize("template", ["no field", "{input} and {input}"])
def test_a_template_must_hold_the_input_once(tiny32: FrozenModel, tmp_path: Path, template: str) -> None:
    files = replace(task_files(tmp_path), input_template=template)
    with pytest.raises(InvalidTrainingData, match=r"does not hold \{input\} exactly once\. Write \{input\} where"):
        train_task(tiny32, files, TAUGHT, no_step)


def test_a_directory_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"cannot be written to .*file/mood: Not a directory\. Let --out name"):
        check_writable(tmp_path / "file" / "mood")
    check_writable(tmp_path / "new" / "mood")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is made before there is something to write"


def test_what_is_written_is_served_with_the_digest_of_its_manifest(
    tiny32: FrozenModel, trained: tuple[Trained, Path, TaskFiles]
) -> None:
    soft_prompt, directory = trained[0].soft_prompt, trained[1]
    [loaded] = load_soft_prompts(directory, tiny32.spec, 512)
    assert loaded.digest == loaded.manifest.digest == soft_prompt.digest
    assert loaded.prefix_hash == loaded.manifest.prefix_hash
    assert torch.equal(loaded.tensor, soft_prompt.tensor)


def test_what_is_written_is_loaded_by_peft_and_answers_there_as_it_was_taught(
    tiny32: FrozenModel, trained: tuple[Trained, Path, TaskFiles]
) -> None:
    soft_prompt, directory = trained[0].soft_prompt, trained[1]
    peft_model: Any = PeftModel.from_pretrained(tiny_module(dtype=torch.float32, attention="eager"), str(directory))
    assert torch.equal(peft_model.get_prompt_embedding_to_save("default"), soft_prompt.tensor)
    for text, target in MOODS:
        answer, _ = peft_greedy(peft_model, tiny32.text.encode(soft_prompt.manifest.render(text)), 8)
        assert answer == [*tiny32.text.encode(target), EOS]


def test_the_manifest_says_how_it_was_made(tiny32: FrozenModel, trained: tuple[Trained, Path, TaskFiles]) -> None:
    _, directory, files = trained
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["task"] == "mood"
    assert manifest["base_model"] == {"name": tiny32.spec.name, "fingerprint": tiny32.spec.fingerprint}
    assert (manifest["peft_type"], manifest["num_virtual_tokens"], manifest["hidden_size"]) == ("PROMPT_TUNING", 20, 32)
    assert (manifest["input_template"], manifest["labels"]) == (TEMPLATE, ["no", "yes"])
    about = [manifest[name] for name in ("system_message", "description", "licence")]
    assert about == ["refuse", "Is it good?", "CC0"]
    training = manifest["training"]
    assert training["data_sha256"] == hashlib.sha256(Path(str(files.training)).read_bytes()).hexdigest()
    assert training["validation_sha256"] == hashlib.sha256(Path(str(files.validation)).read_bytes()).hexdigest()
    assert (training["rows"], training["dtype"]) == (len(REPEATED), "float32")
    assert TAUGHT.as_dict().items() <= training.items()
    assert manifest["metrics"]["validation_exact_match"] == 1.0
    assert manifest["metrics"]["validation_rows"] == len(MOODS)


def test_the_generation_default_has_room_for_the_longest_target_and_its_end_token(
    trained: tuple[Trained, Path, TaskFiles],
) -> None:
    assert trained[0].manifest.generation.max_new_tokens == len("yes") + 1


def test_training_twice_writes_the_same_content(tiny32: FrozenModel, trained: tuple[Trained, Path, TaskFiles]) -> None:
    again = train_task(tiny32, trained[2], TAUGHT)
    assert again.soft_prompt.digest == trained[0].soft_prompt.digest


def result_of(seed: int, width: int) -> Trained:
    tensor = torch.randn(5, width, generator=torch.Generator().manual_seed(seed))
    score = TeacherForcedScore(0.5, 0.5)
    return Trained("PROMPT_TUNING", TrainingResult({"prompt_embeddings": tensor}, 1, score), Manifest(task="mood"))


def test_writing_over_a_task_replaces_its_files_and_leaves_the_others(tiny32: FrozenModel, tmp_path: Path) -> None:
    directory = tmp_path / "mood"
    first, second = (result_of(seed, tiny32.spec.hidden_size) for seed in (1, 2))
    write_task(directory, first, tiny32.spec)
    (directory / "README.md").write_text("a card")
    write_task(directory, second, tiny32.spec)
    [loaded] = load_soft_prompts(directory, tiny32.spec, 512)
    assert loaded.digest == second.soft_prompt.digest
    assert (directory / "README.md").read_text() == "a card"
    assert [path.name for path in tmp_path.iterdir()] == ["mood"]
    made = ["adapter_config.json", "adapter_model.safetensors", "loss.svg", "manifest.json", "metrics.json"]
    assert sorted(path.name for path in directory.iterdir()) == ["README.md", *made]


def test_the_course_of_a_run_lies_beside_it(trained: tuple[Trained, Path, TaskFiles]) -> None:
    course = json.loads((trained[1] / "metrics.json").read_text())
    assert [entry["step"] for entry in course["history"]] == [40, 80, 120, 160]
    assert course["history"][-1]["score"]["exact_match"] == 1.0
    assert "<svg" in (trained[1] / "loss.svg").read_text()


def test_rows_are_held_out_where_no_validation_file_is_named(tiny32: FrozenModel, tmp_path: Path) -> None:
    files = replace(task_files(tmp_path, [(f"{text} {i}", t) for i in range(5) for text, t in MOODS]), validation=None)
    found = train_task(tiny32, files, replace(TAUGHT, steps=2))
    assert found.manifest.metrics is not None
    assert found.manifest.metrics["validation_rows"] == 2
    assert found.manifest.training is not None
    assert found.manifest.training["rows"] == 18


def test_one_row_and_unknown_labels_are_refused_before_any_step(tiny32: FrozenModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidTrainingData, match=r"train\.jsonl, line 1: the only row.*Give more rows"):
        train_task(tiny32, task_files(tmp_path, MOODS[:1]), TAUGHT, no_step)
    files = task_files(tmp_path)
    write_rows(Path(str(files.validation)), [("good", "yes"), ("odd", "perhaps")])
    with pytest.raises(InvalidTrainingData, match=r"validation\.jsonl, line 2: the label 'perhaps' is on no row"):
        train_task(tiny32, files, TAUGHT, no_step)


def test_a_learning_rate_is_found_and_kept_in_the_manifest(tiny32: FrozenModel, tmp_path: Path) -> None:
    tried: list[Tried] = []
    config = replace(LEARNS, learning_rate="auto", steps=20)
    found = train_task(tiny32, task_files(tmp_path), config, on_tried=tried.append)
    assert tuple(one.learning_rate for one in tried) == PEAKS["prompt_tuning"]
    assert found.manifest.training is not None
    assert found.manifest.training["learning_rate"] == min(tried, key=lambda one: one.loss).learning_rate
    again = train_task(tiny32, task_files(tmp_path), replace(config, learning_rate=0.08))
    if found.manifest.training["learning_rate"] == 0.08:
        assert torch.equal(found.result.prompt_embeddings, again.result.prompt_embeddings), "the search leaves nothing"


def test_a_run_that_goes_on_does_not_look_for_its_learning_rate_again(tiny32: FrozenModel, tmp_path: Path) -> None:
    def break_off(progress: TrainingProgress) -> None:
        if progress.step == 15:
            raise KeyboardInterrupt

    config, files, folder = (
        replace(LEARNS, learning_rate="auto", steps=20),
        task_files(tmp_path),
        tmp_path / "checkpoint",
    )
    with pytest.raises(KeyboardInterrupt):
        train_task(tiny32, files, config, break_off, checkpoint=folder)
    tried: list[Tried] = []
    resumed = train_task(tiny32, files, config, checkpoint=folder, on_tried=tried.append)
    assert not tried
    assert resumed.soft_prompt.digest == train_task(tiny32, files, config).soft_prompt.digest
    other = replace(config, seed=1)
    steps: list[int] = []
    train_task(tiny32, files, other, lambda progress: steps.append(progress.step), checkpoint=folder)
    assert steps[0] == 1, "what another configuration has left is not gone on from"
    steps.clear()
    write_rows(Path(str(files.validation)), MOODS[:2])
    train_task(tiny32, files, config, lambda progress: steps.append(progress.step), checkpoint=folder)
    assert steps[0] == 1, "nor what was measured on other rows"


def test_a_run_that_began_at_another_soft_prompt_of_that_name_is_not_gone_on_from(
    tiny32: FrozenModel, tmp_path: Path
) -> None:
    steps: list[int] = []

    def break_off(progress: TrainingProgress) -> None:
        steps.append(progress.step)
        if len(steps) == 3:
            raise KeyboardInterrupt

    begin, folder = tmp_path / "begin", tmp_path / "checkpoint"
    save_soft_prompt(begin, random_soft_prompt(tiny32.spec, seed=0), tiny32.spec)
    count = random_soft_prompt(tiny32.spec).num_virtual_tokens
    config = replace(LEARNS, init="soft_prompt", init_from=str(begin), num_virtual_tokens=count, steps=4, evaluations=4)
    files = task_files(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train_task(tiny32, files, config, break_off, checkpoint=folder)
    train_task(tiny32, files, config, break_off, checkpoint=folder)
    save_soft_prompt(begin, random_soft_prompt(tiny32.spec, seed=1), tiny32.spec)
    train_task(tiny32, files, config, break_off, checkpoint=folder)
    assert steps == [1, 2, 3, 4, 1, 2, 3, 4]


def test_a_multitask_run_is_served_and_loaded_by_peft_task_by_task(tiny32: FrozenModel, tmp_path: Path) -> None:
    opposite = [(text, "no" if target == "yes" else "yes") for text, target in MOODS]
    paths = tuple(write_rows(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((MOODS, opposite)))
    files = TaskFiles("mood", paths, paths, TEMPLATE)
    found = train_task(tiny32, files, replace(TAUGHT, method="multitask_prompt_tuning", steps=300))
    write_task(tmp_path / "mood", found, tiny32.spec)
    rows = load_soft_prompts(tmp_path / "mood", tiny32.spec, 512)
    assert [row.num_virtual_tokens for row in rows] == [20, 20]
    module = tiny_module(dtype=torch.float32, attention="eager")
    peft_model: Any = PeftModel.from_pretrained(module, str(tmp_path / "mood"))
    answered = set()
    for task, row in enumerate(rows):
        for text, _ in MOODS:
            input_ids = tiny32.text.encode(f"{text}\n")
            answer, _ = peft_greedy(peft_model, input_ids, 4, task)
            asked = request("a", tuple(input_ids), max_new_tokens=4)
            served = run_engine(make_engine(tiny32), [(asked, row)])["a"].token_ids
            assert answer == served, (task, text)
            answered.add((task, tuple(served)))
    assert {task for task, _ in answered} == {0, 1}


@pytest.mark.parametrize(("method", "peak"), [("prefix_tuning", 0.1), ("p_tuning", 0.04)])
def test_other_methods_are_loaded_by_peft_and_answer_as_they_were_taught(
    tiny32: FrozenModel, tmp_path: Path, method: Method, peak: float
) -> None:
    found = train_task(tiny32, task_files(tmp_path), replace(TAUGHT, method=method, learning_rate=peak))
    assert found.result.validation.exact_match == 1.0
    write_task(tmp_path / "mood", found, tiny32.spec)
    module = tiny_module(dtype=torch.float32, attention="eager")
    peft_model: Any = PeftModel.from_pretrained(module, str(tmp_path / "mood"))
    for text, target in MOODS:
        answer, _ = peft_greedy(peft_model, tiny32.text.encode(f"{text}\n"), 8)
        assert answer == [*tiny32.text.encode(target), EOS], text


def test_a_model_with_a_recurrent_state_is_trained_alike_when_it_computes_activations_again(tmp_path: Path) -> None:
    model = tiny_model("lfm2", dtype=torch.float32)
    losses = []
    for recompute in (False, True):
        config = replace(TAUGHT, steps=5, recompute=recompute)
        found = train_task(model, task_files(tmp_path), config)
        write_task(tmp_path / "mood", found, model.spec)
        assert load_soft_prompts(tmp_path / "mood", model.spec, 100)[0].tensor.shape == (20, model.spec.hidden_size)
        shutil.rmtree(tmp_path / "mood")
        losses.append(found.result.validation.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_keys_and_values_are_not_trained_for_a_model_with_a_recurrent_state(tmp_path: Path) -> None:
    model, config = tiny_model("lfm2", dtype=torch.float32), replace(TAUGHT, method="prefix_tuning")
    with pytest.raises(InvalidSoftPrompt, match="also keeps a recurrent state"):
        train_task(model, task_files(tmp_path), config, no_step)
    frame = Frame(model.spec, 100, model.text.encode, model.text.length_bound.can_fit)
    with pytest.raises(InvalidSoftPrompt, match="also keeps a recurrent state"):
        check_spec(JobSpec("mood", config), frame)
    check_spec(JobSpec("mood", TAUGHT), frame)
