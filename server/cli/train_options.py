"""Options of `prelude train`: each option's type, help and place in --help. The command is in train.py."""

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


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of `prelude train`, in the order of --help."""

    task: Annotated[str, typer.Argument(help="Name of the task; the soft prompt is written to prompts/TASK.")]
    data: Annotated[
        list[Path],
        typer.Option(
            help='JSONL, each line {"input": "…", "target": "…"}. For a multitask soft prompt, repeat it for each task.'
        ),
    ]
    validation: Annotated[
        list[Path] | None,
        typer.Option(help="The same for held-out rows, which choose the best state. Default: a tenth of the rows."),
    ] = None
    method: Annotated[
        str,
        _learning(
            help="prompt_tuning; p_tuning; prefix_tuning, which has more parameters in a file 20 times as large; "
            "or multitask_prompt_tuning."
        ),
    ] = "prompt_tuning"
    num_virtual_tokens: Annotated[int, _learning(min=1, help="Number of learned vectors, usually 20 to 100.")] = 20
    steps: Annotated[int, _learning(min=1, max=MOST_STEPS, help="Optimiser steps.")] = 600
    batch_size: Annotated[int, _learning(min=1, max=LARGEST_BATCH, help="Rows per step.")] = 16
    lr: Annotated[str, _learning(help="Peak learning rate; auto tries a few for some steps each.")] = "auto"
    optimizer: Annotated[str, _learning(help="adamw or adafactor.")] = "adamw"
    evaluations: Annotated[
        int, _learning(min=1, help="Number of evaluations on the validation rows during training.")
    ] = 10
    patience: Annotated[
        int | None, _learning(min=1, help="Stop after this many consecutive evaluations without improvement.")
    ] = None
    seed: Annotated[
        int, _learning(min=0, help="Seed; with the same seed, the same machine trains the same soft prompt.")
    ] = 0
    init: Annotated[
        str,
        _start(
            help="Initial values: labels, vocab (sampled), text, soft_prompt (another one), nearest-task (the "
            "published one that is nearest by function), teacher (its own keys and values), or random. auto is teacher "
            "for prefix tuning with a teacher, otherwise labels if there are any, otherwise vocab."
        ),
    ] = "auto"
    init_text: Annotated[str | None, _start(help="The text for --init text.")] = None
    init_from: Annotated[
        Path | None,
        _start(help="A PEFT directory for --init soft_prompt; with --url a task of that server, or TASK@N."),
    ] = None
    teacher: Annotated[
        Path | None,
        _distilling(
            help="File of a long text that contains {input} once: instructions, examples. The soft prompt learns "
            "to have the same effect; rows need no targets."
        ),
    ] = None
    teacher_chat: Annotated[bool, _distilling("--teacher-chat", help="Send the teacher's text as a user message.")] = (
        False
    )
    label: Annotated[
        list[str] | None,
        _distilling(
            help="Repeat for each label: learn the teacher's probability of these labels instead of its answers."
        ),
    ] = None
    input_template: Annotated[str, _about(help="The text that the model reads; {input} is the row's input.")] = (
        "{input}\\n"
    )
    system_message: Annotated[
        SystemMessage | None,
        _about(
            help="How the task treats the system message of a chat; template needs {system} in --input-template. "
            "Default: ignore."
        ),
    ] = None
    description: Annotated[str | None, _about(help="One line about the task, shown by GET /prompts.")] = None
    licence: Annotated[str | None, _about(help="Licence of the data, kept in the manifest.")] = None
    out: Annotated[Path | None, typer.Option(help="Directory to write to instead of prompts/TASK.")] = None
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, even if the same run was interrupted before.")] = (
        False
    )
    url: Annotated[
        str | None,
        _remote(
            show_default=False,
            help="Address of a server that trains; PRELUDE_URL does not apply here. The result becomes a version "
            "of TASK there, and nothing is written here.",
        ),
    ] = None
    key: Annotated[
        str | None,
        _remote(
            envvar="PRELUDE_API_KEY",
            show_default=False,
            help="API key; the variable hides it from other users of this machine.",
        ),
    ] = None
    activate: Annotated[bool, _remote("--activate", help="Make the result live at once; otherwise it is staged.")] = (
        False
    )
    activate_at_least: Annotated[
        float | None,
        _remote(
            min=0, max=1, help="Make the result live if it is right on at least this share of the validation rows."
        ),
    ] = None
    detach: Annotated[
        bool, _remote("--detach", help="Print the job's id and return; `prelude jobs follow` waits for the job.")
    ] = False
