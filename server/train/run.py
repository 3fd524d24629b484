"""One training run, from files to a PEFT directory: what `prelude train` does, without the terminal."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from server.engine.model import FrozenModel
from server.errors import InvalidTrainingData
from server.soft_prompts.manifest import BaseModelRef, GenerationDefaults, Manifest
from server.soft_prompts.soft_prompt import check_shape
from server.train.config import TrainingConfig, contradiction
from server.train.data import DataFile, check_rows, encode_examples, hold_out, labels_of, read_data
from server.train.distil import distilled_lessons
from server.train.initial import initial_values
from server.train.methods import build_prefix
from server.train.objectives import Lesson, Objective, Targets, TeacherLabels, TeacherTokens
from server.train.output import Trained
from server.train.record import Progress, TrainingResult
from server.train.sweep import Tried, find_learning_rate
from server.train.trainer import Work, train

Watch = Callable[[Progress], None]


@dataclass(frozen=True)
class TaskFiles:
    """What a training run is given beside its hyperparameters."""

    task: str
    training: Path | tuple[Path, ...]
    """Several only for multitask prompt tuning: one for each task."""
    validation: Path | tuple[Path, ...] | None = None
    """As many; None holds out a tenth of the rows."""
    input_template: str = "{input}\n"
    description: str | None = None
    licence: str | None = None
    max_virtual_tokens: int = 512
    max_new_tokens: int = 64
    """Of a teacher's answers, in distillation."""
    start: Path | None = None
    """The PEFT directory that config.init_from names, where that is not its path."""


@dataclass(frozen=True)
class _Rows:
    training: tuple[DataFile, ...]
    validation: tuple[DataFile, ...]
    labels: tuple[tuple[str, ...] | None, ...]


def train_task(
    model: FrozenModel,
    files: TaskFiles,
    config: TrainingConfig,
    on_step: Watch = lambda progress: None,
    *,
    checkpoint: Path | None = None,
    on_tried: Callable[[Tried], None] = lambda tried: None,
    on_sweep_step: Watch = lambda progress: None,
    on_taught: Callable[[], None] = lambda: None,
) -> Trained:
    """Read, check, look for a learning rate, train.

    Args:
        model: the frozen model; nothing is written to it.
        files: data and what is said about it.
        config: hyperparameters.
        on_step: called after each step of training; what it raises ends the run.
        checkpoint: a folder to go on from, if a run of the same data and configuration has left something there.
        on_tried: called after each learning rate that was tried.
        on_sweep_step: called after each step of that search.
        on_taught: called for each row that a teacher has been asked about.

    Raises:
        InvalidTrainingData: before any step is run; or the loss is not finite any more.
    """
    check_kind(files, config)
    check_shape(
        "PROMPT_TUNING", (config.num_virtual_tokens, model.spec.hidden_size), model.spec, files.max_virtual_tokens
    )
    rows = _read(files, config)
    objective: Objective = Targets()
    if config.teacher_template is not None:
        objective = TeacherLabels() if config.labels else TeacherTokens()
    training, validation = (
        [lesson for task, data in enumerate(part) for lesson in _lessons(model, files, config, data, task, on_taught)]
        for part in (rows.training, rows.validation)
    )
    initial = initial_values(model, config, config.labels or rows.labels[0], _start(files, config))
    work = Work(model, build_prefix(config, initial, len(rows.training)), objective, training, validation)
    folder = None if checkpoint is None else checkpoint / run_key(model, files, config, rows)
    learning_rate = _learning_rate(work, config, folder, on_sweep_step, on_tried)
    result = train(work, config, learning_rate, on_step, checkpoint=folder)
    manifest = _manifest(model, files, config, rows, work, result, learning_rate)
    return Trained(work.prefix.peft_type, result, manifest)


def check_kind(files: TaskFiles, config: TrainingConfig) -> None:
    """Refuse what contradicts itself.

    Raises:
        InvalidTrainingData: says what does.
    """
    several = isinstance(files.training, tuple) and len(files.training) > 1
    if several != (config.method == "multitask_prompt_tuning"):
        raise InvalidTrainingData(
            "Several data files are the tasks of multitask prompt tuning, which needs at least two.",
            remedy="Give --data once; or give it once for each task, with --method multitask_prompt_tuning.",
        )
    if several and config.teacher_template is not None:
        raise InvalidTrainingData("Several tasks cannot be distilled together.", remedy="Distil one after the other.")
    if (found := contradiction(config, files.input_template)) is not None:
        raise InvalidTrainingData(found.message, remedy=found.remedy)


