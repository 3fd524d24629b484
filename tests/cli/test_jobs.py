"""Training on a running server from the shell: real jobs of a real server, and servers that behave oddly."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from server.cli import app, jobs
from server.client import Job, PreludeClient, ServerUnreachable
from server.errors import PreludeError, UnknownJob
from server.jobs.folder import JobFolder
from server.jobs.launcher import Child
from server.jobs.progress_log import Recorder
from server.settings import Settings
from tests.api.live import LiveServer, be_process, live_server
from tests.jobs.support import LEARNS, SLOW, save_tiny_model
from tests.processes import fork
from tests.strangers import answering, reply
from tests.train.rows import MOODS, write_rows

JOB: dict[str, Any] = {
    "id": "20261127t093005123-0a1b2c3d4e5f",
    "task": "mood",
    "state": "running",
    "created_at": "2026-11-27T09:30:05.123+00:00",
    "cancelling": False,
    "step": 3,
    "steps": 10,
    "live": False,
    "spec": {"task": "mood"},
}
FAILED = JOB | {"state": "failed", "error": {"error": "It\x1b[2J broke.", "code": "x", "remedy": "Mend it."}}


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file is there, jobs wait in the middle of their training."""
    return tmp_path_factory.mktemp("gate") / "closed"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, gate: Path) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("server")

    def start(job: JobFolder, settings: Settings) -> Child:
        return fork(train_up_to, (gate, job, settings), job.log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRELUDE_MODEL", str(save_tiny_model(folder / "tiny")))
        with live_server(folder, max_model_len=128, dtype="float32", start=start) as live:
            yield live


def train_up_to(gate: Path, job: JobFolder, settings: Settings) -> None:
    """Be a job's process, which waits after its tenth step for a gate to open."""
    record = Recorder.step

    def record_and_wait(self: Recorder, step: int, *what: Any) -> None:
        record(self, step, *what)
        while step == 10 and gate.exists():
            time.sleep(0.01)

    Recorder.step = record_and_wait  # type: ignore[assignment, method-assign]
    be_process(job, settings)


@pytest.fixture(autouse=True)
def workplace(workplace: Path) -> Path:
    """A directory with data files to stand in."""
    write_rows(workplace / "train.jsonl", MOODS * 5)
    write_rows(workplace / "held.jsonl", MOODS)
    return workplace


def prelude(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def train(task: str, config: dict[str, Any], *arguments: str) -> Result:
    names = {"learning_rate": "lr"}
    options = [text for name, value in config.items() for text in (f"--{names.get(name, name)}", str(value))]
    options = [text.replace("_", "-") for text in options]
    return prelude("train", task, "--data", "train.jsonl", "--validation", "held.jsonl", *options, *arguments)


def refused(result: Result) -> tuple[str, str]:
    """The error of a command that refuses, and what to do about it."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    error, remedy = [line for line in result.stderr.splitlines() if line][-2:]
    return error.removeprefix("error: "), remedy.strip()


def test_a_task_is_trained_on_the_server_followed_and_live(
    server: LiveServer, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = jobs.look

    def look_on(client: PreludeClient, job: Job, write: Callable[[str], None]) -> Job:
        if job["step"] >= 10:  # it was shown, and the rest may be over before the next look
            gate.unlink(missing_ok=True)
        return look(client, job, write)

    gate.touch()
    monkeypatch.setattr(jobs, "look", look_on)
    monkeypatch.setattr(jobs, "LOOK_SECONDS", 0.1)
    template = ("--input-template", "{system}{input} =", "--system-message", "template")
    result = train("mood", LEARNS, "--url", server.url, "--activate-at-least", "0.9", *template)
    assert result.exit_code == 0, result.output
    [line] = result.stdout.splitlines()[-1:]
    assert line.startswith("mood@1: validation exact match 100.0%, loss 0.")
    assert line.endswith("; live")
    assert "train.jsonl: 20 rows to learn from, 4 to measure on; labels no, yes" in result.stderr
    assert "mood: training" in result.stderr
    assert "160/160" in result.stderr
    manifest = server.client.get("/prompts/mood").json()["manifest"]
    assert (manifest["input_template"], manifest["system_message"]) == ("{system}{input} =", "template")
    assert [job["state"] for job in server.client.get("/training/jobs").json()["jobs"]] == ["succeeded"]
    assert not Path("prompts").exists()


def test_a_job_that_nobody_waits_for_is_listed_and_ended_by_the_name_of_its_task(server: LiveServer) -> None:
    sent = train("slow", SLOW, "--url", server.url, "--detach")
    assert sent.exit_code == 0, sent.output
    [job_id] = sent.stdout.splitlines()
    listed = json.loads(prelude("jobs", "list", "--json", "--url", server.url).stdout)["jobs"]
    assert (listed[0]["id"], listed[0]["task"]) == (job_id, "slow")
    assert prelude("jobs", "cancel", "slow", "--url", server.url).stdout == f"{job_id} (slow): cancelled\n"
    [row] = [
        line.split() for line in prelude("jobs", "list", "--url", server.url).stdout.splitlines() if job_id in line
    ]
    assert row[:3] == [job_id, "slow", "cancelled"]
    assert row[4:6] == ["of", "1,000,000"]
    assert refused(prelude("jobs", "follow", job_id, "--url", server.url))[0] == "The job was cancelled."
    assert prelude("jobs", "log", job_id, "--url", server.url).exit_code == 0
    assert prelude("jobs", "delete", job_id, "--url", server.url).stdout == f"{job_id} (slow): forgotten\n"
    assert job_id not in prelude("jobs", "list", "--url", server.url).stdout


def test_rows_that_do_not_fit_are_refused_before_the_server_is_asked() -> None:
    Path("held.jsonl").write_text('{"input": "good"}\n')
    error, _ = refused(train("mood", LEARNS, "--url", "http://127.0.0.1:1"))
    assert "held.jsonl" in error
    assert "line 1" in error


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--detach"], "--detach is for a job of a server."),
        (["--activate"], "--activate is for a job of a server."),
        (["--activate-at-least", "0"], "--activate-at-least is for a job of a server."),
        (["--url", "http://127.0.0.1:1", "--fresh"], "--fresh is for training on this machine."),
        (["--url", "http://127.0.0.1:1", "--out", "x"], "--out is for training on this machine."),
        (["--url", "here"], "'here' is not the address of a server."),
    ],
)
def test_options_that_mean_nothing_there_are_refused(arguments: list[str], error: str) -> None:
    assert refused(train("mood", LEARNS, *arguments))[0] == error


def test_one_condition_is_enough() -> None:
    both = ("--activate", "--activate-at-least", "0.9", "--url", "http://127.0.0.1:1")
    assert refused(train("mood", LEARNS, *both))[1] == "Give one of them."


def test_labels_of_a_file_steer_no_terminal() -> None:
    write_rows(Path("train.jsonl"), [("good", "go\x1b[31mod"), ("bad", "bad")] * 10)
    write_rows(Path("held.jsonl"), [("good", "go\x1b[31mod"), ("bad", "bad")])
    result = train("mood", LEARNS, "--url", "http://127.0.0.1:1")
    assert "labels bad, go [31mod" in result.output


def test_what_misses_its_bound_is_staged_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    done: dict[str, Any] = JOB | {"state": "succeeded", "version": 1, "metrics": {"validation_exact_match": 0.5}}
    done |= {"spec": {"activate": {"metric": "validation_exact_match", "at_least": 0.9}}}
    jobs.print_end(done, "http://there")  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert "50.0%, loss not finite; staged because it did not keep to its bound;" in said
    assert said.endswith("prelude prompts activate mood@1 --url http://there\n")


def test_what_is_over_cannot_be_cancelled_and_what_runs_is_meant_first() -> None:
    with answering(reply(200, json.dumps({"jobs": [FAILED]}).encode())) as stranger:
        error, _ = refused(prelude("jobs", "cancel", "mood", "--url", stranger.url))
        assert error == f"{JOB['id']} is over already: it has failed."
    queue = [FAILED | {"id": "c"}, JOB | {"id": "b", "state": "queued"}, JOB | {"id": "a"}]
    with answering(reply(200, json.dumps({"jobs": queue}).encode())) as stranger:
        assert jobs.find_job(stranger, "mood", runs=True)["id"] == "a"
        assert jobs.find_job(stranger, "mood")["id"] == "c"


def test_several_tasks_are_for_this_machine() -> None:
    several = ("--data", "held.jsonl", "--method", "multitask_prompt_tuning", "--url", "http://127.0.0.1:1")
    result = prelude("train", "mood", "--data", "train.jsonl", *several)
    assert refused(result) == ("A job takes one data file.", "Train several tasks on this machine.")


@pytest.mark.parametrize("command", ["follow", "cancel", "log", "delete"])
def test_a_job_that_is_not_there_is_told_with_where_to_look(server: LiveServer, command: str) -> None:
    error, remedy = refused(prelude("jobs", command, "../prompts", "--url", server.url))
    assert error == "There is no training job '../prompts', and none of a task of that name."
    assert remedy == "`prelude jobs list` lists the training jobs."


def test_why_a_job_failed_is_told_and_steers_no_terminal() -> None:
    with answering(reply(200, json.dumps({"jobs": [FAILED]}).encode())) as stranger:
        assert refused(prelude("jobs", "follow", "mood", "--url", stranger.url)) == ("It [2J broke.", "Mend it.")
        assert "It [2J broke." in prelude("jobs", "list", "--url", stranger.url).stdout


def test_without_jobs_the_list_says_how_to_send_one() -> None:
    with answering(reply(200, b'{"jobs": []}')) as stranger:
        assert "prelude train --url" in prelude("jobs", "list", "--url", stranger.url).stdout


def test_an_id_that_is_none_never_becomes_another_path() -> None:
    with PreludeClient("http://127.0.0.1:1") as client, pytest.raises(UnknownJob):
        client.job("../prompts")


class Restarting(PreludeClient):
    """A server that is away for some looks."""

    def __init__(self, away: int) -> None:
        super().__init__("http://127.0.0.1:1")
        self.away = away

    def job(self, job_id: str) -> Job:
        self.away -= 1
        if self.away >= 0:
            raise ServerUnreachable("No server answers.")
        return {**JOB, "step": 7}  # type: ignore[typeddict-item]


def test_a_server_that_is_started_anew_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LOOK_SECONDS", 0.0)
    told: list[str] = []
    with Restarting(away=3) as client:
        assert jobs.look(client, JOB, told.append)["step"] == 7  # type: ignore[arg-type]
    assert told == ["No server answers. Trying again; the job is kept."]


def test_a_server_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(jobs, "AWAY_SECONDS", 0.01)
    with Restarting(away=10**9) as client, pytest.raises(PreludeError, match="No server answers"):
        jobs.look(client, JOB, lambda line: None)  # type: ignore[arg-type]
