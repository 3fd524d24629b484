"""`prelude train`: from a data file to a PEFT directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.errors import errors_as_sentences
from server.cli.logs import configure_logging
from server.errors import InvalidTrainingData
from server.settings import Settings

if TYPE_CHECKING:  # torch is loaded by the command itself, so that --help answers at once
    from server.train.trainer import Progress

HIGHEST_LEARNING_RATE = 1e6
"""Beyond it a step leaves the range of float32, and nothing could be learned long before."""


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
    input_template: Annotated[
        str, typer.Option(help="What the model reads; {input} is the row's input.")
    ] = "{input}\\n",
    evaluations: Annotated[int, typer.Option(min=1, help="Measurements on the validation rows on the way.")] = 8,
    description: Annotated[str | None, typer.Option(help="One line about the task, shown by GET /prompts.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the data, kept in the manifest.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write instead of prompts/TASK.")] = None,
) -> None:
    """Train a soft prompt for TASK on the frozen model, with a progress bar, and write it as a PEFT directory."""
    configure_logging("warning")
    with errors_as_sentences():
        from server.engine.model import FrozenModel
        from server.soft_prompts.names import check_task_name
        from server.soft_prompts.soft_prompt import check_shape
        from server.train.run import TaskFiles, check_writable, train_task, write_task
        from server.train.trainer import TrainingConfig

        check_task_name(task)
        if not lr <= HIGHEST_LEARNING_RATE:
            raise InvalidTrainingData(f"--lr is {lr:g}.", remedy="Lower the learning rate: 0.02 is usual.")
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
        directory = out or settings.prompts_dir / task
        check_writable(directory)
        model = FrozenModel.load(settings)
        shape = (num_virtual_tokens, model.spec.hidden_size)
        check_shape("PROMPT_TUNING", shape, model.spec, settings.max_virtual_tokens)
        with _step_bar(task, steps) as on_step:
            soft_prompt, result = train_task(model, files, config, on_step)
        write_task(directory, soft_prompt, model)
        typer.echo(f"{directory}: validation exact match {result.validation.exact_match:.1%} (step {result.step})")


@contextmanager
def _step_bar(task: str, steps: int) -> Iterator[Callable[[Progress], None]]:
    """A progress bar that counts steps; what is measured on the way is written above it."""
    from tqdm import tqdm

    with tqdm(total=steps, desc=task, unit="step", dynamic_ncols=True) as bar:

        def show(progress: Progress) -> None:
            bar.set_postfix(loss=f"{progress.loss:.3f}", tok_s=f"{progress.tokens_per_second:.0f}", refresh=False)
            bar.update()
            if score := progress.validation:
                bar.write(
                    f"step {progress.step}: validation exact match {score.exact_match:.1%}, loss {score.loss:.4f}"
                )

        yield show