def run_key(model: FrozenModel, files: TaskFiles, config: TrainingConfig, rows: _Rows) -> str:
    """Names a run: only a checkpoint of the same model, data and configuration is gone on from."""
    said = {
        "fingerprint": model.spec.fingerprint,
        "dtype": model.spec.dtype,
        "data": [data.sha256 for data in (*rows.training, *rows.validation)],
        "template": files.input_template,
        "max_new_tokens": files.max_new_tokens,
        "config": config.as_dict(),
        "start": None if (start := _start(files, config)) is None else _content_of(start),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _start(files: TaskFiles, config: TrainingConfig) -> Path | None:
    return files.start or (None if config.init_from is None else Path(config.init_from))


def _content_of(directory: Path) -> list[str]:
    """What lies in a directory, by content: another soft prompt under the same name is another beginning."""
    found = sorted(file for file in directory.glob("adapter_*") if file.is_file())
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in found]


def _read(files: TaskFiles, config: TrainingConfig) -> _Rows:
    need = config.teacher_template is None
    paths = files.training if isinstance(files.training, tuple) else (files.training,)
    held = files.validation if isinstance(files.validation, tuple | None) else (files.validation,)
    if held is not None and len(held) != len(paths):
        raise InvalidTrainingData(
            f"{len(paths)} data files and {len(held)} validation files.", remedy="Give one for each, or none."
        )
    pairs = []
    for number, path in enumerate(paths):
        data = read_data(path, need_targets=need)
        pairs.append(hold_out(data) if held is None else (data, read_data(held[number], need_targets=need)))
    labels = [labels_of(training.rows) if need else None for training, _ in pairs]
    for (training, validation), of in zip(pairs, labels, strict=True):
        check_rows(training, validation, of)
    return _Rows(tuple(one for one, _ in pairs), tuple(other for _, other in pairs), tuple(labels))


def _lessons(
    model: FrozenModel,
    files: TaskFiles,
    config: TrainingConfig,
    data: DataFile,
    task: int,
    on_taught: Callable[[], None],
) -> list[Lesson]:
    examples = encode_examples(data, model, Manifest(input_template=files.input_template), config.num_virtual_tokens)
    if config.teacher_template is None:
        return [Lesson((replace(example, task=task),)) for example in examples]
    students = [example.input_ids for example in examples]
    return distilled_lessons(model, config, data, students, files.max_new_tokens, on_taught)


def _learning_rate(
    work: Work, config: TrainingConfig, folder: Path | None, on_step: Watch, on_tried: Callable[[Tried], None]
) -> float:
    """The one that is asked for, or found; a run that goes on uses the one it began with."""
    if config.learning_rate != "auto":
        return config.learning_rate
    known = None if folder is None else folder / "learning_rate"
    if known is not None and known.is_file():
        return float(known.read_text(encoding="utf-8"))
    found = find_learning_rate(work, config, on_step, on_tried)
    if known is not None:
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(repr(found), encoding="utf-8")
    return found


def _manifest(
    model: FrozenModel,
    files: TaskFiles,
    config: TrainingConfig,
    rows: _Rows,
    work: Work,
    result: TrainingResult,
    learning_rate: float,
) -> Manifest:
    longest = max(
        len(example.target_ids) for lesson in (*work.training, *work.validation) for example in lesson.examples
    )
    labels = config.labels or (rows.labels[0] if len(rows.labels) == 1 else None)
    return Manifest(
        task=files.task,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        base_model=BaseModelRef(name=model.spec.name, fingerprint=model.spec.fingerprint),
        peft_type=work.prefix.peft_type,
        num_virtual_tokens=config.num_virtual_tokens,
        hidden_size=model.spec.hidden_size,
        description=files.description,
        input_template=files.input_template,
        generation=GenerationDefaults(max_new_tokens=longest),
        labels=labels,
        licence=files.licence,
        training={
            **config.as_dict(),
            "best_step": result.step,
            "data_sha256": _hashes(rows.training),
            "dtype": model.spec.dtype,
            "learning_rate": learning_rate,
            "validation_sha256": _hashes(rows.validation),
            "rows": sum(len(data.rows) for data in rows.training),
        },
        metrics={
            "validation_exact_match": round(result.validation.exact_match, 4),
            "validation_loss": round(result.validation.loss, 4),
            "validation_rows": sum(len(data.rows) for data in rows.validation),
        },
    )


def _hashes(files: Sequence[DataFile]) -> str | list[str]:
    """Which data it was."""
    return files[0].sha256 if len(files) == 1 else [data.sha256 for data in files]
