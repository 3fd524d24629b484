from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.cli.prompts import app as prompts_app
from server.keys.file import add_key
from server.keys.key import Scope
from server.soft_prompts.formats import TENSOR_FILE
from tests.api.live import LiveServer, live_server
from tests.cli.prompts.support import ROOT, content, directory, done, live, on_terminal, prompts, refused
from tests.strangers import answering, reply

COMMANDS = ("list", "versions", "push", "pull", "activate", "rollback", "traffic", "delete", "diff")


def test_all_tasks_are_listed_as_a_table_and_as_one_json_document(server: LiveServer) -> None:
    server.publish_random("listed", manifest={"description": "For the list."})
    lines = done(prompts("list"))
    assert re.split(r"\s{2,}", lines[0]) == ["task", "live", "type", "tokens", "description"]
    row = next(line for line in lines if line.startswith("listed"))
    assert re.split(r"\s{2,}", row) == ["listed", "1", "prompt_tuning", "5", "For the list."]
    document = json.loads(prompts("list", "--json").stdout)
    assert {"listed"} <= {entry["task"] for entry in document["prompts"]}


def test_a_canary_is_listed_with_its_shares(server: LiveServer) -> None:
    for seed in range(2):
        server.publish_random("listed-canary", seed=seed)
    done(prompts("traffic", "listed-canary", "1=90", "2=10"))
    row = next(line for line in done(prompts("list")) if line.startswith("listed-canary"))
    assert re.split(r"\s{2,}", row)[:2] == ["listed-canary", "1 (90 %), 2 (10 %)"]


@pytest.mark.parametrize("command", ["list", "versions"])
def test_versions_are_listed_newest_first_as_a_table_and_as_one_json_document(server: LiveServer, command: str) -> None:
    task = f"has-versions-{command}"
    for seed in range(2):
        server.publish_random(task, seed=seed, manifest={"metrics": {"exact_match": 0.5}})
    lines = done(prompts(command, task))
    assert [re.split(r"\s{2,}", line.strip())[:3] for line in lines[1:]] == [
        ["2", "live", "just now"],
        ["1", "just now", "api"],
    ]
    assert lines[1].endswith("exact_match 0.5")
    document = json.loads(prompts(command, task, "--json").stdout)
    assert (document["task"], document["live"]) == (task, 2)
    assert [version["version"] for version in document["versions"]] == [2, 1]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*", document["versions"][0]["created_at"])
    assert document["etag"].isdigit()


def test_a_terminal_gets_a_table_of_its_width_and_a_pipe_gets_whole_lines(server: LiveServer) -> None:
    description = "A description that " + "goes on and " * 10 + "ends."
    server.publish_random("wide", manifest={"description": description})
    assert any(line.endswith(description) for line in done(prompts("list")))
    for columns in (80, 120):
        status, text = on_terminal("list", columns=columns)
        assert status == 0
        assert max(map(len, text.splitlines())) <= columns
        assert "ends." in text


def test_a_stranger_cannot_steer_the_terminal() -> None:
    refusal = b'{"error": "a\\u001b[2Jb\\nc", "code": "x", "remedy": "d\\u009be", "error_type": "y"}'
    listed = b'{"task": "a\\u001b[2Jb", "versions": []}'
    with answering(reply(400, refusal)) as stranger:
        assert refused(prompts("rollback", "x", "--url", stranger.url)) == ("a [2Jb c", "d e")
    with answering(reply(200, listed)) as stranger:
        assert done(prompts("rollback", "x", "--url", stranger.url)) == ["a [2Jb: no version is live"]


