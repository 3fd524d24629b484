"""`prelude prompts`: the soft prompts of a running server, from the shell."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli.errors import printable
from server.cli.references import confirm_delete, content_of, download, echo_live, only_live, parse_weights, whole_task
from server.cli.remote import DEFAULT_URL, JsonOption, KeyOption, UrlOption, connected, examples, upload_bar
from server.errors import InvalidTaskName
from server.soft_prompts.names import split_version

app = typer.Typer(
    name="prompts",
    no_args_is_help=True,
    help="List, publish and change the soft prompts of a running server.\n\n"
    "Changes take effect on the next request; requests in flight finish on the version that they started with. "
    "The server is the one at --url or PRELUDE_URL, and a key goes into PRELUDE_API_KEY.",
    epilog="Exit status: 0 done, 2 refused (the reason and what to do about it are on stderr).",
)

IfMatchOption = Annotated[
    str | None,
    typer.Option(
        "--if-match",
        metavar="STATE",
        help="Refuse unless the task is in this state, as `list TASK` shows it; * accepts any.",
    ),
]
TaskArgument = Annotated[str, typer.Argument(metavar="TASK", help="Name of a task.")]
ReferenceArgument = Annotated[str, typer.Argument(metavar="TASK@N", help="A version of a task, such as sms_spam@3.")]


@app.command(
    name="list",
    epilog=examples(
        "prelude prompts list", "prelude prompts list sms_spam", "prelude prompts list --json | jq -r '.prompts[].task'"
    ),
)
def list_prompts(
    task: Annotated[str | None, typer.Argument(metavar="TASK", help="List the versions of this task.")] = None,
    as_json: JsonOption = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """List all tasks, or the versions of one."""
    if task is not None:
        _print_versions(task, as_json, url, key)
        return
    with connected(url, key) as client:
        from server.cli.tables import console, print_json, print_tasks

        entries = list(client.prompts())
        if as_json:
            print_json({"prompts": entries})
        else:
            print_tasks(entries, console())


@app.command(
    epilog=examples("prelude prompts versions sms_spam", "prelude prompts versions sms_spam --json | jq .live")
)
def versions(
    task: TaskArgument, as_json: JsonOption = False, url: UrlOption = DEFAULT_URL, key: KeyOption = None
) -> None:
    """List the versions of a task, newest first; the same as `list TASK`."""
    _print_versions(task, as_json, url, key)


@app.command(
    epilog=examples(
        "prelude prompts push prompts/my_task",
        "prelude prompts push ./checkpoint --task my_task --no-activate",
        "prelude prompts push org/my-soft-prompt@main --task my_task --dry-run",
    )
)
def push(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A PEFT directory, a .zip of one, or org/name@revision on the hub.")
    ],
    task: Annotated[str | None, typer.Option(help="Name to publish under. Default: the name of SOURCE.")] = None,
    no_activate: Annotated[
        bool, typer.Option("--no-activate", help="Stage it: only requests for TASK@N reach it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Let the server validate it without a change.")] = False,
    if_match: IfMatchOption = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """Publish a soft prompt as a new version of a task.

    SOURCE is a directory as save_pretrained or `prelude train` writes it, otherwise a repository on the hub.
    Its manifest.json sets input_template, system_message (ignore, refuse, template) and generation defaults.
    """
    with connected(url, key) as client:
        from server.cli.files import find_upload

        upload = find_upload(source)
        name = upload.task(task)
        with upload_bar(name, upload.num_bytes) as on_sent:
            pushed = client.publish(
                name, upload.files, activate=not no_activate, dry_run=dry_run, expect=if_match, on_sent=on_sent
            )
        for made in pushed["tasks"]:
            reference = printable(f"{made['task']}@{made['version']}")
            if dry_run:
                typer.echo(f"{reference}: the server would take it; nothing has changed")
            elif not pushed["created"]:
                typer.echo(f"{reference}: holds this already; nothing has changed")
            elif pushed["live"]:
                typer.echo(f"{reference}: published")
            else:
                typer.echo(f"{reference}: published, not live; `prelude prompts activate {reference}` makes it live")
        for note in [*pushed.get("warnings", ()), *(f"{name} is not used." for name in pushed.get("ignored", ()))]:
            typer.echo(printable(note), err=True)
        if not dry_run:
            for made in pushed["tasks"]:
                echo_live(client.versions(made["task"]))


@app.command(epilog=examples("prelude prompts pull sms_spam", "prelude prompts pull sms_spam@2 --out second"))
def pull(
    reference: Annotated[str, typer.Argument(metavar="TASK[@N]", help="A task's live version, or version N.")],
    out: Annotated[Path | None, typer.Option(help="Directory to write. Default: ./TASK.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a soft prompt in that directory.")] = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """Download a version as a PEFT directory.

    PeftModel.from_pretrained loads it, and `prelude prompts push` takes it back.
    """
    with connected(url, key) as client:
        from server.cli.files import check_target, new_directory

        task, number = split_version(reference)
        directory = out or Path(task)
        check_target(directory, force=force)
        number = number or only_live(client.versions(task))
        with new_directory(directory) as filled:
            download(client, task, number, filled)
        typer.echo(f"{directory}: {task}@{number}")


@app.command(
    epilog=examples("prelude prompts activate sms_spam@3", "prelude prompts activate sms_spam 3 --if-match 42")
)
def activate(
    reference: ReferenceArgument,
    number: Annotated[int | None, typer.Argument(metavar="N", min=1, help="The version, if not in TASK@N.")] = None,
    if_match: IfMatchOption = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """Make a version the only live one of its task."""
    with connected(url, key) as client:
        task, named = split_version(reference)
        if (named is None) == (number is None):
            raise InvalidTaskName("Which version?", remedy=f"Name one: {task}@3.")
        echo_live(client.activate(task, named or number or 0, expect=if_match))


@app.command(epilog=examples("prelude prompts rollback sms_spam"))
def rollback(
    task: TaskArgument, if_match: IfMatchOption = None, url: UrlOption = DEFAULT_URL, key: KeyOption = None
) -> None:
    """Restore what was live before; two in a row go back two steps."""
    with connected(url, key) as client:
        echo_live(client.roll_back(whole_task(task), expect=if_match))


@app.command(epilog=examples("prelude prompts traffic sms_spam 3=90 4=10"))
def traffic(
    task: TaskArgument,
    weights: Annotated[list[str], typer.Argument(metavar="N=PERCENT", help="Shares that sum to 100.")],
    if_match: IfMatchOption = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """Divide a task's requests among several versions: a canary. `activate` ends it."""
    with connected(url, key) as client:
        echo_live(client.set_traffic(whole_task(task), parse_weights(weights), expect=if_match))


