"""`prelude eval`: how good a task's answers are, and whether a version is better than another."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from server.cli.errors import errors_as_sentences
from server.cli.files import read_text
from server.cli.logs import configure_logging
from server.errors import ConfigurationError
from server.settings import Settings


def evaluate(
    task: Annotated[
        str, typer.Argument(help="Name of a task in the inbox, PRELUDE_PROMPTS_DIR; TASK@2 is a version in the store.")
    ],
    data: Annotated[Path, typer.Option(help='JSONL, each line {"input": "…", "target": "…"}.')],
    references: Annotated[
        Path | None,
        typer.Option(
            help='Several right answers for each row: JSONL, each line {"references": ["…", …]}. Default: '
            "X.references.jsonl beside X.jsonl, if it exists."
        ),
    ] = None,
    baselines: Annotated[
        str,
        typer.Option(
            help="Baselines for the same rows, separated by commas: zero-shot (the frozen model in the task's "
            "template), instruction (in a chat), 4-shot (or another number: instruction and examples), @2 "
            "(a version in the store)."
        ),
    ] = "",
    instruction: Annotated[
        str | None,
        typer.Option(help="The instruction of the baselines. Default: `instruction` of meta.json beside the data."),
    ] = None,
    shots_data: Annotated[
        Path | None, typer.Option(help="File of the examples. Default: train.jsonl beside the data.")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="File of a text that contains {input} once: the teacher of the soft prompt, or a text that it "
            "shall replace. The report says on how many rows both choose the same label."
        ),
    ] = None,
    teacher_chat: Annotated[
        bool, typer.Option("--teacher-chat", help="Send the teacher's text as a user message.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate only this many rows from the beginning.")] = None,
    compare: Annotated[
        tuple[int, int] | None, typer.Option(help="Compare two versions in the store: is the second better?")
    ] = None,
    soft_prompt: Annotated[
        Path | None, typer.Option(help="A PEFT directory to evaluate as TASK, instead of the inbox's.")
    ] = None,
    json_line: Annotated[bool, typer.Option("--json", help="Print the report as a last line of JSON too.")] = False,
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="Write README.md into the task's directory, and the figures into the metrics of its "
            "manifest.json. A server that watches the directory then publishes a new version, with the same "
            "answers.",
        ),
    ] = False,
) -> None:
    """Evaluate a task on a data file with the serving engine: each row is an ordinary request.

    With labels: accuracy and macro-F1, both of the likeliest label, as `choices` scores it, and of the generated text.
    Without: exact match, ROUGE-L, BLEU and perplexity. All with 95 % intervals, and with the template and generation
    defaults of TASK's manifest; decoding is greedy unless the manifest sets another. Only --card writes anything, to
    the inbox or the store.
    """
    configure_logging("warning")
    with errors_as_sentences():
        from server.cli import task_source as contents
        from server.cli.scores import print_report
        from server.cli.tables import console
        from server.engine.build import load_engine
        from server.evaluation.card import check_card, render_card, write_card, write_metrics
        from server.evaluation.data import read_evaluation_data, read_rows
        from server.evaluation.evaluation import prepare
        from server.evaluation.standalone import OwnEngine, run
        from server.evaluation.systems import RequestedBaselines, TeacherText

        settings = Settings.load()
        wanted = RequestedBaselines.parse([name.strip() for name in baselines.split(",") if name.strip()])
        rows = read_evaluation_data(data, references=references, limit=limit)
        shots = read_rows(_shots_path(data, shots_data)) if wanted.shots else None
        directory = soft_prompt or settings.prompts_dir / task
        if card:
            check_card(directory)
        if (compare or "@" in task) and (soft_prompt or card):
            raise ConfigurationError(
                "Versions are read from the store; --soft-prompt and --card need a directory.",
                remedy="Evaluate the directory by itself, or pull the version with `prelude prompts pull`.",
            )
        engine = load_engine(settings)
        found = contents.find(settings, engine.model.spec, task, soft_prompt, compare, wanted.versions)
        evaluation = prepare(
            OwnEngine(engine),
            rows,
            (found.name, found.soft_prompt),
            others=found.others,
            wanted=wanted,
            instruction=instruction,
            shots=shots,
            teacher=None if teacher is None else TeacherText(read_text(teacher), teacher_chat),
            version=found.version,
        )
        with _row_bar(evaluation.num_questions) as on_row:
            report = run(engine, evaluation, on_row)
        print_report(report, console())
        if card:
            files = {"--data": data, "--references": references, "--shots-data": shots_data}
            files |= {"--teacher": teacher}
            command = _command(
                task, {**files, "--baselines": baselines, "--instruction": instruction, "--limit": limit}, teacher_chat
            )
            written = write_card(directory, render_card(report, found.soft_prompt, command))
            write_metrics(directory, report)
            typer.echo(f"\n{written} and its manifest.json: written")
        if json_line:
            typer.echo(json.dumps(report.as_dict(), ensure_ascii=False))


def _shots_path(data: Path, given: Path | None) -> Path:
    beside = data.with_name("train.jsonl")
    if given is None and (not beside.exists() or beside.samefile(data)):
        raise ConfigurationError(
            "Examples need training data, and there is no train.jsonl beside the data.",
            remedy="Name it with --shots-data.",
        )
    return given or beside


def _command(task: str, options: Mapping[str, object], teacher_chat: bool) -> str:
    """What measures the same again, as the card tells it."""
    given = [[option, str(value)] for option, value in options.items() if value]
    flags = ["--teacher-chat"] if teacher_chat else []
    return shlex.join(["prelude", "eval", task, *itertools.chain.from_iterable(given), *flags])


@contextmanager
def _row_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar that counts answered rows, and says whose."""
    from tqdm import tqdm

    with tqdm(total=total, unit="row", dynamic_ncols=True) as bar:

        def show(name: str) -> None:
            bar.set_description(name, refresh=False)
            bar.update()

        yield show
