"""Options of `prelude prune`; the command is in prune.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """The options of `prelude prune`."""

    task: Annotated[
        str, typer.Argument(help="A task in the inbox, or TASK@2 for a version in the store; with --url, of a server.")
    ]
    data: Annotated[
        Path,
        typer.Option(
            help='Rows: JSONL, each line {"input": "…", "target": "…"}. One half chooses, the other half judges.'
        ),
    ]
    tolerance: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Largest loss that the 95 % interval may contain: a share of the rows for labels (0.02 is two "
            "points), nats per token for text.",
        ),
    ] = 0.02
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many rows from the beginning.")] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and print; publish nothing.")] = False
    url: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="Address of a server with the same model. The soft prompt is downloaded, measured here, and uploaded "
            "as a staged version. Without it, the version goes into the store, PRELUDE_STORE.",
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