def test_characters_that_the_terminal_does_not_have_are_replaced(server: LiveServer) -> None:
    server.publish_random("plain", manifest={"description": "Größe"})
    run = subprocess.run(
        [sys.executable, "-m", "server", "prompts", "list"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "Gr??e" in run.stdout


def test_without_a_server_every_command_says_how_to_start_one(workplace: Path, server: LiveServer) -> None:
    directory(workplace / "sent" / "task", content(server))
    tails = {"push": ["sent/task"], "traffic": ["task", "1=100"], "delete": ["task", "--yes"], "list": []}
    tails |= {"activate": ["task@1"], "diff": ["task", "task@1"]}
    for command in COMMANDS:
        error, remedy = refused(prompts(command, *tails.get(command, ["task"]), "--url", "http://127.0.0.1:9"))
        assert error == "No server answers at http://127.0.0.1:9: Connection refused."
        assert "`prelude serve`" in remedy


@pytest.mark.parametrize("variable", ["PRELUDE_URI", "prelude_url"])
def test_a_misspelt_variable_does_not_lead_to_another_server(server: LiveServer, variable: str) -> None:
    server.publish_random("misspelt")
    error, remedy = refused(prompts("delete", "misspelt", "--yes", **{variable: "http://127.0.0.1:9"}))
    assert error == f"Not a setting: {variable}."
    assert remedy.endswith(", PRELUDE_URL, PRELUDE_API_KEY.")
    assert live(server, "misspelt") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_examples_and_never_shows_the_key(command: str) -> None:
    wide = {"COLUMNS": "300", "TERMINAL_WIDTH": "300", "PRELUDE_API_KEY": "topsecret"}
    text = "\n".join(done(prompts(command, "--help", **wide)))
    assert f"prelude prompts {command} " in text.split("Examples:")[1] + " "
    assert "PRELUDE_URL" in text
    assert "PRELUDE_API_KEY" in text
    assert "topsecret" not in text


def test_every_example_of_the_help_is_a_command_that_there_is() -> None:
    group = prompts_app.registered_commands
    examples = [line for command in group for line in (command.epilog or "").split("\n\n")[1:]]
    assert len(examples) >= len(COMMANDS)
    for example in examples:
        arguments = shlex.split(example.split(" | ")[0])
        assert arguments[:2] == ["prelude", "prompts"]
        result = CliRunner().invoke(app, arguments[1:], env={"PRELUDE_URL": "http://127.0.0.1:9"})
        assert "error: " in result.stderr  # taken by the parser, refused for what is not here
        assert "Usage" not in result.stderr


def test_a_key_is_not_shown_by_an_error() -> None:
    for key in ("topsecret", "top secret"):
        result = prompts("list", "--url", "http://127.0.0.1:9", "--key", key)
        refused(result)
        assert "secret" not in result.output


def test_listing_answers_at_once_because_it_loads_neither_torch_nor_the_server() -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "server", "prompts", "list"],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    loaded = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert {"httpx", "server.client"} <= loaded
    assert not loaded & {"torch", "transformers", "fastapi", "huggingface_hub", "server.engine", "server.api"}


def test_a_pipe_that_is_closed_early_is_no_traceback(server: LiveServer) -> None:
    for number in range(12):
        server.publish_random(f"piped-{number}", manifest={"description": "x" * 1000})
    run = subprocess.run(
        ["bash", "-c", f"{shlex.quote(sys.executable)} -m server prompts list | head -c 1"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout, run.stderr) == ("t", "")


def test_a_server_with_keys_is_asked_with_the_key_of_the_variable(
    tmp_path_factory: pytest.TempPathFactory, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("guarded")
    key, text = add_key(folder / "keys.json", "ci", [Scope.PUBLISH], None)
    monkeypatch.delenv("PRELUDE_URL")
    with live_server(folder, api_keys_file=folder / "keys.json", max_upload_bytes=2**26) as guarded:
        monkeypatch.setenv("PRELUDE_URL", guarded.url)
        source = str(directory(workplace / "mine", content(guarded)))
        error, remedy = refused(prompts("push", source))
        assert remedy == "Give a key of this server in PRELUDE_API_KEY or with --key."
        assert "mine: version 1 is live" in done(prompts("push", source, PRELUDE_API_KEY=text))
        assert key.id in done(prompts("list", "mine", "--key", text))[1]
        wrong = refused(prompts("list", PRELUDE_API_KEY=f"{text}x"))
        assert text not in "".join(wrong)
        (workplace / "mine" / TENSOR_FILE).write_bytes(bytes(30 * 2**20))
        assert refused(prompts("push", source)) == (error, remedy)
