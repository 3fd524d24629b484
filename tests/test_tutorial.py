"""Every block of the tutorial is run in its order, on the embedded model, with fewer steps and rows than it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.processes import COMMAND, prelude_serve, start_forked
from tests.test_readme import prelude

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
LOOK, TRAIN, MEASURE, SERVE, ASK = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)


def bash(commands: str, folder: Path) -> str:
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=folder, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout without the soft prompts that ship."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def test_its_blocks_do_what_they_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert all(json.loads(line).keys() == {"input", "target"} for line in bash(LOOK, folder).splitlines())

    assert "--steps 120 --evaluations 6" in TRAIN
    program, *arguments = shlex.split(
        TRAIN.replace("--steps 120 --evaluations 6", "--steps 2 --evaluations 1 --lr 0.02")
    )
    assert program == ".venv/bin/prelude"
    log = folder / "train.log"
    there = f"import os\nos.chdir({str(folder)!r})\n"
    assert start_forked(there + COMMAND, arguments, dict(os.environ), log).wait(200) == 0, log.read_text()
    assert "prompts/tickets: validation exact match" in log.read_text()
    assert (folder / "prompts/tickets/adapter_model.safetensors").stat().st_size // 1000 == 46
    assert (folder / "prompts/tickets/loss.svg").exists()

    measured = prelude(f"{MEASURE.rstrip()} --limit 4")
    assert re.search(r"4-shot", measured)
    assert re.search(r"zero-shot", measured)

    assert shlex.split(SERVE) == [".venv/bin/prelude", "serve"]
    with prelude_serve(folder, there) as process:
        assert "http://127.0.0.1:8000/" in ASK
        answer = json.loads(bash(ASK.replace("http://127.0.0.1:8000", str(process.client.base_url)), folder))
    assert {choice["text"] for choice in answer["choices"]} == {"billing", "technical", "shipping"}
    assert answer["generated_text"] == max(answer["choices"], key=lambda choice: float(choice["probability"]))["text"]
