"""The command can be stopped at any time, as process 1 of a container too."""

from __future__ import annotations

import shutil
import subprocess
import sys

import psutil
import pytest

ISOLATED = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
"""Runs a command as process 1 of processes of its own."""
LOADS = """
import os, time
from server.__main__ import end_on_sigterm
end_on_sigterm()
print(os.getpid(), flush=True)
time.sleep(60)
"""


def can_isolate() -> bool:
    return shutil.which(ISOLATED[0]) is not None and (
        subprocess.run([*ISOLATED, "true"], check=False, capture_output=True, timeout=60).returncode == 0
    )


@pytest.mark.skipif(not can_isolate(), reason="needs Linux with namespaces of users and processes")
def test_a_sigterm_ends_process_1_while_it_loads() -> None:
    command = [*ISOLATED, sys.executable, "-c", LOADS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "1\n"
            (child,) = psutil.Process(process.pid).children()
            child.terminate()
            assert process.wait(30) == 128 + 15
        finally:
            process.kill()
