"""The command line: thin, every command builds its settings, hands them to the part that does the work, and prints."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from server.errors import PreludeError
from server.options import with_settings_options
from server.settings import Settings

app = typer.Typer(
    name="prelude",
    help="Serve any number of tasks from one frozen LLM: each task is a soft prompt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Serve any number of tasks from one frozen LLM: each task is a soft prompt."""


@contextmanager
def _errors_as_sentences() -> Iterator[None]:
    """Print what went wrong and what to do about it, instead of a traceback; exit with 2."""
    try:
        yield
    except PreludeError as exc:
        typer.secho(f"error: {exc.message}", fg="red", err=True)
        typer.echo(f"       {exc.remedy}", err=True)
        raise typer.Exit(2) from exc


def _configure_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)


def serve(**options: Any) -> None:
    """Serve the frozen model and every soft prompt of the inbox over HTTP."""
    with _errors_as_sentences():
        settings = Settings.load(**options)
        _configure_logging(settings.log_level)
        from server.serve import serve as run

        run(settings)


app.command()(with_settings_options(serve))


@app.command()
def train(
    task: Annotated[str, typer.Argument(help="Name of the task; the soft prompt is written to prompts/TASK.")],
    data: Annotated[Path, typer.Option(help='JSONL, each line {"input": "…", "target": "…"}.')],
    validation: Annotated[Path, typer.Option(help="The same for held-out rows: they choose the best state.")],
    num_virtual_tokens: Annotated[int, typer.Option(min=1, help="Learned vectors; 20 to 100 is usual.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 600,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 16,
    lr: Annotated[float, typer.Option(min=0.0, help="Peak learning rate of AdamW.")] = 2e-2,
    init: Annotated[str, typer.Option(help="First values: vocab, labels or text.")] = "vocab",
    init_text: Annotated[str | None, typer.Option(help="The text for --init text.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same machine: same soft prompt.")] = 0,
    input_template: Annotated[str, typer.Option(help="What the model reads; {input} is the row's input.")] = "{input}\\n",
    evaluations: Annotated[int, typer.Option(min=1, help="Measurements on the validation rows on the way.")] = 8,
    description: Annotated[str | None, typer.Option(help="One line about the task, shown by GET /prompts.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the data, kept in the manifest.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write instead of prompts/TASK.")] = None,
) -> None:
    """Train a soft prompt for TASK on the frozen model, with a progress bar, and write it as a PEFT directory."""
    _configure_logging("warning")
    with _errors_as_sentences():
        from tqdm import tqdm

        from server.engine.model import FrozenModel
        from server.soft_prompts.names import check_task_name
        from server.train.run import TaskFiles, train_task, write_task
        from server.train.trainer import Progress, TrainingConfig

        check_task_name(task)
        settings = Settings.load()
        template = input_template.replace("\\n", "\n").replace("\\t", "\t")
        files = TaskFiles(task, data, validation, template, init_text, description, licence)
        config = TrainingConfig(
            num_virtual_tokens=num_virtual_tokens,
            steps=steps,
            batch_size=batch_size,
            learning_rate=lr,
            init=init,
            seed=seed,
            evaluations=min(evaluations, steps),
        )
        model = FrozenModel.load(settings)
        with tqdm(total=steps, desc=task, unit="step", dynamic_ncols=True) as bar:

            def show(progress: Progress) -> None:
                bar.set_postfix(loss=f"{progress.loss:.3f}", tok_s=f"{progress.tokens_per_second:.0f}", refresh=False)
                bar.update()
                if progress.validation:
                    score = progress.validation
                    bar.write(
                        f"step {progress.step}: validation exact match {score.exact_match:.1%}, loss {score.loss:.4f}"
                    )

            soft_prompt, result = train_task(model, files, config, show)
        directory = out or settings.prompts_dir / task
        write_task(directory, soft_prompt, model)
        typer.echo(f"{directory}: validation exact match {result.validation.exact_match:.1%} (step {result.step})")


if __name__ == "__main__":
    app()
