"""`prelude train`: trains a soft prompt from a data file, and writes a PEFT directory."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from server.cli.errors import errors_as_sentences, printable
from server.cli.files import read_text
from server.cli.jobs import send
from server.cli.logs import configure_logging
from server.cli.options import with_options_of
from server.cli.train_options import TrainOptions
from server.errors import ConfigurationError
from server.settings import Settings
from server.train.config import TrainingConfig

if TYPE_CHECKING:  # the command itself loads torch, so that --help is fast
    from server.train.inputs import TaskFiles, TaskRows

ABANDONED_SECONDS = 30 * 24 * 3600.0
"""Interrupted runs older than this are not resumed."""


@with_options_of(TrainOptions)
def train(options: TrainOptions) -> None:
    """Train a soft prompt for TASK on the frozen model, with a progress bar, and write it as a PEFT directory.

    The same command resumes a run that was interrupted.

    With --url, a running server trains, and publishes the result.
    """
    configure_logging("warning")
    with errors_as_sentences():
        from server.soft_prompts.names import check_task_name

        check_task_name(options.task)
        settings = Settings.load()
        config, files = config_of(options), files_of(options, settings)
        at_least = options.activate_at_least
        if options.url is None:
            for_jobs = {"activate": options.activate, "activate-at-least": at_least is not None}
            refuse("for a job of a server", "Name the server with --url.", **for_jobs, detach=options.detach)
            learn(files, config, options.out or settings.prompts_dir / options.task, settings, fresh=options.fresh)
            return
        here = {"out": options.out, "fresh": options.fresh}
        refuse("for training on this machine", "Leave it out, or leave out --url.", **here)
        if options.activate and at_least is not None:
            raise ConfigurationError(
                "--activate and --activate-at-least exclude each other.", remedy="Give one of them."
            )
        bound = {"metric": "validation_exact_match", "at_least": at_least}
        activate = options.activate if at_least is None else bound
        train_there(files, config, activate, options.url, options.key, detach=options.detach)


def config_of(options: TrainOptions) -> TrainingConfig:
    """The hyperparameters from the options; ConfigurationError names the options that do not fit."""
    return make_config(
        method=options.method,
        num_virtual_tokens=options.num_virtual_tokens,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.lr,
        optimizer=options.optimizer,
        evaluations=min(options.evaluations, options.steps),
        patience=options.patience,
        seed=options.seed,
        init=options.init,
        init_text=options.init_text,
        init_from=None if options.init_from is None else str(options.init_from),
        teacher_template=None if options.teacher is None else read_text(options.teacher),
        teacher_chat=options.teacher_chat,
        labels=tuple(options.label) if options.label else None,
    )


def files_of(options: TrainOptions, settings: Settings) -> TaskFiles:
    """The task's files and its descriptive fields."""
    from server.train.inputs import TaskFiles

    data, validation = options.data, options.validation
    return TaskFiles(
        task=options.task,
        training=data[0] if len(data) == 1 else tuple(data),
        validation=None if not validation else validation[0] if len(validation) == 1 else tuple(validation),
        input_template=options.input_template.replace("\\n", "\n").replace("\\t", "\t"),
        system_message=options.system_message,
        description=options.description,
        licence=options.licence,
        max_virtual_tokens=settings.max_virtual_tokens,
    )


def learn(files: TaskFiles, config: TrainingConfig, directory: Path, settings: Settings, *, fresh: bool) -> None:
    """Read the rows, then load the model, train, and write the PEFT directory; invalid input ends it before a step."""
    rows = read_rows(files, config)
    # Torch takes seconds to load; a mistyped path is reported before.
    from server.cli.bars import Bars, in_words
    from server.engine.model.frozen import FrozenModel
    from server.interpret.nearest_task import with_start
    from server.train.dtype import training_settings
    from server.train.output import check_writable, write_task
    from server.train.train_task import train_task

    check_writable(directory)
    checkpoints = settings.cache_dir.expanduser() / "training" / files.task
    drop_old(checkpoints)
    model = FrozenModel.load(training_settings(settings))
    files, config = with_start(model, files, config, rows, published(settings.prompts_dir, directory), typer.echo)
    try:
        taught = sum(len(data.rows) for data in (*rows.training, *rows.validation))
        with Bars(files.task, config.steps, taught) as bars:
            trained = train_task(
                model,
                files,
                config,
                bars.on_step,
                rows=rows,
                checkpoint=checkpoints,
                fresh=fresh,
                on_tried=bars.on_tried,
                on_sweep_step=bars.on_sweep_step,
                on_taught=bars.on_taught,
            )
    except KeyboardInterrupt:
        typer.echo(
            "Interrupted. The same command resumes from the last checkpoint; with --fresh it starts over.", err=True
        )
        raise
    before = measured_before(directory)
    write_task(directory, trained, model.spec)
    if trained.checkpoint is not None:
        shutil.rmtree(trained.checkpoint, ignore_errors=True)
    score, step = trained.result.validation, trained.result.step
    what_was = "" if before is None else f"; what was there before had {before:.1%}"
    typer.echo(f"{directory}: {in_words(score.exact_match, score.loss)} (step {step}){what_was}")


