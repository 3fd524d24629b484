"""Threads beside the event loop: bounded in number and in what waits, and never waited for at the end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from server.errors import Overloaded
from server.executors import Executor


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What hangs waits for it."""
    gate = threading.Event()
    yield gate
    gate.set()


async def test_work_returns_its_result_or_raises_its_error() -> None:
    executor = Executor("test", "tests", threads=2, most_waiting=10)
    assert await executor.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await executor.run(divmod, 7, 0)


async def test_no_more_threads_run_and_no_more_work_waits_than_was_said(gate: threading.Event) -> None:
    executor = Executor("bounded", "tests", threads=2, most_waiting=3)
    hung = [asyncio.wrap_future(executor.submit(gate.wait)) for _ in range(5)]  # however fast they come
    with pytest.raises(Overloaded, match="3 tests wait already"):
        await executor.run(gate.wait)
    assert sum(thread.name == "bounded" for thread in threading.enumerate()) == 2
    hung[4].cancel()  # what nobody waits for any more leaves its place to the next one
    await asyncio.sleep(0)
    hung.append(asyncio.wrap_future(executor.submit(gate.wait)))
    gate.set()
    assert await asyncio.gather(*hung[:4], hung[5]) == [True] * 5


async def test_one_pool_that_hangs_holds_up_no_other(gate: threading.Event) -> None:
    changes = Executor("changes", "changes", threads=2, most_waiting=10)
    texts = Executor("texts", "texts", threads=2, most_waiting=10)
    hung = [asyncio.ensure_future(changes.run(gate.wait)) for _ in range(6)]
    assert await asyncio.wait_for(texts.run(len, "text"), 5) == 4
    gate.set()
    await asyncio.gather(*hung)


async def test_threads_end_when_nothing_waits() -> None:
    executor = Executor("ends", "tests", threads=4, most_waiting=10)
    await asyncio.gather(*(executor.run(time.sleep, 0.01) for _ in range(8)))
    for _ in range(500):
        if not any(thread.name == "ends" for thread in threading.enumerate()):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("a thread is left")


def test_a_process_ends_although_work_hangs() -> None:
    program = (
        "import asyncio, threading\n"
        "from server.executors import Executor\n"
        "async def main():\n"
        "    hung = asyncio.ensure_future(Executor('x', 'x', threads=1, most_waiting=1).run(threading.Event().wait))\n"
        "    await asyncio.sleep(0.05)\n"
        "    hung.cancel()\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
