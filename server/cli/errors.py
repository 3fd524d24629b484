"""Shows a command's errors as a sentence and a remedy, without a traceback.

Messages quote servers and files, which must not be able to control the terminal.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from server.errors import PreludeError


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Context manager: print an error and its remedy instead of a traceback, and exit with 2."""
    try:
        yield
    except PreludeError as exc:
        typer.secho(f"error: {printable(exc.message)}", fg="red", err=True)
        typer.echo(f"       {printable(exc.remedy)}", err=True)
        raise typer.Exit(2) from exc


def printable(text: str) -> str:
    """Text without escape sequences, line ends and other control characters."""
    return "".join(character if character.isprintable() else " " for character in text)