def published(prompts_dir: Path, but: Path) -> dict[str, Path]:
    """The PEFT directories of the inbox by their names, without the one that is written."""
    found = sorted(path.parent for path in prompts_dir.glob("*/adapter_config.json"))
    return {directory.name: directory for directory in found if directory.resolve() != but.resolve()}


def train_there(
    files: TaskFiles, config: TrainingConfig, activate: object, url: str, key: str | None, *, detach: bool
) -> None:
    """Read and check the rows locally, then send them to a server as a job."""
    if isinstance(files.training, tuple) or isinstance(files.validation, tuple):
        raise ConfigurationError("A job takes one data file.", remedy="Train several tasks on this machine.")
    read_rows(files, config)
    about = {name: getattr(files, name) for name in ("system_message", "description", "licence")}
    spec = {
        "task": files.task,
        "config": config.as_dict(),
        "input_template": files.input_template,
        "activate": activate,
        **{name: text for name, text in about.items() if text is not None},
    }
    send(spec, files.training, files.validation, url, key, detach=detach)


def refuse(purpose: str, remedy: str, **given: object) -> None:
    """Refuse (ConfigurationError) options that have no effect in this kind of training."""
    for name, value in given.items():
        if value:
            raise ConfigurationError(f"--{name} is {purpose}.", remedy=remedy)


def read_rows(files: TaskFiles, config: TrainingConfig) -> TaskRows:
    """Read and check all rows; prints a summary and warnings."""
    from server.train.inputs import read_task

    rows, is_distilled = read_task(files, config), config.teacher_template is not None
    for training, validation, labels in zip(rows.training, rows.validation, rows.labels, strict=True):
        kind = "targets are text" if not labels else printable(f"labels {', '.join(labels)}")
        kind = "the teacher answers" if is_distilled else kind
        learned, held = len(training.rows), len(validation.rows)
        typer.echo(f"{training.path}: {learned:,} rows to learn from, {held:,} to measure on; {kind}", err=True)
        if {row.input for row in training.rows} >= {row.input for row in validation.rows}:
            typer.echo(
                "Every validation row is a training row: what is measured is how well they were learned by heart.",
                err=True,
            )
    return rows


def drop_old(checkpoints: Path) -> None:
    """Remove runs that were interrupted long ago."""
    for folder in checkpoints.glob("*"):
        if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def measured_before(directory: Path) -> float | None:
    """The validation exact match in the manifest of an existing directory, if there is one."""
    try:
        value = json.loads((directory / "manifest.json").read_bytes())["metrics"]["validation_exact_match"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) else None


def make_config(**fields: Any) -> TrainingConfig:
    """Hyperparameters from options; ConfigurationError names the options that do not fit."""
    from pydantic import TypeAdapter, ValidationError

    if fields["learning_rate"] != "auto":
        try:
            fields["learning_rate"] = float(fields["learning_rate"])
        except ValueError as exc:
            raise ConfigurationError(
                f"--lr is {fields['learning_rate']!r}.", remedy="Give a number, 0.02 is usual, or auto."
            ) from exc
    try:
        return TypeAdapter(TrainingConfig).validate_python(fields)
    except ValidationError as exc:
        names = {"learning_rate": "lr"}
        # For a union type, the last error counts.
        problems = {str(error["loc"][0]): error["msg"] for error in exc.errors()}
        raise ConfigurationError(
            "; ".join(
                f"--{names.get(field, field).replace('_', '-')} is {fields[field]!r}: {problem}"
                for field, problem in problems.items()
            )
            + ".",
            remedy="`prelude train --help` says what each option takes.",
        ) from exc
