"""Every block of the tutorial is run in its order, on the embedded model, with fewer steps and rows than it says."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_readme import prelude, wait_until_ready

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
    """A checkout without the soft prompts that ship, in which the first three blocks were run."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def test_its_blocks_do_what_they_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert all(json.loads(line).keys() == {"input", "target"} for line in bash(LOOK, folder).splitlines())

    assert "--steps 120 --evaluations 6" in TRAIN
    short = TRAIN.replace("--steps 120 --evaluations 6", "--steps 2 --evaluations 1 --lr 0.02")
    assert "prompts/tickets: validation exact match" in bash(short, folder)
    assert (folder / "prompts/tickets/adapter_model.safetensors").stat().st_size // 1000 == 46
    assert (folder / "prompts/tickets/loss.svg").exists()

    measured = prelude(f"{MEASURE.rstrip()} --limit 4")
    assert re.search(r"4-shot", measured)
    assert re.search(r"zero-shot", measured)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {SERVE}"],
            cwd=folder,
            env=os.environ | {"PRELUDE_PORT": str(port)},
            stdout=log,
            stderr=log,
            process_group=0,
        )
    try:
        wait_until_ready(port, server)
        answer = json.loads(bash(ASK.replace("127.0.0.1:8000", f"127.0.0.1:{port}"), folder))
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        assert server.wait(60) in (0, -signal.SIGTERM, 143)
    assert {choice["text"] for choice in answer["choices"]} == {"billing", "technical", "shipping"}
    assert answer["generated_text"] == max(answer["choices"], key=lambda choice: float(choice["probability"]))["text"]
