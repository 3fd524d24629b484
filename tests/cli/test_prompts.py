from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from server.cli import app
from server.cli.prompts import app as prompts_app
from server.keys.file import add_key
from server.keys.key import Scope
from server.soft_prompts.declared import CONFIG_FILE
from server.soft_prompts.formats import MANIFEST_FILE, TENSOR_FILE
from tests.api.live import Files, LiveServer, live_server, wait_until, zip_of
from tests.cli.fake_hub import FakeHub, fake_hub
from tests.strangers import answering, reply
from tests.support import random_soft_prompt

ROOT = Path(__file__).parents[2]
COMMANDS = ("list", "versions", "push", "pull", "activate", "rollback", "traffic", "delete", "diff")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("server")) as live:
        yield live


@pytest.fixture(autouse=True)
def workplace(server: LiveServer, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to stand in, and an environment that names the server."""
    monkeypatch.setenv("PRELUDE_URL", server.url)
    return workplace


def prompts(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, ["prompts", *arguments], env=environment)


def done(result: Result) -> list[str]:
    """The lines of a command that did what it was told."""
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout.splitlines()


def refused(result: Result) -> tuple[str, str]:
    """What a command says that refuses: the error and what to do about it."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    error, remedy = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert remedy.startswith("       ")
    return error.removeprefix("error: "), remedy.strip()


def on_terminal(arguments: str, typed: str = "", columns: int = 80) -> tuple[int, str]:
    """Run a command on a terminal of its own; answers its status and what the terminal showed, without colours."""
    main, terminal = pty.openpty()
    tty.setraw(terminal, termios.TCSANOW)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "prompts", *shlex.split(arguments)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment | {"TERM": "xterm", "PYTHONPATH": str(ROOT)},
    )
    os.close(terminal)
    os.write(main, typed.encode())
    output = b""
    with suppress(OSError):  # EIO is how Linux says that nobody holds the terminal any more
        while chunk := os.read(main, 65536):
            output += chunk
    os.close(main)
    return process.wait(), re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())


def content(server: LiveServer, seed: int = 0, **manifest: Any) -> Files:
    return server.files(random_soft_prompt(server.model.spec, seed=seed, manifest=manifest))


def directory(path: Path, files: Files) -> Path:
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def live(server: LiveServer, task: str) -> int | None:
    number: int | None = server.client.get(f"/prompts/{task}/versions").json().get("live")
    return number


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


def test_a_directory_becomes_a_task_of_its_name(server: LiveServer, workplace: Path) -> None:
    directory(workplace / "Pushed_Once", content(server))
    assert done(prompts("push", "Pushed_Once")) == [
        "pushed_once@1: published",
        "pushed_once: version 1 is live",
    ]
    assert live(server, "pushed_once") == 1
    assert done(prompts("push", "Pushed_Once"))[0] == "pushed_once@1: holds this already; nothing has changed"


def test_a_zip_becomes_a_task_of_the_name_given(server: LiveServer, workplace: Path) -> None:
    (workplace / "some.zip").write_bytes(zip_of(content(server)))
    assert "pushed-zip: version 1 is live" in done(prompts("push", "some.zip", "--task", "pushed-zip"))


def test_what_is_only_tried_changes_nothing(server: LiveServer, workplace: Path) -> None:
    source = str(directory(workplace / "tried", content(server)))
    assert done(prompts("push", source, "--dry-run")) == ["tried@1: the server would take it; nothing has changed"]
    assert server.client.get("/prompts/tried").status_code == 404


def test_what_is_staged_says_how_to_make_it_live(server: LiveServer, workplace: Path) -> None:
    server.publish_random("staged", seed=1)
    source = str(directory(workplace / "staged", content(server)))
    first, second = done(prompts("push", source, "--no-activate"))
    assert first == "staged@2: published, not live; `prelude prompts activate staged@2` makes it live"
    assert second == "staged: version 1 is live"
    assert done(CliRunner().invoke(app, shlex.split(first.split("`")[1])[1:])) == ["staged: version 2 is live"]


def test_a_refused_upload_says_what_the_server_said(server: LiveServer, workplace: Path) -> None:
    files = content(server) | {CONFIG_FILE: b'{"peft_type": "LORA"}'}
    error, remedy = refused(prompts("push", str(directory(workplace / "lora", files))))
    assert "peft_type 'LORA' is not a soft prompt" in error
    assert remedy.startswith("Merge the adapter")


