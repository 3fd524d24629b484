"""`prelude eval`: how often a task's answers are right."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.errors import errors_as_sentences
from server.cli.logs import configure_logging
from server.errors import ConfigurationError, InvalidSoftPrompt, UnknownTask
from server.settings import Settings

if TYPE_CHECKING:  # torch is loaded by the command itself, so that --help answers at once
    from server.core import ModelSpec
    from server.soft_prompts.soft_prompt import SoftPrompt
    from server.train.evaluate import Evaluation


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
    configure_logging("warning")
    with errors_as_sentences():
        if baseline != bool(instruction):
            raise ConfigurationError(
                "--baseline and --instruction belong together.", remedy='Give both, or neither: --instruction "…".'
            )
        from server.engine.build import load_engine
        from server.train.data import labels_of, read_data
        from server.train.evaluate import evaluate_baseline, evaluate_task

        settings = Settings.load()
        rows = read_data(data).first(limit)
        engine = load_engine(settings)
        model = engine.model
        found = _find_soft_prompt(settings, model.spec, task, soft_prompt)
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
