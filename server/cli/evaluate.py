"""`prelude eval`: evaluates a task, and compares versions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from server.cli.errors import errors_as_sentences
from server.cli.evaluate_options import EvaluateOptions
from server.cli.files import read_text
from server.cli.logs import configure_logging
from server.cli.options import with_options_of
from server.errors import ConfigurationError
from server.settings import Settings

if TYPE_CHECKING:  # the command itself loads torch, so that --help is fast
    from server.evaluation.report import Report
    from server.soft_prompts.soft_prompt import SoftPrompt


@with_options_of(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Evaluate a task on a data file with the serving engine: each row is an ordinary request.

    With labels: accuracy and macro-F1, both of the likeliest label, as `choices` scores it, and of the generated text.
    Without: exact match, ROUGE-L, BLEU and perplexity. All with 95 % intervals, and with the template and generation
    defaults of TASK's manifest; decoding is greedy unless the manifest sets another. Only --card writes anything, to
    the inbox or the store.
    """
    configure_logging("warning")
    with errors_as_sentences():
        from server.cli import task_source
        from server.cli.scores import print_report
        from server.cli.tables import console
        from server.engine.build_engine import load_engine
        from server.evaluation.data import read_evaluation_data, read_rows
        from server.evaluation.evaluation import prepare
        from server.evaluation.standalone import OwnEngine, run
        from server.evaluation.systems import RequestedBaselines, TeacherText

        settings, data, teacher = Settings.load(), options.data, options.teacher
        wanted = RequestedBaselines.parse([name.strip() for name in options.baselines.split(",") if name.strip()])
        rows = read_evaluation_data(data, references=options.references, limit=options.limit)
        shots = read_rows(_shots_path(data, options.shots_data)) if wanted.shots else None
        directory = options.soft_prompt or settings.prompts_dir / options.task
        _check_directory(options, directory)
        if options.soft_prompt is None and options.compare is None:
            task_source.check_reference(settings, options.task)
        engine = load_engine(settings)
        found = task_source.find(
            settings, engine.model.spec, options.task, options.soft_prompt, options.compare, wanted.versions
        )
        evaluation = prepare(
            OwnEngine(engine),
            rows,
            (found.name, found.soft_prompt),
            others=found.others,
            wanted=wanted,
            instruction=options.instruction,
            shots=shots,
            teacher=None if teacher is None else TeacherText(read_text(teacher), options.teacher_chat),
            version=found.version,
        )
        with _row_bar(evaluation.num_questions) as on_row:
            report = run(engine, evaluation, on_row)
        print_report(report, console())
        if options.card:
            from server.cli.card_section import interpret_for_card

            subject = (found.name, found.soft_prompt)
            section = interpret_for_card(engine, settings.cache_dir, directory, rows, subject, _row_bar)
            _write_card(options, directory, report, found.soft_prompt, section)
        if options.json_line:
            typer.echo(json.dumps(report.as_dict(), ensure_ascii=False))


def _check_directory(options: EvaluateOptions, directory: Path) -> None:
    """Refuse a card that cannot be written, and options that contradict each other."""
    from server.evaluation.card import check_card

    if options.card:
        check_card(directory)
    if (options.compare or "@" in options.task) and (options.soft_prompt or options.card):
        raise ConfigurationError(
            "Versions are read from the store; --soft-prompt and --card need a directory.",
            remedy="Evaluate the directory by itself, or pull the version with `prelude prompts pull`.",
        )


def _write_card(
    options: EvaluateOptions, directory: Path, report: Report, soft_prompt: SoftPrompt, section: str
) -> None:
    from server.evaluation.card import eval_command, render_card, write_card, write_metrics

    given = {
        "--data": options.data,
        "--references": options.references,
        "--shots-data": options.shots_data,
        "--teacher": options.teacher,
        "--baselines": options.baselines,
        "--instruction": options.instruction,
        "--limit": options.limit,
        "--teacher-chat": options.teacher_chat,
    }
    command = eval_command(options.task, given)
    written = write_card(directory, render_card(report, soft_prompt, command, section))
    write_metrics(directory, report)
    typer.echo(f"\n{written} and its manifest.json: written")


def _shots_path(data: Path, given: Path | None) -> Path:
    beside = data.with_name("train.jsonl")
    if given is None and (not beside.exists() or beside.samefile(data)):
        raise ConfigurationError(
            "Examples need training data, and there is no train.jsonl beside the data.",
            remedy="Name it with --shots-data.",
        )
    return given or beside


@contextmanager
def _row_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar that counts answered rows and shows the current system."""
    from tqdm import tqdm

    with tqdm(total=total, unit="row", dynamic_ncols=True) as bar:

        def show(name: str) -> None:
            bar.set_description(name, refresh=False)
            bar.update()

        yield show
