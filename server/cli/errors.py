"""How a command shows an error: a sentence and its remedy, never a traceback.

Messages quote servers and files, which must not be able to steer the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from server.errors import PreludeError


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Print what went wrong and what to do about it, instead of a traceback; exit with 2."""
    try:
        yield
    except PreludeError as exc:
        typer.secho(f"error: {printable(exc.message)}", fg="red", err=True)
        typer.echo(f"       {printable(exc.remedy)}", err=True)
        raise typer.Exit(2) from exc


def printable(text: str) -> str:
    """Text that means nothing but itself: no escape sequences, no line of its own."""
    return "".join(character if character.isprintable() else " " for character in text)
