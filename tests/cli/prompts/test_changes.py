from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api.live import LiveServer
from tests.cli.prompts.support import ROOT, content, directory, done, live, on_terminal, prompts, refused


@pytest.mark.parametrize(
    ("change", "after"),
    [
        ("activate TASK@1", "TASK: version 1 is live"),
        ("activate TASK 1", "TASK: version 1 is live"),
        ("rollback TASK", "TASK: version 2 is live"),
        ("traffic TASK 2=60 3=40", "TASK: versions 2 (60 %), 3 (40 %) are live"),
        ("delete TASK@1 --yes", "TASK: version 3 is live"),
        ("delete TASK --yes", "TASK: deleted; nothing answers for it any more"),
    ],
)
def test_every_change_says_what_is_live_and_is_guarded_by_the_state(
    server: LiveServer, change: str, after: str
) -> None:
    task = re.sub(r"\W+", "-", change.lower())
    for seed in range(3):
        server.publish_random(task, seed=seed)
    state = json.loads(prompts("list", task, "--json").stdout)["etag"]
    arguments = change.replace("TASK", task).split()
    error, remedy = refused(prompts(*arguments, "--if-match", str(int(state) - 1)))
    assert "prelude prompts list TASK" in remedy
    assert "GET" not in error + remedy
    assert done(prompts(*arguments, "--if-match", state))[-1] == after.replace("TASK", task)


def test_a_push_is_guarded_by_the_state(server: LiveServer, workplace: Path) -> None:
    server.publish_random("pushed-guarded", seed=1)
    source = str(directory(workplace / "pushed-guarded", content(server)))
    refused(prompts("push", source, "--if-match", "0"))
    assert live(server, "pushed-guarded") == 1
    done(prompts("push", source, "--if-match", "*"))
    assert live(server, "pushed-guarded") == 2


@pytest.mark.parametrize("command", [["pull", "TASK"], ["diff", "TASK", "TASK@1"]])
def test_of_a_canary_a_version_has_to_be_named(server: LiveServer, command: list[str]) -> None:
    task = f"canary-{command[0]}"
    for seed in range(2):
        server.publish_random(task, seed=seed)
    done(prompts("traffic", task, "1=50", "2=50"))
    error, remedy = refused(prompts(*(part.replace("TASK", task) for part in command)))
    assert error == f"{task}: versions 1 (50 %), 2 (50 %) are live."
    assert remedy == f"Name one: {task}@N."


@pytest.mark.parametrize(
    "weights",
    [["1"], ["1=x"], ["=5"], ["1=50", "1=50"], ["1=-1"], ["0=100"], ["1=50"], ["1=99", "2=2"], ["9" * 5000 + "=100"]],
)
def test_weights_that_are_none_are_refused_before_the_server_is_asked(weights: list[str]) -> None:
    error, remedy = refused(prompts("traffic", "whatever", "--url", "http://127.0.0.1:9", "--", *weights))
    assert "3=90 4=10" in remedy
    assert len(error) < 120


@pytest.mark.parametrize("command", [["list"], ["versions"], ["rollback"], ["traffic", "1=100"]])
def test_where_a_task_is_meant_a_version_is_refused_by_name(command: list[str]) -> None:
    name, *rest = command
    assert refused(prompts(name, "mood@2", *rest)) == ("mood@2 is one version.", "Name the task: mood.")


@pytest.mark.parametrize("command", [["push", "PATH"], ["diff", "PATH", "x"], ["pull", "x", "--out", "PATH"]])
def test_a_path_that_cannot_be_is_a_sentence(command: list[str]) -> None:
    path = f"./{'x' * 300}"
    error, _ = refused(prompts(*(part.replace("PATH", path) for part in command)))
    assert "File name too long" in error


def test_a_version_has_to_be_named_once_to_be_activated() -> None:
    assert refused(prompts("activate", "whatever"))[1] == "Name one: whatever@3."
    assert refused(prompts("activate", "whatever@1", "2"))[1] == "Name one: whatever@3."


def test_nothing_is_deleted_without_being_asked_for(server: LiveServer) -> None:
    server.publish_random("careful")
    assert refused(prompts("delete", "careful")) == (
        "careful is only deleted after a confirmation.",
        "Confirm with --yes.",
    )
    assert live(server, "careful") == 1


def test_on_a_terminal_the_user_is_asked_what_the_task_holds(server: LiveServer) -> None:
    for seed in range(2):
        server.publish_random("asked", seed=seed)
    status, text = on_terminal("delete asked", "n\n")
    assert (status, live(server, "asked")) == (1, 2)
    assert "asked: version 2 is live. Delete asked with 2 versions for good? [y/N]" in text
    status, text = on_terminal("delete asked", "y\n")
    assert status == 0
    assert server.client.get("/prompts/asked").status_code == 404


def test_what_changed_while_the_user_was_asked_is_not_deleted(server: LiveServer) -> None:
    server.publish_random("asked-late", seed=0)
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "prompts", "delete", "asked-late"],
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    shown = b""
    while b"[y/N]" not in shown:
        shown += os.read(main, 4096)
    server.publish_random("asked-late", seed=1)
    os.write(main, b"y\n")
    _, errors = process.communicate(timeout=30)
    os.close(main)
    os.close(terminal)
    assert process.returncode == 2
    assert b"Look at it again" in errors
    assert live(server, "asked-late") == 2
