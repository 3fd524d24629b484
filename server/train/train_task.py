"""One training run, from data files to a trained soft prompt in memory, for `prelude train` and training jobs."""

import contextlib
import datetime
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from server.durable import replace_file
from server.engine.model.frozen import FrozenModel
from server.soft_prompts.manifest import BaseModelRef, GenerationDefaults, Manifest
from server.soft_prompts.soft_prompt import check_size
from server.soft_prompts.start import START_FIELD, TrainingStart
from server.train.config import NEAREST_TASK, TrainingConfig
from server.train.data import DataFile, encode_examples
from server.train.distil import distilled_lessons
from server.train.inputs import TaskFiles, TaskRows, read_task
from server.train.learning_rate import BEGUN_AS_TEACHER, Tried, find_learning_rate
from server.train.methods import build_prefix
from server.train.objectives import Lesson, Objective, Targets, TeacherLabels, TeacherTokens
from server.train.output import Trained
from server.train.run_history import TrainingProgress, TrainingResult
from server.train.start import begin
from server.train.trainer import TrainingProblem, train

Watch = Callable[[TrainingProgress], None]


def train_task(
    model: FrozenModel,
    files: TaskFiles,
    config: TrainingConfig,
    on_step: Watch = lambda progress: None,
    *,
    rows: TaskRows | None = None,
    checkpoint: Path | None = None,
    fresh: bool = False,
    on_tried: Callable[[Tried], None] = lambda tried: None,
    on_sweep_step: Watch = lambda progress: None,
    on_taught: Callable[[], None] = lambda: None,
) -> Trained:
    """Read, check, look for a learning rate, train.

    Args:
        on_step: called after each step of training; if it raises, the run ends.
        rows: the files' rows, if they have been read already.
        checkpoint: folder for checkpoints; the run resumes from one of the same data and configuration, if there is
            one.

    Raises:
        InvalidTrainingData: before any step is run; or the loss is not finite any more.
    """
    rows = rows or read_task(files, config)
    check_size(config.peft_type, config.num_virtual_tokens, model.spec, files.max_virtual_tokens)
    objective: Objective = Targets()
    if config.teacher_template is not None:
        objective = TeacherLabels() if config.labels else TeacherTokens()
    training, validation = (
        [lesson for task, data in enumerate(part) for lesson in _lessons(model, files, config, data, task, on_taught)]
        for part in (rows.training, rows.validation)
    )
    labels = config.labels or rows.labels[0]
    initial, start = begin(model, config, rows.training[0], labels, files.start_of(config))
    if files.found_start is not None:
        found = {"nearest_task": files.found_start.task, "similarity": round(files.found_start.similarity, 4)}
        start = start.model_copy(update=found)
    work = TrainingProblem(model, build_prefix(config, initial, len(rows.training)), objective, training, validation)
    folder = None if checkpoint is None else checkpoint / run_key(model, files, config, rows)
    if fresh and folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    peaks = None if start.teacher_tokens is None else BEGUN_AS_TEACHER
    learning_rate = _learning_rate(work, config, folder, on_sweep_step, on_tried, peaks)
    result = train(work, config, learning_rate, on_step, checkpoint=folder)
    manifest = _manifest(model, files, config, rows, work, result, learning_rate, start)
    return Trained(work.prefix.peft_type, result, manifest, folder)


def run_key(model: FrozenModel, files: TaskFiles, config: TrainingConfig, rows: TaskRows) -> str:
    """A key from model, data and configuration; a checkpoint is resumed only by a run with the same key."""
    said = {
        "fingerprint": model.spec.fingerprint,
        "dtype": model.spec.dtype,
        "data": [data.sha256 for data in (*rows.training, *rows.validation)],
        "template": files.input_template,
        "system_message": files.system_message,
        "special_tokens_in_input": model.text.special_tokens_in_input,
        "max_new_tokens": files.max_new_tokens,
        "config": config.as_dict(),
        "start": None if (start := files.start_of(config)) is None else _content_of(start),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _content_of(directory: Path) -> list[str]:
    """Hashes of a PEFT directory's files, so that another soft prompt in the same directory makes another run."""
    found = sorted(file for file in directory.glob("adapter_*") if file.is_file())
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in found]


def _lessons(
    model: FrozenModel,
    files: TaskFiles,
    config: TrainingConfig,
    data: DataFile,
    task: int,
    on_taught: Callable[[], None],
) -> list[Lesson]:
    examples = encode_examples(data, model, files.input_manifest, config.num_virtual_tokens)
    if config.teacher_template is None:
        return [Lesson((replace(example, task=task),)) for example in examples]
    students = [example.input_ids for example in examples]
    return distilled_lessons(model, config, data, students, files.max_new_tokens, on_taught)


def _learning_rate(
    work: TrainingProblem,
    config: TrainingConfig,
    folder: Path | None,
    on_step: Watch,
    on_tried: Callable[[Tried], None],
    peaks: Sequence[float] | None,
) -> float:
    """The configured learning rate, or the result of the search; a resumed run reuses the rate it found."""
    if config.learning_rate != "auto":
        return config.learning_rate
    known = None if folder is None else folder / "learning_rate"
    if known is not None:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is not whole: it is looked for again
            return float(known.read_bytes())
    found = find_learning_rate(work, config, on_step, on_tried, peaks)
    if known is not None:
        known.parent.mkdir(parents=True, exist_ok=True)
        replace_file(known, repr(found).encode())
    return found


def _manifest(
    model: FrozenModel,
    files: TaskFiles,
    config: TrainingConfig,
    rows: TaskRows,
    work: TrainingProblem,
    result: TrainingResult,
    learning_rate: float,
    start: TrainingStart,
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
        system_message=files.system_message,
        generation=GenerationDefaults(max_new_tokens=longest),
        labels=labels,
        licence=files.licence,
        training={
            **config.as_dict(),
            **({} if files.found_start is None else {"init": NEAREST_TASK}),  # as was asked for; init_from names it
            "best_step": result.step,
            "data_sha256": _hashes(rows.training),
            "dtype": model.spec.dtype,
            "learning_rate": learning_rate,
            "validation_sha256": _hashes(rows.validation),
            "rows": sum(len(data.rows) for data in rows.training),
            **({START_FIELD: start.as_dict()} if start.fits_manifest else {}),
        },
        metrics={
            "validation_exact_match": round(result.validation.exact_match, 4),
            "validation_loss": round(result.validation.loss, 4),
            "validation_rows": sum(len(data.rows) for data in rows.validation),
        },
    )


def _hashes(files: Sequence[DataFile]) -> str | list[str]:
    return files[0].sha256 if len(files) == 1 else [data.sha256 for data in files]
