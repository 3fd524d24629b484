"""`prelude prompts`, on pipes and on terminals."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import tty
from contextlib import suppress
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from server.cli import app
from tests.api.live import Files, LiveServer
from tests.support import random_soft_prompt

ROOT = Path(__file__).parents[3]


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
        [sys.executable, "-m", "server", "prompts", *shlex.split(arguments)],
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