def test_a_big_upload_shows_its_progress_on_a_terminal_only(
    server: LiveServer, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = directory(workplace / "big", content(server))
    (source / TENSOR_FILE).write_bytes(bytes(5 * 2**20))
    status, text = on_terminal("push big")
    assert status == 2
    assert re.search(r"big: +\d+%", text)
    assert "PRELUDE_MAX_UPLOAD_BYTES" in text
    assert "%" not in prompts("push", "big").output


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


def test_what_is_pulled_is_a_peft_directory_that_can_be_pushed_again(server: LiveServer, workplace: Path) -> None:
    first = server.files(server.publish_random("pulled", seed=0))
    server.publish_random("pulled", seed=1)
    assert done(prompts("pull", "pulled@1")) == ["pulled: pulled@1"]
    assert sorted(path.name for path in (workplace / "pulled").iterdir()) == sorted(
        [CONFIG_FILE, TENSOR_FILE, MANIFEST_FILE]
    )
    assert (workplace / "pulled" / TENSOR_FILE).read_bytes() == first[TENSOR_FILE]
    assert done(prompts("push", "pulled"))[-1] == "pulled: version 3 is live"
    assert done(prompts("pull", "pulled", "--out", "deep/other")) == ["deep/other: pulled@3"]
    assert (workplace / "deep/other" / TENSOR_FILE).read_bytes() == first[TENSOR_FILE]


def test_a_pull_overwrites_only_when_forced(server: LiveServer, workplace: Path) -> None:
    server.publish_random("kept")
    target = directory(workplace / "kept", {"README.md": b"mine", TENSOR_FILE: b"old"})
    error, remedy = refused(prompts("pull", "kept"))
    assert error == "kept is not empty."
    assert "--force" in remedy
    assert (target / TENSOR_FILE).read_bytes() == b"old"
    done(prompts("pull", "kept", "--force"))
    assert (target / TENSOR_FILE).read_bytes() != b"old"
    assert (target / "README.md").read_bytes() == b"mine"


def test_a_pull_that_fails_leaves_nothing(server: LiveServer, workplace: Path) -> None:
    server.publish_random("pulled-badly")
    refused(prompts("pull", "pulled-badly@7"))
    assert list(workplace.iterdir()) == []


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


@pytest.mark.parametrize("command", [["push", "~nobody-of-that-name/x"], ["diff", "~nobody-of-that-name/x", "x"]])
def test_the_home_of_nobody_is_a_sentence(command: list[str]) -> None:
    assert refused(prompts(*command))[0] == "~nobody-of-that-name/x cannot be read: no such user."


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
        [sys.executable, "-m", "server.cli", "prompts", "list"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "Gr??e" in run.stdout


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
        [sys.executable, "-m", "server.cli", "prompts", "delete", "asked-late"],
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


def test_identical_soft_prompts_are_so_by_status(server: LiveServer, workplace: Path) -> None:
    server.publish_random("same")
    assert done(prompts("diff", "same@1", "same"))[-1] == "same@1 and same@1 are identical."
    done(prompts("pull", "same"))
    assert done(prompts("diff", "same", "./same"))[-1] == "same@1 and ./same are identical."


def test_what_was_pushed_is_identical_to_its_directory(server: LiveServer, workplace: Path) -> None:
    files = content(server, input_template="{input}\n", created_at="2026-01-01T00:00:00+00:00", task="else")
    directory(workplace / "with-manifest", files)
    directory(workplace / "bare", {name: data for name, data in files.items() if name != MANIFEST_FILE})
    for name in ("with-manifest", "bare"):
        done(prompts("push", name))
        assert done(prompts("diff", name, f"./{name}"))[-1] == f"{name}@1 and ./{name} are identical."
    assert prompts("diff", "bare", "with-manifest").exit_code == 1


def test_different_soft_prompts_are_shown_side_by_side_with_status_1(server: LiveServer) -> None:
    server.publish_random("differing", seed=0, manifest={"input_template": "{input}\n"})
    server.publish_random("differing", seed=1, manifest={"input_template": "Text: {input}"})
    result = prompts("diff", "differing@1", "differing@2")
    assert (result.exit_code, result.stderr) == (1, "")
    rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()]
    assert ["manifest.json", "differing@1", "differing@2"] in rows
    assert ["input_template", r"{input}\n", "Text: {input}"] in rows
    assert next(row for row in rows if row[0] == "prompt_embeddings")[1:4] == ["F32 [5, 32]", "F32 [5, 32]", "no"]
    assert ["virtual token", "cosine", "norm a", "norm b", "max |a-b|"] in rows
    result = prompts("diff", "differing@1", "differing@2", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert not document["identical"]
    assert len(document["tensors"][0]["rows"]) == 5


def test_what_cannot_be_compared_has_another_status_than_what_differs(server: LiveServer, workplace: Path) -> None:
    server.publish_random("lonely")
    refused(prompts("diff", "lonely", "lonely@7"))
    refused(prompts("diff", "lonely", "./nothing"))
    refused(prompts("diff", "lonely", "not a name"))


def test_an_unknown_task_is_refused_in_the_words_of_the_shell(server: LiveServer) -> None:
    server.publish_random("known")
    for command in (["list", "knwon"], ["activate", "knwon@1"], ["pull", "knwon"], ["delete", "knwon", "--yes"]):
        error, remedy = refused(prompts(*command))
        assert error == "There is no task 'knwon'. Did you mean known?"
        assert remedy.startswith("`prelude prompts list` lists the tasks")


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
        [sys.executable, "-X", "importtime", "-m", "server.cli", "prompts", "list"],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    loaded = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert {"httpx", "server.client"} <= loaded
    assert not loaded & {"torch", "transformers", "fastapi", "huggingface_hub", "server.engine", "server.api"}


@pytest.fixture(scope="module")
def hub(server: LiveServer) -> Iterator[FakeHub]:
    files = content(server)
    pickled = {CONFIG_FILE: files[CONFIG_FILE], "adapter_model.bin": b"pickle"}
    repositories: dict[str, Files] = {
        "org/Hub-Task": files | {"README.md": b"x", "adapter_model.bin": b"pickle", "model.safetensors": b"x"},
        "org/pickled": pickled,
        "org/empty": {"README.md": b"x"},
        "org/gated": files,
    }
    with fake_hub(repositories, gated=("org/gated",)) as running:
        yield running


def push_from(hub: FakeHub, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`prelude prompts push` in a process of its own: the hub's library reads its variables when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in environment.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    return subprocess.run(
        [sys.executable, "-m", "server.cli", "prompts", "push", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("revision", ["", "@main"])
def test_a_repository_of_the_hub_is_published(server: LiveServer, workplace: Path, hub: FakeHub, revision: str) -> None:
    task = f"from-hub{revision.replace('@', '-')}"
    run = push_from(hub, workplace / "cache", f"org/Hub-Task{revision}", "--task", task)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [f"{task}@1: published", f"{task}: version 1 is live"]
    assert set(hub.downloads) == {CONFIG_FILE, TENSOR_FILE, MANIFEST_FILE}


def test_a_repository_s_name_in_lower_case_is_the_task(server: LiveServer, workplace: Path, hub: FakeHub) -> None:
    assert push_from(hub, workplace / "cache", "org/Hub-Task").stdout.startswith("hub-task@1: published")


@pytest.mark.parametrize(
    ("source", "error", "remedy"),
    [
        ("org/pickled", "org/pickled holds only adapter_model.bin, a pickle", "safe_serialization=True"),
        ("org/empty", "org/empty holds no adapter_config.json.", "save_pretrained"),
        ("org/gated", "org/gated is gated.", "Ask for access"),
        ("org/Hub-Task@v9", "org/Hub-Task has no revision v9.", "a branch, a tag or a commit"),
        (
            "org/nowhere",
            "There is no directory org/nowhere here, and no repository org/nowhere on the hub",
            "Check the name",
        ),
    ],
)
def test_what_the_hub_does_not_have_is_a_sentence(
    workplace: Path, hub: FakeHub, source: str, error: str, remedy: str
) -> None:
    run = push_from(hub, workplace / "cache", source)
    assert (run.returncode, run.stdout) == (2, "")
    first, second = run.stderr.splitlines()
    assert error in first
    assert remedy in second
    assert "adapter_model.bin" not in hub.downloads


def test_a_hub_that_cannot_be_reached_is_a_sentence(workplace: Path) -> None:
    run = push_from(FakeHub("http://127.0.0.1:9", {}), workplace / "cache", "org/name")
    assert run.returncode == 2
    error, _ = run.stderr.splitlines()
    assert "There is no directory org/name here, and the hub cannot be asked: " in error


def test_a_pipe_that_is_closed_early_is_no_traceback(server: LiveServer) -> None:
    for number in range(12):
        server.publish_random(f"piped-{number}", manifest={"description": "x" * 1000})
    run = subprocess.run(
        ["bash", "-c", f"{shlex.quote(sys.executable)} -m server.cli prompts list | head -c 1"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout, run.stderr) == ("t", "")


def test_the_server_is_idle_again(server: LiveServer) -> None:
    wait_until(lambda: server.is_idle)


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
