"""Prometheus's own tool, which judges metrics and rules; it is one binary of Debian's package `prometheus`."""

from __future__ import annotations

import shutil
import subprocess

import pytest

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian, Ubuntu: apt install prometheus)"
)


def promtool(*arguments: str, stdin: bytes = b"") -> str:
    """What it says; it must be content."""
    done = subprocess.run(["promtool", *arguments], input=stdin, capture_output=True, check=False, timeout=60)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said
