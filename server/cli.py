"""The command line: thin, every command builds its settings, hands them to the part that does the work, and prints."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server import cli_keys, cli_prompts
from server.cli_errors import errors_as_sentences
from server.errors import ConfigurationError, InvalidSoftPrompt, InvalidTrainingData, UnknownTask
from server.options import with_settings_options
from server.settings import Settings

if TYPE_CHECKING:  # torch is loaded by the commands that need it, so that --help answers at once
    from server.core import ModelSpec
    from server.soft_prompts.soft_prompt import SoftPrompt
    from server.train.evaluate import Evaluation

HIGHEST_LEARNING_RATE = 1e6
"""Beyond it a step leaves the range of float32, and nothing could be learned long before."""

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


def _configure_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)


def serve(**options: Any) -> None:
    """Serve the frozen model and every soft prompt of the inbox over HTTP."""
    with errors_as_sentences():
        settings = Settings.load(**options)
        _configure_logging(settings.log_level)
        from server.serve import serve as run

        run(settings)


app.command()(with_settings_options(serve))
app.add_typer(cli_keys.app, name="keys")
app.add_typer(cli_prompts.app, name="prompts")


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
    input_template: Annotated[
        str, typer.Option(help="What the model reads; {input} is the row's input.")
    ] = "{input}\\n",
    evaluations: Annotated[int, typer.Option(min=1, help="Measurements on the validation rows on the way.")] = 8,
    description: Annotated[str | None, typer.Option(help="One line about the task, shown by GET /prompts.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the data, kept in the manifest.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write instead of prompts/TASK.")] = None,
) -> None:
    """Train a soft prompt for TASK on the frozen model, with a progress bar, and write it as a PEFT directory."""
    _configure_logging("warning")
    with errors_as_sentences():
        from tqdm import tqdm

        from server.engine.model import FrozenModel
        from server.soft_prompts.names import check_task_name
        from server.soft_prompts.soft_prompt import check_shape
        from server.train.run import TaskFiles, check_writable, train_task, write_task
        from server.train.trainer import Progress, TrainingConfig

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
        write_task(directory, soft_prompt, model)
        typer.echo(f"{directory}: validation exact match {result.validation.exact_match:.1%} (step {result.step})")


@app.command(name="eval")
def evaluate(
    task: Annotated[str, typer.Argument(help="Name of a task in the inbox, PRELUDE_PROMPTS_DIR.")],
    data: Annotated[Path, typer.Option(help='JSONL, each line {"input": "…", "target": "…"}.')],
    soft_prompt: Annotated[
        Path | None, typer.Option(help="A PEFT directory to evaluate as TASK, instead of the inbox's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline",
            help="Also ask the frozen model alone, zero-shot: --instruction, an empty line and the input, in the chat "
            "template. The first line of its answer counts, whatever its case and the punctuation around it.",
        ),
    ] = False,
    instruction: Annotated[str | None, typer.Option(help="What the baseline is told to do with an input.")] = None,
    json_line: Annotated[
        bool, typer.Option("--json", help="Print the figures again, last, as a line of JSON.")
    ] = False,
) -> None:
    """Measure exact match on a data file through the served path: every row is an ordinary request to the engine.

    All rows are sent at once, with the template and the generation defaults of TASK's manifest; decoding is greedy
    unless the manifest says otherwise. An answer counts if, without the white space around it, it is the target.
    Nothing is written: neither to the inbox nor to the store.
    """
    _configure_logging("warning")
    with errors_as_sentences():
        if baseline != bool(instruction):
            raise ConfigurationError(
                "--baseline and --instruction belong together.", remedy='Give both, or neither: --instruction "…".'
            )
        from server.engine.build import build_engine
        from server.engine.model import FrozenModel
        from server.train.data import labels_of, read_data
        from server.train.evaluate import evaluate_baseline, evaluate_task

        settings = Settings.load()
        rows = read_data(data).first(limit)
        model = FrozenModel.load(settings)
        found = _find_soft_prompt(settings, model.spec, task, soft_prompt)
        engine = build_engine(settings, model)
        labels = found.manifest.labels or labels_of(rows.rows) or ()
        with _row_bar(task, len(rows.rows)) as on_answer:
            result = evaluate_task(engine, found, rows, on_answer)
        _print_evaluation(task, result, labels)
        figures: dict[str, Any] = {
            "task": task,
            "model": model.spec.name,
            "dtype": model.spec.dtype,
            "digest": found.digest,
        }
        figures |= {"data_sha256": rows.sha256, **result.as_dict(labels)}
        if instruction:
            with _row_bar("baseline", len(rows.rows)) as on_answer:
                alone = evaluate_baseline(engine, instruction, rows, on_answer)
            _print_evaluation(f"{model.spec.name} alone, zero-shot", alone, labels)
            figures["baseline"] = {"instruction": instruction, **alone.as_dict(labels)}
        if json_line:
            typer.echo(json.dumps(figures, ensure_ascii=False))


def _find_soft_prompt(settings: Settings, model: ModelSpec, task: str, directory: Path | None) -> SoftPrompt:
    """What a server that starts with this inbox answers `task` with, or the one in a directory.

    It is published as a server publishes it, but to a store that is gone afterwards.
    """
    from server.registry.inbox import Inbox
    from server.registry.objects import LocalObjects
    from server.registry.registry import Registry
    from server.registry.store import Store
    from server.soft_prompts.formats import load_soft_prompts
    from server.soft_prompts.names import names_of

    with tempfile.TemporaryDirectory(prefix="prelude-eval-") as store:
        registry = Registry(Store(LocalObjects(Path(store))), model, settings.max_virtual_tokens)
        if directory is not None:
            if not directory.is_dir():
                raise InvalidSoftPrompt(f"There is no directory {directory}.", remedy="Name a PEFT directory.")
            contents = load_soft_prompts(directory, model, settings.max_virtual_tokens)
            if names_of(task, contents) != [task]:
                raise InvalidSoftPrompt(
                    f"{directory} is a multitask soft prompt with {len(contents)} rows.",
                    remedy=f"Put it into {settings.prompts_dir}; there they are {directory.name}-0, ….",
                )
            registry.publish(task, contents, "inbox")
        else:
            Inbox(settings.prompts_dir, registry).scan(settle_seconds=0)
        try:
            return registry.fetch(registry.resolve(task)).result()
        except UnknownTask as exc:
            if task in registry.errors:
                raise InvalidSoftPrompt(
                    f"{settings.prompts_dir / task} cannot be served.", remedy=registry.errors[task]
                ) from exc
            tasks = ", ".join(live.name for live in registry.tasks()[:20]) or "nothing"
            raise UnknownTask(
                exc.message, remedy=f"{settings.prompts_dir} holds {tasks}; or name a directory with --soft-prompt."
            ) from exc


@contextmanager
def _row_bar(description: str, rows: int) -> Iterator[Callable[[], None]]:
    """A progress bar that counts answered rows."""
    from tqdm import tqdm

    with tqdm(total=rows, desc=description, unit="row", dynamic_ncols=True) as bar:

        def show() -> None:
            bar.update()

        yield show


def _print_evaluation(name: str, result: Evaluation, labels: Sequence[str]) -> None:
    typer.echo(
        f"{name}: exact match {result.exact_match:.1%} ({result.correct} of {len(result.answers)} rows), "
        f"{result.seconds:.1f} s, {result.requests_per_second:.1f} requests/s"
    )
    for label, (correct, rows) in result.by_label(labels).items():
        typer.echo(f"  {label}: {correct} of {rows}")


if __name__ == "__main__":
    app()
