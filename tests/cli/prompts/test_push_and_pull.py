from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.soft_prompts.declared import CONFIG_FILE
from server.soft_prompts.formats import MANIFEST_FILE, TENSOR_FILE
from tests.api.live import Files, LiveServer, wait_until, zip_of
from tests.cli.fake_hub import FakeHub, fake_hub
from tests.cli.prompts.support import ROOT, content, directory, done, live, on_terminal, prompts, refused


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


@pytest.mark.parametrize("command", [["push", "~nobody-of-that-name/x"], ["diff", "~nobody-of-that-name/x", "x"]])
def test_the_home_of_nobody_is_a_sentence(command: list[str]) -> None:
    assert refused(prompts(*command))[0] == "~nobody-of-that-name/x cannot be read: no such user."


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
        [sys.executable, "-m", "server", "prompts", "push", *arguments],
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


def test_the_server_is_idle_again(server: LiveServer) -> None:
    wait_until(lambda: server.is_idle)
