"""The command line: every command builds its settings, calls the part that does the work, and prints.

What loads torch is imported by the commands that need it, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import gc
import io
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from server import __version__
from server.cli import jobs, keys, prompts
from server.cli.errors import errors_as_sentences
from server.cli.evaluate import evaluate
from server.cli.logs import configure_logging
from server.cli.options import with_settings_options
from server.cli.train import train
from server.openmp import bound_primitives, expand_segments, share_cores
from server.settings import Settings

app = typer.Typer(
    name="prelude",
    help="Serve any number of tasks from one frozen LLM: each task is a soft prompt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prelude {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version, then exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Serve any number of tasks from one frozen LLM: each task is a soft prompt."""
    share_cores()
    bound_primitives()
    expand_segments()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no such character gets "?", not a traceback


def serve(**options: Any) -> None:
    """Serve the frozen model and every soft prompt of the inbox over HTTP."""
    with errors_as_sentences():
        settings = Settings.load(**options)
        configure_logging(settings.log_level, settings.log_format)
        with imports_kept():
            from server.serve import serve as run

        run(settings)


@contextlib.contextmanager
def imports_kept() -> Iterator[None]:
    """Import without garbage collection, and exempt what was imported from it for good.

    Modules stay until the end. Without this, collections look through half a million of their objects again and again:
    a fifth of the time of a start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


app.command()(with_settings_options(serve))
app.command()(train)
app.command(name="eval")(evaluate)
app.add_typer(prompts.app, name="prompts")
app.add_typer(jobs.app, name="jobs")
app.add_typer(keys.app, name="keys")
