"""`make run` installs what a server needs and no more; `make test` and `make lint` add the tools of development."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def commands(target: str, venv: Path) -> list[str]:
    """What make would run for a target where nothing is installed yet."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    run = subprocess.run(
        ["make", "--dry-run", target, f"VENV={venv}"], cwd=ROOT, env=environ, capture_output=True, check=True, text=True
    )
    return run.stdout.splitlines()


@pytest.mark.parametrize("target", ["run", "setup"])
def test_a_server_is_installed_without_the_tools_of_development(target: str, tmp_path: Path) -> None:
    installs = [line for line in commands(target, tmp_path) if "pip install" in line and "nodejs" not in line]
    assert installs
    assert all("-c constraints.txt" in line and "--no-compile" in line for line in installs)
    assert '".[store,train]"' in installs[-1]
    assert not any("dev" in line for line in installs)


@pytest.mark.parametrize(
    "target", ["test", "lint", "coverage", "test-image", "soak", "bench", "bench-gpu", "setup-dev"]
)
def test_the_tools_of_development_are_added_where_they_are_used(target: str, tmp_path: Path) -> None:
    run = commands(target, tmp_path)
    added = [number for number, line in enumerate(run) if ',dev]"' in line]
    served = [number for number, line in enumerate(run) if '".[store,train]"' in line]
    assert len(added) == len(served) == 1
    assert served < added


def test_what_a_start_imports_is_compiled_even_where_python_would_not_write_it(tmp_path: Path) -> None:
    assert any(
        line.startswith("env -u PYTHONDONTWRITEBYTECODE") and " server.serve" in line
        for line in commands("run", tmp_path)
    )


def test_a_page_that_cannot_be_built_does_not_keep_the_server_from_starting(tmp_path: Path) -> None:
    build, stamp, start = commands("run", tmp_path)[-3:]
    assert "npm.py build ||" in build
    assert stamp.startswith("touch")
    assert "prelude serve" in start
    assert not any("npm" in line for line in commands("setup", tmp_path))
