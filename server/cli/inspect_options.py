"""Options of `prelude inspect`; the command is in inspection.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """The options of `prelude inspect`."""

    tasks: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK…", help="A task in the inbox, TASK@2 for a version in the store, or a PEFT directory."
        ),
    ]
    compare: Annotated[bool, typer.Option("--compare", help="Compare several tasks, by change and by function.")] = (
        False
    )
    data: Annotated[
        Path | None,
        typer.Option(help='Rows for experiments: JSONL, each line {"input": "…", "target": "…"}. They take minutes.'),
    ] = None
    measures: Annotated[
        str | None,
        typer.Option(
            show_default="both",
            help="Experiments to run with --data: sufficiency (what keeps the effect), necessity (which virtual tokens "
            "are needed), or both, separated by a comma.",
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(min=1, show_default="200", help="With --data: use at most this many rows, from the beginning."),
    ] = None
    top: Annotated[int, typer.Option(min=1, max=20, help="Number of neighbours, and of tokens of the lens.")] = 5
    url: Annotated[
        str | None,
        typer.Option(
            help="A server to ask. With --data or --compare, soft prompts are downloaded and interpreted here, with "
            "the same model."
        ),
    ] = None
    key: Annotated[
        str | None, typer.Option("--key", envvar="PRELUDE_API_KEY", show_default=False, help="API key, with --url.")
    ] = None
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write the results to this file as JSON, replacing it. With -, JSON goes to standard output."
        ),
    ] = None
    svg: Annotated[Path | None, typer.Option(help="Write pictures to this folder as SVG; it is created.")] = None
