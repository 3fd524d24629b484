"""Options of `prelude train`: each option's type, help and place in --help. The command is in train.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from server.soft_prompts.manifest import SystemMessage
from server.train.config import LARGEST_BATCH, MOST_STEPS

_learning = partial(typer.Option, rich_help_panel="Learning")
_start = partial(typer.Option, rich_help_panel="Initial values")
_distilling = partial(typer.Option, rich_help_panel="Distillation: learn from a long text instead of from targets")
_about = partial(typer.Option, rich_help_panel="About the task")
_remote = partial(typer.Option, rich_help_panel="On a running server, beside its live traffic")

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
    _learning(
        help="prompt_tuning; p_tuning; prefix_tuning, which has more parameters in a file 20 times as large; "
        "or multitask_prompt_tuning."
    ),
]
NumVirtualTokens = Annotated[int, _learning(min=1, help="Number of learned vectors, usually 20 to 100.")]
Steps = Annotated[int, _learning(min=1, max=MOST_STEPS, help="Optimiser steps.")]
BatchSize = Annotated[int, _learning(min=1, max=LARGEST_BATCH, help="Rows per step.")]
Lr = Annotated[str, _learning(help="Peak learning rate; auto tries a few for some steps each.")]
Optimizer = Annotated[str, _learning(help="adamw or adafactor.")]
Evaluations = Annotated[int, _learning(min=1, help="Number of evaluations on the validation rows during training.")]
Patience = Annotated[
    int | None, _learning(min=1, help="Stop after this many consecutive evaluations without improvement.")
]
Seed = Annotated[int, _learning(min=0, help="Seed; with the same seed, the same machine trains the same soft prompt.")]
Init = Annotated[
    str,
    _start(
        help="Initial values: labels, vocab (sampled), text, soft_prompt (another one), teacher (its own "
        "keys and values), or random. auto is teacher for prefix tuning with a teacher, otherwise "
        "labels if there are any, otherwise vocab."
    ),
]
InitText = Annotated[str | None, _start(help="The text for --init text.")]
InitFrom = Annotated[
    Path | None, _start(help="A PEFT directory for --init soft_prompt; with --url a task of that server, or TASK@N.")
]
Teacher = Annotated[
    Path | None,
    _distilling(
        help="File of a long text that contains {input} once: instructions, examples. The soft prompt learns "
        "to have the same effect; rows need no targets."
    ),
]
TeacherChat = Annotated[bool, _distilling("--teacher-chat", help="Send the teacher's text as a user message.")]
Label = Annotated[
    list[str] | None,
    _distilling(help="Repeat for each label: learn the teacher's probability of these labels instead of its answers."),
]
InputTemplate = Annotated[str, _about(help="The text that the model reads; {input} is the row's input.")]
SystemMessages = Annotated[
    SystemMessage | None,
    _about(
        help="How the task treats the system message of a chat; template needs {system} in --input-template. "
        "Default: ignore."
    ),
]
Description = Annotated[str | None, _about(help="One line about the task, shown by GET /prompts.")]
Licence = Annotated[str | None, _about(help="Licence of the data, kept in the manifest.")]
Out = Annotated[Path | None, typer.Option(help="Directory to write to instead of prompts/TASK.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over, even if the same run was interrupted before.")]
Url = Annotated[
    str | None,
    _remote(
        show_default=False,
        help="Address of a server that trains; PRELUDE_URL does not apply here. The result becomes a version "
        "of TASK there, and nothing is written here.",
    ),
]
Key = Annotated[
    str | None,
    _remote(
        envvar="PRELUDE_API_KEY",
        show_default=False,
        help="API key; the variable hides it from other users of this machine.",
    ),
]
Activate = Annotated[bool, _remote("--activate", help="Make the result live at once; otherwise it is staged.")]
ActivateAtLeast = Annotated[
    float | None,
    _remote(min=0, max=1, help="Make the result live if it is right on at least this share of the validation rows."),
]
Detach = Annotated[
    bool, _remote("--detach", help="Print the job's id and return; `prelude jobs follow` waits for the job.")
]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of `prelude train`, in the order of --help."""

    task: Task
    data: Data
    validation: Validation = None
    method: Method = "prompt_tuning"
    num_virtual_tokens: NumVirtualTokens = 20
    steps: Steps = 600
    batch_size: BatchSize = 16
    lr: Lr = "auto"
    optimizer: Optimizer = "adamw"
    evaluations: Evaluations = 10
    patience: Patience = None
    seed: Seed = 0
    init: Init = "auto"
    init_text: InitText = None
    init_from: InitFrom = None
    teacher: Teacher = None
    teacher_chat: TeacherChat = False
    label: Label = None
    input_template: InputTemplate = "{input}\\n"
    system_message: SystemMessages = None
    description: Description = None
    licence: Licence = None
    out: Out = None
    fresh: Fresh = False
    url: Url = None
    key: Key = None
    activate: Activate = False
    activate_at_least: ActivateAtLeast = None
    detach: Detach = False
