"""Options of `prelude eval`: each option's type, help and place in --help. The command is in evaluate.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The options of `prelude eval`."""

    task: Annotated[
        str, typer.Argument(help="Name of a task in the inbox, PRELUDE_PROMPTS_DIR; TASK@2 is a version in the store.")
    ]
    data: Annotated[Path, typer.Option(help='JSONL, each line {"input": "…", "target": "…"}.')]
    references: Annotated[
        Path | None,
        typer.Option(
            help='Several right answers for each row: JSONL, each line {"references": ["…", …]}. Default: '
            "X.references.jsonl beside X.jsonl, if it exists."
        ),
    ] = None
    baselines: Annotated[
        str,
        typer.Option(
            help="Baselines for the same rows, separated by commas: zero-shot (the frozen model in the task's "
            "template), instruction (in a chat), 4-shot (or another number: instruction and examples), @2 "
            "(a version in the store)."
        ),
    ] = ""
    instruction: Annotated[
        str | None,
        typer.Option(help="The instruction of the baselines. Default: `instruction` of meta.json beside the data."),
    ] = None
    shots_data: Annotated[
        Path | None, typer.Option(help="File of the examples. Default: train.jsonl beside the data.")
    ] = None
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="File of a text that contains {input} once: the teacher of the soft prompt, or a text that it "
            "shall replace. The report says on how many rows both choose the same label."
        ),
    ] = None
    teacher_chat: Annotated[bool, typer.Option("--teacher-chat", help="Send the teacher's text as a user message.")] = (
        False
    )
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate only this many rows from the beginning.")] = None
    compare: Annotated[
        tuple[int, int] | None, typer.Option(help="Compare two versions in the store: is the second better?")
    ] = None
    soft_prompt: Annotated[
        Path | None, typer.Option(help="A PEFT directory to evaluate as TASK, instead of the inbox's.")
    ] = None
    json_line: Annotated[bool, typer.Option("--json", help="Print the report as a last line of JSON too.")] = False
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="Write README.md into the task's directory, and the figures into the metrics of its "
            "manifest.json. A server that watches the directory then publishes a new version, with the same "
            "answers.",
        ),
    ] = False
