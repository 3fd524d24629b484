"""What `prelude train` can be told: each option's kind, help and place in --help. The command is in train.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.soft_prompts.manifest import SystemMessage
from server.train.config import LARGEST_BATCH, MOST_STEPS

LEARNING = "Learning"
START = "Initial values"
DISTILLING = "Distillation: learn from a long text instead of from targets"
ABOUT = "About the task"
REMOTE = "On a running server, beside its live traffic"

Task = Annotated[str, typer.Argument(help="Name of the task; the soft prompt is written to prompts/TASK.")]
Data = Annotated[
    list[Path],
    typer.Option(
        help='JSONL, each line {"input": "…", "target": "…"}. For a multitask soft prompt, repeat it for each task.'
    ),
]
Validation = Annotated[
    list[Path] | None,
    typer.Option(help="The same for held-out rows, which choose the best state. Default: a tenth of the rows."),
]
Method = Annotated[
    str,
    typer.Option(
        help="prompt_tuning; p_tuning; prefix_tuning, which has more parameters in a file 20 times as large; "
        "or multitask_prompt_tuning.",
        rich_help_panel=LEARNING,
    ),
]
NumVirtualTokens = Annotated[
    int, typer.Option(min=1, help="Number of learned vectors, usually 20 to 100.", rich_help_panel=LEARNING)
]
Steps = Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Optimiser steps.", rich_help_panel=LEARNING)]
BatchSize = Annotated[int, typer.Option(min=1, max=LARGEST_BATCH, help="Rows per step.", rich_help_panel=LEARNING)]
Lr = Annotated[
    str,
    typer.Option(help="Peak learning rate; auto tries a few for some steps each.", rich_help_panel=LEARNING),
]
Optimizer = Annotated[str, typer.Option(help="adamw or adafactor.", rich_help_panel=LEARNING)]
Evaluations = Annotated[
    int,
    typer.Option(min=1, help="Number of evaluations on the validation rows during training.", rich_help_panel=LEARNING),
]
Patience = Annotated[
    int | None,
    typer.Option(
        min=1, help="Stop after this many consecutive evaluations without improvement.", rich_help_panel=LEARNING
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0, help="Seed; with the same seed, the same machine trains the same soft prompt.", rich_help_panel=LEARNING
    ),
]
Init = Annotated[
    str,
    typer.Option(
        help="Initial values: labels, vocab (sampled), text, soft_prompt (another one), teacher (its own "
        "keys and values), or random. auto is teacher for prefix tuning with a teacher, otherwise "
        "labels if there are any, otherwise vocab.",
        rich_help_panel=START,
    ),
]
InitText = Annotated[str | None, typer.Option(help="The text for --init text.", rich_help_panel=START)]
InitFrom = Annotated[
    Path | None,
    typer.Option(
        help="A PEFT directory for --init soft_prompt; with --url a task of that server, or TASK@N.",
        rich_help_panel=START,
    ),
]
Teacher = Annotated[
    Path | None,
    typer.Option(
        help="File of a long text that contains {input} once: instructions, examples. The soft prompt learns "
        "to have the same effect; rows need no targets.",
        rich_help_panel=DISTILLING,
    ),
]
TeacherChat = Annotated[
    bool, typer.Option("--teacher-chat", help="Send the teacher's text as a user message.", rich_help_panel=DISTILLING)
]
Label = Annotated[
    list[str] | None,
    typer.Option(
        help="Repeat for each label: learn the teacher's probability of these labels instead of its answers.",
        rich_help_panel=DISTILLING,
    ),
]
InputTemplate = Annotated[
    str, typer.Option(help="The text that the model reads; {input} is the row's input.", rich_help_panel=ABOUT)
]
SystemMessages = Annotated[
    SystemMessage | None,
    typer.Option(
        help="How the task treats the system message of a chat; template needs {system} in --input-template. "
        "Default: ignore.",
        rich_help_panel=ABOUT,
    ),
]
Description = Annotated[
    str | None, typer.Option(help="One line about the task, shown by GET /prompts.", rich_help_panel=ABOUT)
]
Licence = Annotated[str | None, typer.Option(help="Licence of the data, kept in the manifest.", rich_help_panel=ABOUT)]
Out = Annotated[Path | None, typer.Option(help="Directory to write to instead of prompts/TASK.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over, even if the same run was interrupted before.")]
Url = Annotated[
    str | None,
    typer.Option(
        show_default=False,
        help="Address of a server that trains; PRELUDE_URL does not apply here. The result becomes a version "
        "of TASK there, and nothing is written here.",
        rich_help_panel=REMOTE,
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        envvar="PRELUDE_API_KEY",
        show_default=False,
        help="API key; the variable hides it from other users of this machine.",
        rich_help_panel=REMOTE,
    ),
]
Activate = Annotated[
    bool,
    typer.Option("--activate", help="Make the result live at once; otherwise it is staged.", rich_help_panel=REMOTE),
]
ActivateAtLeast = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Make the result live if it is right on at least this share of the validation rows.",
        rich_help_panel=REMOTE,
    ),
]
Detach = Annotated[
    bool,
    typer.Option(
        "--detach",
        help="Print the job's id and return; `prelude jobs follow` waits for the job.",
        rich_help_panel=REMOTE,
    ),
]