@app.command(epilog=examples("prelude prompts delete sms_spam@2", "prelude prompts delete sms_spam --yes"))
def delete(
    reference: Annotated[str, typer.Argument(metavar="TASK[@N]", help="A task with all its versions, or version N.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    if_match: IfMatchOption = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """Delete a task with all its versions, or one version that is not live. This cannot be undone."""
    with connected(url, key) as client:
        task, number = split_version(reference)
        if not yes:
            if_match = confirm_delete(client.versions(task), reference, number, if_match)
        if number is None:
            client.delete(task, expect=if_match)
            typer.echo(f"{task}: deleted; nothing answers for it any more")
        else:
            client.delete_version(task, number, expect=if_match)
            typer.echo(f"{reference}: deleted")
            echo_live(client.versions(task))


@app.command(
    epilog=examples("prelude prompts diff sms_spam@2 sms_spam@3", "prelude prompts diff sms_spam ./checkpoint")
)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="TASK for its live version, TASK@N, or a directory: ./DIR.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same for the other side.")],
    as_json: JsonOption = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """Show the differences between two soft prompts: manifest, config, and numbers, by virtual token.

    The name and the time of a publish do not count.

    Write a directory with a slash, to distinguish it from a task.

    Exit status, as for diff: 0 if they are identical, 1 if they differ, 2 if they cannot be compared.
    """
    with connected(url, key) as client:
        from server.cli.diff import compare
        from server.cli.tables import console, print_comparison, print_json

        comparison = compare(content_of(client, a), content_of(client, b))
        if as_json:
            print_json(comparison.as_dict())
        else:
            print_comparison(comparison, console())
    if not comparison.identical:
        raise typer.Exit(1)


def _print_versions(task: str, as_json: bool, url: str, key: str | None) -> None:
    with connected(url, key) as client:
        from server.cli.tables import console, print_json, print_versions

        listed = client.versions(whole_task(task))
        if as_json:
            print_json(listed)
        else:
            print_versions(listed, console())
