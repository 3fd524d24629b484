"""The command line: each command builds its settings, calls the part that does the work, and prints the result.

Modules that load torch are imported only by commands that need them, so that --help is fast.
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
from server.cli.inspection import inspect
from server.cli.logs import configure_logging
from server.cli.options import with_settings_options
from server.cli.prune import prune
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
        # A character that the terminal lacks becomes "?" instead of an exception.
        sys.stdout.reconfigure(errors="replace")


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
    """Context manager: import without garbage collection, and permanently exempt the imported objects from it.

    Otherwise collections would repeatedly scan half a million objects, which takes a fifth of the start's time.
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
app.command()(inspect)
app.command()(prune)
app.add_typer(prompts.app, name="prompts")
app.add_typer(jobs.app, name="jobs")
app.add_typer(keys.app, name="keys")
