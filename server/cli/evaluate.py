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
            help='Several right answers for each row: JSONL, line by line {"references": ["…", …]}. '
            "Default: X.references.jsonl beside X.jsonl, if it is there."
        ),
    ] = None,
    baselines: Annotated[
        str,
        typer.Option(
            help="Who answers the same rows beside it, with commas between them: zero-shot (the frozen model in the "
            "task's template), instruction (told what to do, in a chat), 4-shot (or another number: instruction and "
            "examples), @2 (a version in the store)."
        ),
    ] = "",
    instruction: Annotated[
        str | None, typer.Option(help="What baselines are told. Default: `instruction` of meta.json beside the data.")
    ] = None,
    shots_data: Annotated[
        Path | None, typer.Option(help="Where examples come from. Default: train.jsonl beside the data.")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="File of a text that holds {input} once, to be asked too: what the soft prompt was distilled from, or "
            "is to replace. Says on how many rows both choose the same label."
        ),
    ] = None,
    teacher_chat: Annotated[bool, typer.Option("--teacher-chat", help="Send that text as a user message.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    compare: Annotated[
        tuple[int, int] | None, typer.Option(help="Say whether the second of two versions in the store is better.")
    ] = None,
    soft_prompt: Annotated[
        Path | None, typer.Option(help="A PEFT directory to evaluate as TASK, instead of the inbox's.")
    ] = None,
    json_line: Annotated[
        bool, typer.Option("--json", help="Print the figures again, last, as a line of JSON.")
    ] = False,
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="Write README.md into the task's directory, and the figures into the metrics of its manifest.json: "
            "a server that watches it then publishes a new version, with the same answers.",
        ),
    ] = False,
) -> None:
    """Measure a task on a data file through the served path: every row is an ordinary request to the engine.

    Where there are labels: accuracy and macro-F1, by scoring the labels as `choices` does and by what is generated.
    Else: exact match, ROUGE-L, BLEU and perplexity. All with 95 % intervals, with the template and the generation
    defaults of TASK's manifest; decoding is greedy unless the manifest says otherwise. Without --card nothing is
    written: neither to the inbox nor to the store.
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
                "Versions are read from the store; --soft-prompt and --card are about a directory.",
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
