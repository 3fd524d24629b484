"""Resolves references to tasks and versions on the command line: `sms_spam`, `sms_spam@3`, or a directory."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from server.cli.errors import printable
from server.errors import ConfigurationError, InvalidTaskName
from server.soft_prompts.names import split_version

if TYPE_CHECKING:  # each command loads what it needs, so that --help is fast
    from server.cli.diff import ComparedSoftPrompt
    from server.client import PreludeClient, VersionList

_SHARE = re.compile(r"([1-9][0-9]{0,8})=([0-9]{1,3})")


def whole_task(reference: str) -> str:
    """The name of a task; raises InvalidTaskName if the reference contains a version."""
    task, number = split_version(reference)
    if number is not None:
        raise InvalidTaskName(f"{reference} is one version.", remedy=f"Name the task: {task}.")
    return task


def echo_live(listed: VersionList) -> None:
    """Print the live version, or the canary."""
    from server.cli.tables import live_sentence

    typer.echo(printable(live_sentence(listed)))


def only_live(listed: VersionList) -> int:
    """The number of the only live version; raises InvalidTaskName if there is none, or a canary."""
    from server.cli.tables import live_sentence

    live = listed.get("live")
    if live is None or len(listed.get("traffic", {})) > 1:
        raise InvalidTaskName(f"{live_sentence(listed)}.", remedy=f"Name one: {listed['task']}@N.")
    return live


def download(client: PreludeClient, task: str, number: int, directory: Path) -> None:
    """Download a version and unpack it into a directory."""
    from server.cli.files import unpack

    with tempfile.TemporaryDirectory(prefix="prelude-pull-") as folder:
        archive = Path(folder, "download.zip")
        client.download(task, number, archive)
        unpack(archive, directory)


def content_of(client: PreludeClient, side: str) -> ComparedSoftPrompt:
    """One side of a diff; a reference with a slash is a directory."""
    from server.cli.diff import read_content
    from server.cli.files import local_path

    if "/" in side or side in (".", ".."):
        return read_content(local_path(side), side)
    task, number = split_version(side)
    number = number or only_live(client.versions(task))
    with tempfile.TemporaryDirectory(prefix="prelude-diff-") as folder:
        download(client, task, number, Path(folder))
        return read_content(Path(folder), f"{task}@{number}")


def confirm_delete(listed: VersionList, reference: str, number: int | None, if_match: str | None) -> str | None:
    """Ask for confirmation; returns the ETag of the state that was confirmed. Raises an error without a terminal."""
    from server.cli.tables import live_sentence

    if not sys.stdin.isatty():
        raise ConfigurationError(f"{reference} is only deleted after a confirmation.", remedy="Confirm with --yes.")
    count = len(listed["versions"])
    what = reference if number is not None else f"{reference} with {count} version{'s' if count != 1 else ''}"
    typer.confirm(f"{live_sentence(listed)}. Delete {what} for good?", abort=True)
    return if_match or listed.get("etag")


def parse_weights(shares: list[str]) -> dict[int, int]:
    """Parse shares such as `3=90 4=10` into weights by version; raises ConfigurationError."""
    remedy = "Write each version once, 100 in all: 3=90 4=10."
    weights: dict[int, int] = {}
    for share in shares:
        match = _SHARE.fullmatch(share)
        if match is None or int(match[1]) in weights:
            raise ConfigurationError(f"{share[:80]!r} is not a share.", remedy=remedy)
        weights[int(match[1])] = int(match[2])
    if sum(weights.values()) != 100:
        raise ConfigurationError(f"The shares sum to {sum(weights.values())}.", remedy=remedy)
    return weights
