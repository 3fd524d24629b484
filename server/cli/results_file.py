"""Results of a command as a JSON file.

The path is checked before the work, so that nothing that took minutes is lost to a typing error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.console import Console

STDOUT = Path("-")
"""The results go to standard output, and the tables to standard error."""


def check_results_file(path: Path | None, option: str = "--json") -> None:
    """Refuse (ConfigurationError) a file that cannot be written; its folder is created."""
    if path is None or path == STDOUT:
        return
    if path.is_dir():
        raise ConfigurationError(
            f"{path} is a directory, and {option} names a file.", remedy=f"Write {option} {path / 'results.json'}."
        )
    check_results_folder(path.parent, option)
    if path.exists() and not os.access(path, os.W_OK):
        raise not_written(path, option, PermissionError("permission denied"))


def check_results_folder(path: Path | None, option: str = "--svg") -> None:
    """Create a folder; raises ConfigurationError if it cannot be created, or nothing can be written to it."""
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise not_written(path, option, exc) from exc
    if not os.access(path, os.W_OK | os.X_OK):
        raise not_written(path, option, PermissionError("permission denied"))


def write_results(path: Path | None, document: Any, option: str = "--json") -> None:
    """Write a document, replacing the file; raises ConfigurationError if it cannot be written."""
    if path is None:
        return
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise not_written(path, option, exc) from exc


def console_beside(path: Path | None) -> Console:
    """The console for tables: stderr if stdout carries the document."""
    from server.cli.tables import console

    return console(sys.stderr if path == STDOUT else sys.stdout)


def not_written(path: Path, option: str, exc: OSError) -> ConfigurationError:
    """The error for a file or folder that cannot be written."""
    return ConfigurationError(
        f"{path} cannot be written: {exc.strerror or exc}.", remedy=f"Name another path with {option}."
    )
