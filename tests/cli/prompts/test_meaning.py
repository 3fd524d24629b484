"""`prelude inspect --url` asks the server; `prelude prune` publishes a staged version, never a live one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli import app
from server.cli.references import download
from server.client import PreludeClient
from server.engine.engine import Engine
from server.interpret.pruning import Pruning
from server.interpret.static import Interpreter
from server.registry.objects import open_objects
from server.registry.registry import Registry
from server.registry.store import Store
from server.settings import Settings
from server.soft_prompts.formats import load_soft_prompts, save_soft_prompt
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.api.live import LiveServer
from tests.cli.prompts.support import live
from tests.support import make_engine, random_soft_prompt
from tests.train.rows import MOODS, write_rows

START = {"training": {"start": {"initial_token_ids": [5, 6, 7, 8, 9]}}, "labels": ["yes", "no"]}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def engines(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Commands load the server's tiny model; the engines that they have loaded."""
    loaded: list[Engine] = []

    def load(settings: Settings) -> Engine:
        loaded.append(make_engine(server.model))
        return loaded[-1]

    monkeypatch.setattr("server.engine.build_engine.load_engine", load)
    return loaded


def test_what_needs_no_data_is_asked_of_the_server_without_loading_a_model(
    server: LiveServer, engines: Sequence[Engine], workplace: Path
) -> None:
    published = server.publish_random("asked", manifest=START)
    result = run("inspect", "asked", "--url", server.url, "--top", "2", "--json", "found.json", "--svg", "pictures")
    assert result.exit_code == 0, result.output
    expected = Interpreter(server.model).interpret("asked", published, top=2)
    assert json.loads((workplace / "found.json").read_text())["static"]["verdict"] == expected.verdict
    assert " ".join(result.stdout.split()).startswith(" ".join(expected.verdict.split()))
    assert list((workplace / "pictures").glob("*.svg"))
    assert not engines
    piped = run("inspect", "asked", "--url", server.url, "--top", "2", "--json", "-")
    assert json.loads(piped.stdout)["static"]["verdict"] == expected.verdict
    assert expected.verdict in piped.stderr
    assert run("inspect", "asked", "--url", server.url, "--json", "new/folder/found.json").exit_code == 0
    assert (workplace / "new" / "folder" / "found.json").is_file()
    refused = run("inspect", "asked@9", "--url", server.url)
    assert refused.exit_code == 2
    assert "asked" in refused.stderr


def test_a_shortened_soft_prompt_is_staged_on_a_server_and_never_live(
    server: LiveServer, engines: Sequence[Engine], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = server.publish_random("pruned", manifest=START)
    rows = write_rows(workplace / "rows.jsonl", MOODS * 6)
    every = ["prune", "pruned", "--data", str(rows), "--url", server.url, "--tolerance", "2"]
    tried = run(*every, "--dry-run")
    assert tried.exit_code == 0, tried.output
    assert len(server.client.get("/prompts/pruned/versions").json()["versions"]) == 1
    result = run(*every, "--json", "found.json")
    assert result.exit_code == 0, result.output
    assert "pruned@2 is staged" in result.stdout
    assert "Saved: 4 virtual tokens" in result.stdout
    assert live(server, "pruned") == 1
    found = json.loads((workplace / "found.json").read_text())
    assert (found["version"], found["choosing_rows"], len(found["kept"])) == (2, 12, 1)
    second_files = workplace / "second"
    second_files.mkdir()
    with PreludeClient(server.url) as client:
        download(client, "pruned", 2, second_files)
    [second] = load_soft_prompts(second_files, server.model.spec, 512)
    assert second.num_virtual_tokens == 1
    assert second.manifest.training is not None
    assert second.manifest.training["pruned"]["from"] == "pruned@1"
    assert second.manifest.training["pruned"]["from_digest"] == whole.digest
    assert server.text("hello", "pruned@2", max_new_tokens=2) is not None
    monkeypatch.setattr(Pruning, "is_shown", property(lambda self: False))
    none = run(*every)
    assert none.exit_code == 0, none.output
    assert "Nothing is published" in none.stdout
    assert len(server.client.get("/prompts/pruned/versions").json()["versions"]) == 2
    assert all(not engine.has_work for engine in engines)


@pytest.mark.usefixtures("engines")
def test_without_a_server_the_version_is_staged_in_the_store(
    server: LiveServer, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRELUDE_STORE", f"file://{workplace / 'store'}")
    soft_prompt: SoftPrompt = random_soft_prompt(server.model.spec, manifest=START)
    save_soft_prompt(workplace / "prompts" / "mood", soft_prompt, server.model.spec)
    rows = write_rows(workplace / "rows.jsonl", MOODS * 6)
    result = run("prune", "mood", "--data", str(rows), "--tolerance", "2")
    assert result.exit_code == 0, result.output
    assert "mood@1 is staged" in result.stdout
    registry = Registry(Store(open_objects(f"file://{workplace / 'store'}")), server.model.spec, 512)
    task = registry.task("mood")
    assert (list(task.versions), task.live) == ([1], None)
    assert list((workplace / "prompts" / "mood").iterdir())
    few = run("prune", "mood", "--data", str(write_rows(workplace / "few.jsonl", MOODS)))
    assert few.exit_code == 2
    assert "4 rows are too few" in few.stderr
