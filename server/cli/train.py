"""`prelude train`: from a data file to a PEFT directory."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.errors import errors_as_sentences
from server.cli.files import read_text
from server.cli.logs import configure_logging
from server.errors import ConfigurationError
from server.settings import Settings
from server.train.config import LARGEST_BATCH, MOST_STEPS, TrainingConfig

if TYPE_CHECKING:  # torch is loaded by the command itself, so that --help answers at once
    from tqdm import tqdm

    from server.train.files import TaskFiles, TaskRows
    from server.train.record import Progress, Score
    from server.train.sweep import Tried

LEARNING = "Learning"
START = "First values"
DISTILLING = "Distillation: learn from a long text instead of from targets"
ABOUT = "About the task"

ABANDONED_SECONDS = 30 * 24 * 3600.0
"""A run that was broken off so long ago is not gone on with."""


def train(
    task: Annotated[str, typer.Argument(help="Name of the task; the soft prompt is written to prompts/TASK.")],
    data: Annotated[
        list[Path],
        typer.Option(help='JSONL, each line {"input": "…", "target": "…"}. Once for each task of a multitask one.'),
    ],
    validation: Annotated[
        list[Path] | None,
        typer.Option(help="The same for held-out rows: they choose the best state. Default: a tenth of the rows."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="prompt_tuning; p_tuning; prefix_tuning, which learns more, in a file 20 times as large; or "
            "multitask_prompt_tuning.",
            rich_help_panel=LEARNING,
        ),
    ] = "prompt_tuning",
    num_virtual_tokens: Annotated[
        int, typer.Option(min=1, help="Learned vectors; 20 to 100 is usual.", rich_help_panel=LEARNING)
    ] = 20,
    steps: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Optimiser steps.", rich_help_panel=LEARNING)] = 600,
    batch_size: Annotated[
        int, typer.Option(min=1, max=LARGEST_BATCH, help="Rows of a step.", rich_help_panel=LEARNING)
    ] = 16,
    lr: Annotated[
        str,
        typer.Option(help="Peak learning rate; auto tries a few for some steps each.", rich_help_panel=LEARNING),
    ] = "auto",
    optimizer: Annotated[str, typer.Option(help="adamw or adafactor.", rich_help_panel=LEARNING)] = "adamw",
    evaluations: Annotated[
        int, typer.Option(min=1, help="Measurements on the validation rows on the way.", rich_help_panel=LEARNING)
    ] = 10,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1, help="Stop after so many measurements that are no better than the best.", rich_help_panel=LEARNING
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Same seed, same machine: same soft prompt.", rich_help_panel=LEARNING)
    ] = 0,
    init: Annotated[
        str,
        typer.Option(
            help="labels, vocab (sampled), text, soft_prompt (another one), teacher (its own keys and values), random; "
            "auto is teacher for prefix tuning with one, else labels where there are some, else vocab.",
            rich_help_panel=START,
        ),
    ] = "auto",
    init_text: Annotated[str | None, typer.Option(help="The text for --init text.", rich_help_panel=START)] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="A PEFT directory for --init soft_prompt.", rich_help_panel=START)
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="File of a long text that holds {input} once: instructions, examples. The soft prompt learns to have "
            "its effect; rows need no targets.",
            rich_help_panel=DISTILLING,
        ),
    ] = None,
    teacher_chat: Annotated[
        bool, typer.Option("--teacher-chat", help="Send that text as a user message.", rich_help_panel=DISTILLING)
    ] = False,
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="Once for each label: learn what the teacher thinks of these, not what it answers.",
            rich_help_panel=DISTILLING,
        ),
    ] = None,
    input_template: Annotated[
        str, typer.Option(help="What the model reads; {input} is the row's input.", rich_help_panel=ABOUT)
    ] = "{input}\\n",
    description: Annotated[
        str | None, typer.Option(help="One line about the task, shown by GET /prompts.", rich_help_panel=ABOUT)
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the data, kept in the manifest.", rich_help_panel=ABOUT)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write instead of prompts/TASK.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew, even if the same run was broken off before.")
    ] = False,
) -> None:
    """Train a soft prompt for TASK on the frozen model, with a progress bar, and write it as a PEFT directory.

    Run again after it was broken off, it goes on where it was.
    """
    configure_logging("warning")
    with errors_as_sentences():
        from server.soft_prompts.names import check_task_name
        from server.train.files import TaskFiles

        check_task_name(task)
        settings = Settings.load()
        config = make_config(
            method=method,
            num_virtual_tokens=num_virtual_tokens,
            steps=steps,
            batch_size=batch_size,
            learning_rate=lr,
            optimizer=optimizer,
            evaluations=min(evaluations, steps),
            patience=patience,
            seed=seed,
            init=init,
            init_text=init_text,
            init_from=None if init_from is None else str(init_from),
            teacher_template=None if teacher is None else read_text(teacher),
            teacher_chat=teacher_chat,
            labels=tuple(label) if label else None,
        )
        files = TaskFiles(
            task=task,
            training=data[0] if len(data) == 1 else tuple(data),
            validation=None if not validation else validation[0] if len(validation) == 1 else tuple(validation),
            input_template=input_template.replace("\\n", "\n").replace("\\t", "\t"),
            description=description,
            licence=licence,
            max_virtual_tokens=settings.max_virtual_tokens,
        )
        learn(files, config, out or settings.prompts_dir / task, settings, fresh=fresh)


def learn(files: TaskFiles, config: TrainingConfig, directory: Path, settings: Settings, *, fresh: bool) -> None:
    """Read the rows, and only then load the model; train, and write the PEFT directory.

    Raises:
        PreludeError: something does not fit; before any step is run, unless the loss gets out of hand.
    """
    from server.train.files import read_task

    rows = read_task(files, config)
    show_rows(rows, is_distilled=config.teacher_template is not None)
    # Torch takes seconds to load, and whoever has mistyped a path need not wait for it.
    from server.engine.model import FrozenModel
    from server.train.dtype import training_settings
    from server.train.output import check_writable, write_task
    from server.train.run import train_task

    check_writable(directory)
    checkpoints = settings.cache_dir.expanduser() / "training" / files.task
    drop_old(checkpoints)
    model = FrozenModel.load(training_settings(settings))
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
            "Broken off. The same command goes on from the last checkpoint; with --fresh it begins anew.", err=True
        )
        raise
    before = measured_before(directory)
    write_task(directory, trained, model.spec)
    if trained.checkpoint is not None:
        shutil.rmtree(trained.checkpoint, ignore_errors=True)
    score, step = trained.result.validation, trained.result.step
    what_was = "" if before is None else f"; what was there before had {before:.1%}"
    typer.echo(f"{directory}: {describe(score)} (step {step}){what_was}")


def show_rows(rows: TaskRows, *, is_distilled: bool) -> None:
    """What was read, and what is odd about it."""
    for training, validation, labels in zip(rows.training, rows.validation, rows.labels, strict=True):
        kind = "targets are text" if not labels else f"labels {', '.join(labels)}"
        kind = "the teacher answers" if is_distilled else kind
        learned, held = len(training.rows), len(validation.rows)
        typer.echo(f"{training.path}: {learned:,} rows to learn from, {held:,} to measure on; {kind}", err=True)
        if {row.input for row in training.rows} >= {row.input for row in validation.rows}:
            typer.echo(
                "Every validation row is a training row: what is measured is how well they were learned by heart.",
                err=True,
            )


def drop_old(checkpoints: Path) -> None:
    """Forget runs that were broken off long ago."""
    for folder in checkpoints.glob("*"):
        if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def measured_before(directory: Path) -> float | None:
    """The validation exact match of what lies there already, if it lies there and says so."""
    try:
        value = json.loads((directory / "manifest.json").read_bytes())["metrics"]["validation_exact_match"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) else None


def make_config(**fields: Any) -> TrainingConfig:
    """Hyperparameters from options.

    Raises:
        ConfigurationError: names the options that do not fit.
    """
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
        problems = {str(error["loc"][0]): error["msg"] for error in exc.errors()}  # of a choice of types the last one
        raise ConfigurationError(
            "; ".join(
                f"--{names.get(field, field).replace('_', '-')} is {fields[field]!r}: {problem}"
                for field, problem in problems.items()
            )
            + ".",
            remedy="`prelude train --help` says what each option takes.",
        ) from exc


def describe(score: Score) -> str:
    """A measurement in words."""
    return f"validation exact match {score.exact_match:.1%}, loss {score.loss:.4f}"


class Bars:
    """Progress bars: of the teacher's rows, of the search for a learning rate, of the steps of training."""

    def __init__(self, task: str, steps: int, taught: int) -> None:
        from tqdm import tqdm

        self._tqdm = tqdm
        self._task, self._steps, self._taught = task, steps, taught
        self._bar: tqdm[Any] | None = None
        self._shown = ""

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_taught(self) -> None:
        """A row that the teacher has been asked about."""
        self._on("teacher", "row", self._taught).update()

    def on_sweep_step(self, progress: Progress) -> None:
        """A step of the search."""
        self._on("learning rate", "step", None).update()

    def on_tried(self, tried: Tried) -> None:
        """A learning rate that was tried."""
        self._on("learning rate", "step", None).write(
            f"learning rate {tried.learning_rate:g}: validation loss {tried.loss:.4f}"
        )

    def on_step(self, progress: Progress) -> None:
        """A step of training; what is measured on the way is written above the bar."""
        is_first = self._shown != self._task
        bar = self._on(self._task, "step", self._steps)
        if is_first and progress.step > 1:
            bar.write(f"goes on from step {progress.step - 1}")
        bar.set_postfix(loss=f"{progress.loss:.3f}", speed=f"{progress.tokens_per_second:.0f} tokens/s", refresh=False)
        bar.update(progress.step - bar.n)  # a run that goes on does not begin at 0
        if score := progress.validation:
            bar.write(f"step {progress.step}: {describe(score)}")

    def _on(self, description: str, unit: str, total: int | None) -> tqdm[Any]:
        if self._bar is not None and self._shown == description:
            return self._bar
        self.__exit__()
        self._bar, self._shown = self._tqdm(desc=description, unit=unit, total=total, dynamic_ncols=True), description
        return self._bar
