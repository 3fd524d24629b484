"""Every block of the README and of docs/clients.md does what it says, on a server that the README starts."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from tests.jobs.support import save_tiny_model

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/clients.md")


@dataclass(frozen=True)
class Block:
    """A fenced shell block and, where one follows it, the JSON or the text that it promises."""

    commands: str
    promised: object | None = None
    language: str = "sh"


def blocks() -> list[Block]:
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    fences = re.findall(r"```(\w+)\n(.*?)```", pages, re.DOTALL)
    found: list[Block] = []
    for language, body in fences:
        if language == "json":
            found[-1] = replace(found[-1], promised=json.loads(body))
        elif language == "text":
            found[-1] = replace(found[-1], promised=body)
        else:
            assert language in ("sh", "python"), f"a block in {language} that no test runs"
            found.append(Block(body, language=language))
    return found


def block(start: str) -> Block:
    matching = [b for b in blocks() if b.commands.startswith(start)]
    assert len(matching) == 1
    return matching[0]


CURLS = [b for b in blocks() if b.commands.startswith("curl")]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server and all that it imports write."""
    return tmp_path_factory.mktemp("log") / "serve.log"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory, log: Path) -> Iterator[int]:
    """The server that `make run` starts, on a free port and with a store of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    store = tmp_path_factory.mktemp("store")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    settings = {"PRELUDE_PORT": str(port), "PRELUDE_STORE": f"file:{store}", "PRELUDE_LOG_FORMAT": "json"}
    command = ["bash", "-c", block("make run").commands]
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=ROOT, env=environment | settings, stdout=output, stderr=output, process_group=0
        )
        try:
            wait_until_ready(port, server)
            yield port
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            assert server.wait(60) in (0, -signal.SIGTERM, 143)


def wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        assert server.poll() is None, "make run ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):  # it listens before it has loaded the model
            time.sleep(0.1)
    raise AssertionError("the server does not become ready")


def test_the_pages_have_the_blocks_that_are_tested_here() -> None:
    assert len(CURLS) == 4
    assert {b.commands.split()[0] for b in blocks() if b.language == "sh"} == {"make", "curl", ".venv/bin/prelude"}
    assert [b.language for b in blocks()].count("python") == 1


@pytest.mark.parametrize("curl", CURLS, ids=["spam", "emotion", "publish", "choices"])
def test_its_requests_are_answered_as_promised(curl: Block, port: int) -> None:
    commands = curl.commands.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    run = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=ROOT, capture_output=True, check=True)
    answers = run.stdout.decode()
    answer, _ = json.JSONDecoder().raw_decode(answers[answers.rindex('{"generated_text"') :])
    assert rounded(answer) == rounded(curl.promised)


def test_no_library_writes_into_the_log_of_a_server_that_starts(port: int, log: Path) -> None:
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [entry["level"] for entry in entries if entry["event"].startswith(f"ready on http://127.0.0.1:{port}")] == [
        "info"
    ]


def rounded(value: object) -> object:
    """Numbers as exactly as they are the same on every CPU."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items() if key != "logprob"}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 1) if isinstance(value, float) else value


def test_the_python_client_is_answered_as_printed(port: int) -> None:
    (python,) = (b for b in blocks() if b.language == "python")
    script = python.commands.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert run.stdout.decode() == python.promised


def test_the_shell_changes_and_shows_versions_as_printed(port: int) -> None:
    publish = CURLS[2].commands.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    subprocess.run(["bash", "-euo", "pipefail", "-c", publish], cwd=ROOT, capture_output=True, check=True)
    shell = block(".venv/bin/prelude prompts")
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shell.commands],
        cwd=ROOT,
        env=os.environ | {"PRELUDE_URL": f"http://127.0.0.1:{port}"},
        capture_output=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, b"")
    for printed, promised in zip(cells(run.stdout.decode()), cells(str(shell.promised)), strict=True):
        assert re.fullmatch(re.escape(promised).replace("…", ".*"), printed)


def cells(text: str) -> list[str]:
    """A table line by line; how wide its columns are and how long ago something was is not compared."""
    text = re.sub(r"just now|\d+ (minute|hour)s? ago", "WHEN", text)
    return [re.sub(r" {2,}", "  ", line.strip()) for line in text.splitlines()]


def test_without_its_task_a_text_is_merely_continued(port: int) -> None:
    """What the soft prompt adds: the same text, with the task and without."""
    commands = CURLS[0].commands.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("?task=sms_spam", "")
    assert commands.rstrip().endswith("}'")
    commands = commands.rstrip().removesuffix("}'") + """, "parameters": {"max_new_tokens": 12}}'"""
    run = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=ROOT, capture_output=True, check=True)
    text = json.loads(run.stdout)["generated_text"]
    assert text not in ("spam", "ham")
    assert len(text) > 20


def test_make_test_runs_the_tests() -> None:
    run = subprocess.run(
        ["make", "--dry-run", *block("make test").commands.split("#")[0].split()[1:]],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    assert b"pytest" in run.stdout


def test_training_and_evaluating_work_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same commands on a tiny model, for two steps; test_tutorial.py runs such commands on the embedded one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRELUDE_MODEL", str(save_tiny_model(tmp_path / "tiny")))
    monkeypatch.setenv("PRELUDE_MAX_MODEL_LEN", "128")
    monkeypatch.setenv("PRELUDE_DTYPE", "float32")  # other tests have its loops compiled
    for name, each in (("train", 8), ("validation", 4), ("test", 2)):
        rows = [{"input": f"{word} one", "target": word} for word in ("good", "bad") for _ in range(each)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    train, evaluate = block(".venv/bin/prelude train").commands.splitlines()
    assert train.endswith(" --steps 300")
    printed = [prelude(line) for line in (train.replace("--steps 300", "--steps 2 --lr 0.02"), evaluate)]
    assert (tmp_path / "prompts" / "my_task" / "adapter_model.safetensors").exists()
    assert re.search(r"^my_task on 4 rows of test.jsonl, .*^my_task +[0-9.]+ %", printed[1], re.MULTILINE | re.DOTALL)


def prelude(line: str) -> str:
    """What a command prints that calls `prelude` from a shell."""
    program, *arguments = shlex.split(line)
    assert program == ".venv/bin/prelude"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout
