"""Every script in examples/ runs against a live server and prints that server's answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.live import LiveServer, SteeredModel, live_server
from tests.api.openai.support import TEMPLATE
from tests.jobs.support import save_tiny_model
from tests.processes import start_forked
from tests.train.rows import MOODS, write_rows

EXAMPLES = Path(__file__).parents[1] / "examples"
SPAM = "URGENT! You have won a prize. Text WIN to 81010"
TASK = "sms_spam"
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A tiny model with a task that is called as the one that ships."""
    model = SteeredModel()
    model.tokenizer.chat_template = TEMPLATE
    with live_server(tmp_path_factory.mktemp("examples"), model=model) as live:
        live.publish_random(TASK, 1, {"input_template": "{input}\n", "generation": {"max_new_tokens": 6}})
        yield live


def run(name: str, *arguments: str) -> list[str]:
    """What a script prints, line by line; it may not look for anything outside this machine."""
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env=os.environ | OFFLINE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


# openai_client.py has a test of its own in tests/api/openai.
CLIENTS = ["huggingface_client.py", "langchain_client.py", "litellm_client.py"]


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_is_answered_as_every_other(server: LiveServer, name: str) -> None:
    lines = run(name, "--url", server.url, "--task", TASK)
    answer = server.text(SPAM, TASK)
    assert f"{answer!r}: {SPAM}" in lines
    [stream] = [line for line in lines if line.startswith("stream: ")]
    assert len(stream) > len("stream: []")


def test_a_task_is_trained_measured_and_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRELUDE_MODEL", str(save_tiny_model(tmp_path / "tiny")))
    data = write_rows(tmp_path / "rows.jsonl", [(f"{text} {i}", target) for text, target in MOODS for i in range(5)])
    config = '{"steps": 4, "evaluations": 2, "num_virtual_tokens": 5, "learning_rate": 0.1, "batch_size": 4}'
    with live_server(tmp_path, max_model_len=128, dtype="float32") as live:
        options = ["--url", live.url, "--task", "mood", "--data", str(data), "--test", str(data), "--config", config]
        *steps, _, _ = [
            line for line in run("train_task.py", *options) if line.startswith(("step", "live", "'good 0'"))
        ]
        assert [line.split(":")[0] for line in steps] == ["step 2", "step 4"]
        assert live.client.get("/prompts/mood").json()["version"] == 1


def test_the_harness_writes_and_chooses(server: LiveServer, tmp_path: Path) -> None:
    """In a fork that has imported torch and transformers, as the harness does; it does not describe the machine."""
    server.model.tokenizer.save_pretrained(tmp_path)
    brief = "import runpy, sys\nfrom lm_eval import evaluator\nevaluator.add_env_info = lambda results: None\n"
    code = f"{brief}sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    script, log = EXAMPLES / "evaluate_with_lm_eval.py", tmp_path / "log.txt"
    options = ["--url", server.url, "--task", TASK, "--tokenizer", str(tmp_path)]
    process = start_forked(code, [str(script), *options], dict(os.environ | OFFLINE), log)
    assert process.wait(120) == 0, log.read_text()
    written, chosen = [line for line in log.read_text().splitlines() if line.startswith(("written", "chosen"))]
    assert written.startswith("written {'exact_match,none': ")
    assert chosen.startswith("chosen {'acc,none': ")


def test_every_script_is_tested_documented_and_says_how_it_is_run() -> None:
    page = (EXAMPLES.parent / "docs" / "clients.md").read_text(encoding="utf-8")
    for script in EXAMPLES.glob("*.py"):
        assert f"../examples/{script.name}" in page
        assert f"python examples/{script.name}" in script.read_text(encoding="utf-8")
    assert {*CLIENTS, "evaluate_with_lm_eval.py", "train_task.py"} <= {script.name for script in EXAMPLES.glob("*.py")}
