"""Long work ends when nobody waits for it any more, and a bounded number waits."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable

import pytest

from server.errors import Overloaded
from server.executors import Executor
from server.long_work import Lane, run_long

CheckCancelled = Callable[[], None]


def executor() -> Executor:
    return Executor("test", "tests", threads=4, most_waiting=10)


def test_work_whose_caller_is_cancelled_ends_before_the_caller_does() -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(check_cancelled: CheckCancelled) -> None:
        begun.set()
        try:
            while True:
                check_cancelled()
                time.sleep(0.01)
        finally:
            ended.set()

    async def cancel() -> None:
        running = asyncio.ensure_future(run_long(executor(), work))
        await asyncio.to_thread(begun.wait, 10)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert ended.is_set()

    asyncio.run(asyncio.wait_for(cancel(), 20))


def test_work_whose_caller_is_cancelled_twice_leaves_no_error_behind() -> None:
    begun, released, ended = threading.Event(), threading.Event(), threading.Event()
    unseen: list[str] = []

    def work(check_cancelled: CheckCancelled) -> None:
        begun.set()
        released.wait(10)
        try:
            check_cancelled()
        finally:
            ended.set()

    async def cancel() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context["message"]))
        running = asyncio.ensure_future(run_long(executor(), work))
        await asyncio.to_thread(begun.wait, 10)
        running.cancel()
        await asyncio.sleep(0.05)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        released.set()
        await asyncio.to_thread(ended.wait, 10)
        await asyncio.sleep(0.05)
        gc.collect()

    asyncio.run(asyncio.wait_for(cancel(), 20))
    assert not unseen


def test_a_lane_does_one_thing_at_a_time_and_refuses_what_may_not_wait() -> None:
    at_once, most = 0, 0
    hold = threading.Event()

    def work(check_cancelled: CheckCancelled) -> int:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        hold.wait(10)
        at_once -= 1
        return 7

    async def crowd() -> None:
        lane = Lane(executor(), "tests", 2)
        running = [asyncio.ensure_future(lane.run(work)) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded, match="2 tests wait already"):
            await lane.run(work)
        running[2].cancel()
        await asyncio.sleep(0.05)
        running[2] = asyncio.ensure_future(lane.run(work))
        await asyncio.sleep(0.05)
        hold.set()
        assert await asyncio.gather(*running) == [7, 7, 7]
        assert await lane.run(work) == 7

    asyncio.run(asyncio.wait_for(crowd(), 20))
    assert most == 1


def test_what_work_raises_is_raised_by_its_caller() -> None:
    def work(check_cancelled: CheckCancelled) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(run_long(executor(), work))
