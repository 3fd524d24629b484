"""`prelude jobs`: the training jobs of a running server, from the shell. `prelude train --url` queues one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.errors import printable
from server.cli.remote import DEFAULT_URL, JsonOption, KeyOption, UrlOption, connected, examples, upload_bar
from server.errors import PreludeError, UnknownJob

if TYPE_CHECKING:  # each command loads what it needs, so that --help is fast
    from server.client import Job, PreludeClient

LOOK_SECONDS = 1.0
AWAY_SECONDS = 120.0
"""How long to wait for a server that does not answer, for example because it restarts; it then resumes its jobs."""
ENDED = {"succeeded": "has succeeded", "failed": "has failed", "cancelled": "was cancelled"}
OVER = tuple(ENDED)

app = typer.Typer(
    name="jobs",
    no_args_is_help=True,
    help="Follow, cancel and delete the training jobs of a running server; `prelude train --url` queues one.\n\n"
    "The server is the one at --url or PRELUDE_URL, and a key with the scope publish goes into PRELUDE_API_KEY.",
    epilog="Exit status: 0 done, 2 refused, or the job failed (the reason and what to do about it are on stderr).",
)

JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="Id of a job; or the name of a task, for its newest job.")
]


@app.command(name="list", epilog=examples("prelude jobs list", "prelude jobs list --json | jq -r '.jobs[].id'"))
def list_jobs(as_json: JsonOption = False, url: UrlOption = DEFAULT_URL, key: KeyOption = None) -> None:
    """List all jobs, newest first."""
    with connected(url, key) as client:
        from server.cli.tables import console, print_jobs, print_json

        jobs = client.jobs()
        if as_json:
            print_json({"jobs": jobs})
        else:
            print_jobs(jobs, console())


@app.command(epilog=examples("prelude jobs follow my_task", "prelude jobs follow 20261127t093005123-0a1b2c3d4e5f"))
def follow(job: JobArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = None) -> None:
    """Show a job's progress until it ends, then its result."""
    with connected(url, key) as client:
        follow_to_its_end(client, find_job(client, job))


@app.command(epilog=examples("prelude jobs cancel my_task"))
def cancel(job: JobArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = None) -> None:
    """Cancel a job; nothing is published."""
    with connected(url, key) as client:
        from server.cli.bars import standing

        found = find_job(client, job, runs=True)
        if found["state"] in OVER:
            raise PreludeError(
                f"{found['id']} is over already: it {ENDED[found['state']]}.", remedy="`prelude jobs list` shows all."
            )
        ended = client.cancel_job(found["id"])
        typer.echo(printable(f"{ended['id']} ({ended['task']}): {standing(ended)}"))


@app.command(epilog=examples("prelude jobs log my_task"))
def log(job: JobArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = None) -> None:
    """Print the end of the output of a job's process."""
    with connected(url, key) as client:
        for line in client.job_log(find_job(client, job)["id"]).splitlines():
            typer.echo(printable(line))


@app.command(epilog=examples("prelude jobs delete my_task"))
def delete(job: JobArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = None) -> None:
    """Delete a job that has ended, with its record; its published version stays."""
    with connected(url, key) as client:
        found = find_job(client, job)
        client.delete_job(found["id"])
        typer.echo(printable(f"{found['id']} ({found['task']}): forgotten"))


def send(
    spec: Mapping[str, Any], data: Path, validation: Path | None, url: str, key: str | None, *, detach: bool
) -> None:
    """Queue a job on a server, and follow it."""
    with connected(url, key) as client:
        size = sum(path.stat().st_size for path in (data, validation) if path is not None)
        with upload_bar(data.name, size) as on_sent:
            job = client.train(spec, data, validation, on_sent=on_sent)
        if detach:
            typer.echo(job["id"])
        else:
            typer.echo(f"job {job['id']}", err=True)
            follow_to_its_end(client, job)


def find_job(client: PreludeClient, named: str, *, runs: bool = False) -> Job:
    """The job with this id, or the newest job of this task; with `runs`, running jobs take precedence."""
    found = [job for job in client.jobs() if named in (job["id"], job["task"])]
    if runs:
        found.sort(key=lambda job: ("running", "queued", *OVER).index(job["state"]))
    if found:
        return found[0]
    raise UnknownJob(f"There is no training job {named[:80]!r}, and none of a task of that name.")


def follow_to_its_end(client: PreludeClient, job: Job) -> None:
    """Show a job's progress until it has ended, then its result; raises PreludeError if it did not succeed."""
    from server.cli.bars import JobBar

    try:
        with JobBar(job) as bar:
            bar.show(job)
            while job["state"] not in OVER:
                time.sleep(LOOK_SECONDS)
                job = look(client, job, bar.write)
                bar.show(job)
    except KeyboardInterrupt:
        named = f"{job['id']} --url {client.url}"
        typer.echo(f"The job continues. To follow it again: prelude jobs follow {named}", err=True)
        typer.echo(f"To end it: prelude jobs cancel {named}", err=True)
        raise
    print_end(job, client.url)


def look(client: PreludeClient, job: Job, write: Callable[[str], None]) -> Job:
    """The current state of a job; waits up to AWAY_SECONDS for a server that does not answer."""
    end = time.monotonic() + AWAY_SECONDS
    is_reported = False
    while True:
        try:
            return client.job(job["id"])
        except PreludeError as exc:
            if exc.status != HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > end:
                raise
            if not is_reported:
                write(f"{printable(exc.message)} Trying again; the job is kept.")
                is_reported = True
        time.sleep(LOOK_SECONDS)


def print_end(job: Job, url: str) -> None:
    """Print the result of a job; raises PreludeError if it failed or was cancelled."""
    from server.cli.bars import in_words

    if job["state"] != "succeeded":
        failure = job.get("error")
        if failure is None:
            raise PreludeError("The job was cancelled.", remedy="Send it again to restart it.")
        raise PreludeError(failure["error"], remedy=failure["remedy"])
    name, metrics = f"{job['task']}@{job.get('version')}", job.get("metrics", {})
    score = in_words(metrics.get("validation_exact_match"), metrics.get("validation_loss"))
    typer.echo(printable(f"{name}: {score}; {'live' if job['live'] else staged(job, name, url)}"))


def staged(job: Job, name: str, url: str) -> str:
    """The reason why a version is not live, and the command that activates it."""
    bound = job["spec"].get("activate")
    missed = " because it did not keep to its bound" if isinstance(bound, dict) else ""
    return f"staged{missed}; to make it live: prelude prompts activate {name} --url {url}"
