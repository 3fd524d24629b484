"""`prelude keys`: creates, lists and revokes API keys in the file that a server reads."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli.errors import errors_as_sentences, printable
from server.errors import ConfigurationError
from server.keys.file import add_key, read_keys, revoke_key
from server.keys.key import ApiKey, Scope
from server.settings import Settings

app = typer.Typer(
    help="Manage API keys, which decide who may use, publish and delete tasks. The file contains hashes, not keys. "
    "Start a server with it: prelude serve --api-keys-file keys.json. A running server rereads it within a second.",
    no_args_is_help=True,
)

FileOption = Annotated[
    Path | None, typer.Option("--file", help="The keys file. Default: PRELUDE_API_KEYS_FILE.", show_default=False)
]


@app.command()
def create(
    name: Annotated[str, typer.Option(help="The user or program of the key: ci, ada's laptop.")],
    scope: Annotated[
        list[Scope],
        typer.Option(
            help="What it may do; repeatable. generate: answers. publish: upload, activate, roll back, share traffic, "
            "download, delete, train, evaluate. metrics: read /metrics. admin: everything."
        ),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Limit the key to tasks of this name; repeatable; * matches anything: 'team-a-*'.", show_default=False
        ),
    ] = None,
    file: FileOption = None,
) -> None:
    """Create a key and print it once; the file keeps only a hash.

    Standard output is the key alone, so that you can redirect it to a file:

    prelude keys create --file keys.json --name ci --scope publish --tasks 'team-a-*' > ci.key
    """
    with errors_as_sentences():
        path = _file(file)
        key, text = add_key(path, name, scope, tasks)
        typer.echo(text)
        typer.echo(printable(f"{path}: key {key.id} ({key.name}): {_what(key)}."), err=True)
        typer.echo("It is shown only now. Requests carry it as: Authorization: Bearer KEY", err=True)


@app.command(name="list")
def list_keys(file: FileOption = None) -> None:
    """List the keys of a file: id, name, scopes, tasks, and when each was created."""
    with errors_as_sentences():
        from server.cli.tables import console, print_keys

        path = _file(file)
        keys = read_keys(path)
        if keys:
            print_keys(keys, console())
        else:
            typer.echo(f"{path} holds no key.", err=True)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id from `prelude keys list`.")],
    file: FileOption = None,
) -> None:
    """Remove a key from the file; running servers refuse it within a second."""
    with errors_as_sentences():
        path = _file(file)
        key = revoke_key(path, key_id)
        typer.echo(printable(f"{path}: key {key.id} ({key.name}) is revoked."), err=True)


def _file(given: Path | None) -> Path:
    path = Settings.load(api_keys_file=given).api_keys_file
    if path is None:
        raise ConfigurationError(
            "No keys file is named.", remedy="Give --file keys.json, or set PRELUDE_API_KEYS_FILE."
        )
    return path


def _what(key: ApiKey) -> str:
    limit = f" for {', '.join(key.tasks)}" if key.tasks else ""
    return f"{', '.join(key.scopes)}{limit}"
