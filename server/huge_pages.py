"""Lets Linux back this process's memory with pages of 2 MiB instead of 4 KiB.

A step on a CPU reads all weights. Memory of 4 KiB pages needs 512 times as many address translations, and on a virtual
machine each of them is a walk through two page tables. There, steps took 1.6 to 2.1 times as long as with huge pages,
and their time varied from hour to hour (`benchmarks/RESULTS.md`). Many distributions give huge pages only to memory
that a program asks them for. glibc's malloc, from which torch, numpy and oneDNN take theirs, asks if one of its
tunables says so, and reads its tunables only when a process starts.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"
"""1 lets malloc ask for huge pages. glibc knows it since 2.35; other C libraries ignore the variable."""


def restart_with_huge_pages(policy: Path = POLICY) -> None:
    """Start this process's program again with huge pages, unless they need no request or the user has chosen.

    The process keeps its number and its open files. Call it before anything else: what was done until then is lost.
    """
    if not ask_for_huge_pages(policy) or not sys.executable:
        return
    with contextlib.suppress(OSError):  # works without them
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - this very program


def ask_for_huge_pages(policy: Path = POLICY) -> bool:
    """Let processes that this one starts use huge pages; returns whether that changed the environment.

    Linux shows its policy as `always [madvise] never`, the one in force in brackets: `madvise` gives huge pages on
    request. A value that the user has set stays.
    """
    tunables = os.environ.get(TUNABLES, "")
    if HUGE_PAGES in tunables:
        return False
    try:
        on_request = "[madvise]" in policy.read_text()
    except OSError:  # not Linux, or a kernel without huge pages
        return False
    if on_request:
        os.environ[TUNABLES] = ":".join(filter(None, (tunables, f"{HUGE_PAGES}=1")))
    return on_request
