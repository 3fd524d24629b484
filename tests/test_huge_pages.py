"""The command asks Linux for huge pages where Linux gives them on request, and changes nothing else."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from server.huge_pages import HUGE_PAGES, POLICY, TUNABLES, ask_for_huge_pages

ON_REQUEST = "always [madvise] never\n"
REPORT = """
import json, os, sys
from pathlib import Path
from server.huge_pages import restart_with_huge_pages
restart_with_huge_pages(Path(sys.argv[1]))
memory = bytearray(2**26)
memory[::4096] = bytes([1]) * (2**26 // 4096)
huge = [int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")]
tunables, typed = os.environ["GLIBC_TUNABLES"], sys.stdin.read()
print(json.dumps([os.getpid(), sys.argv[2:], sys.flags.optimize, typed, tunables, *huge]))
"""


def knows_the_tunable() -> bool:
    library, version = platform.libc_ver()
    return library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "enabled"
    path.write_text(ON_REQUEST)
    return path


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, f"{HUGE_PAGES}=1"), ("glibc.malloc.arena_max=2", f"glibc.malloc.arena_max=2:{HUGE_PAGES}=1")],
)
def test_the_request_is_added_to_what_the_user_has_set(
    before: str | None, after: str, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TUNABLES, before or "")
    assert ask_for_huge_pages(policy)
    assert os.environ[TUNABLES] == after
    assert not ask_for_huge_pages(policy), "a process restarts once"


def test_a_choice_of_the_user_stays(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TUNABLES, f"{HUGE_PAGES}=0")
    assert not ask_for_huge_pages(policy)
    assert os.environ[TUNABLES] == f"{HUGE_PAGES}=0"


@pytest.mark.parametrize("content", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_where_a_request_changes_nothing_none_is_made(
    content: str | None, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TUNABLES, raising=False)
    policy.unlink() if content is None else policy.write_text(content)
    assert not ask_for_huge_pages(policy)
    assert TUNABLES not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked")
def test_the_restarted_process_is_the_same_one_with_huge_pages(policy: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    command = [sys.executable, "-O", "-c", REPORT, str(policy), "serve", "a b"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        out, _ = process.communicate("typed")
    number, arguments, optimize, typed, tunables, huge = json.loads(out)
    assert (number, arguments, optimize, typed) == (process.pid, ["serve", "a b"], 1, "typed")
    assert tunables == f"{HUGE_PAGES}=1"
    if POLICY.exists() and "[madvise]" in POLICY.read_text() and knows_the_tunable():
        assert huge > 2**15, "kilobytes, of 65,536"
