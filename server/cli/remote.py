"""Shared parts of commands for a running server: address and key, error messages, uploads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.errors import errors_as_sentences
from server.errors import (
    JobRuns,
    NothingToRollBackTo,
    PreconditionFailed,
    PreludeError,
    Unauthorized,
    UnknownJob,
    UnknownTask,
)
from server.settings import check_variables

if TYPE_CHECKING:  # each command loads what it needs, so that --help is fast
    from server.client import OnSent, PreludeClient

DEFAULT_URL = "http://127.0.0.1:8000"
BIG_BYTES = 2**22
"""Uploads of this size or more get a progress bar."""

REMEDIES: dict[type[PreludeError], str] = {
    UnknownTask: "`prelude prompts list` lists the tasks, `prelude prompts list TASK` its versions.",
    Unauthorized: "Give a key of this server in PRELUDE_API_KEY or with --key.",
    NothingToRollBackTo: "`prelude prompts list TASK` lists the versions; activate the one that you want.",
    JobRuns: "Cancel it first: `prelude jobs cancel`.",
    UnknownJob: "`prelude jobs list` lists the training jobs.",
    PreconditionFailed: "Look at it again with `prelude prompts list TASK`, decide again, and give its new state.",
}
"""Remedies for the command line, where the server's own remedies describe requests."""

UrlOption = Annotated[str, typer.Option("--url", envvar="PRELUDE_URL", help="Address of the server.")]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key", envvar="PRELUDE_API_KEY", show_default=False, help="API key; the variable hides it from other users."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def examples(*commands: str) -> str:
    """The examples at the end of a command's help, one paragraph each."""
    return "\n\n".join(["Examples:", *commands])


@contextmanager
def connected(url: str, key: str | None) -> Iterator[PreludeClient]:
    """Context manager: a client of the server, whose errors get remedies for the command line."""
    from server.client import PreludeClient

    with errors_as_sentences():
        check_variables()  # with a misspelt PRELUDE_URL, the command would use the wrong server
        try:
            with PreludeClient(url, key) as client:
                yield client
        except PreludeError as exc:
            if exc.remedy == exc.default_remedy:
                exc.remedy = REMEDIES.get(type(exc), exc.remedy)
            raise


@contextmanager
def upload_bar(name: str, num_bytes: int) -> Iterator[OnSent | None]:
    """Context manager: a progress bar for a large upload on a terminal."""
    if num_bytes < BIG_BYTES or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=num_bytes, desc=name, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True) as bar:

        def show(sent: int) -> None:
            bar.update(sent)

        yield show
