"""A step's deltas are delivered while the next step computes, each once and in order, whatever comes between."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from server.contracts import Delta, Token
from server.engine.engine import Engine
from server.engine.engine_thread import EngineThread


def delta(text: str) -> Delta:
    return Delta("one", Token(1, text, 0, None, False, ()), None)


class Scripted:
    """An engine whose steps are given; each is called with what the real engine calls at a step's launch."""

    def __init__(self, *steps: Callable[[Callable[[], None]], list[Delta]]) -> None:
        self._steps = [*steps]
        self.runner = SimpleNamespace(on_launch=lambda: None)

    @property
    def has_work(self) -> bool:
        return bool(self._steps)

    def step(self) -> list[Delta]:
        return self._steps.pop(0)(self.runner.on_launch) if self._steps else []

    def abort(self, request_id: str) -> Delta:
        return delta("aborted")

    def fail_all(self, message: str) -> list[Delta]:
        self._steps.clear()
        return [delta("failed")]

    def try_out(self) -> None:
        pass

    def check_integrity(self) -> None:
        pass


def started(*steps: Callable[[Callable[[], None]], list[Delta]], delivered: list[str]) -> EngineThread:
    """A thread that will run these steps; it adds the texts of what it delivers to `delivered`."""
    return EngineThread(
        cast(Engine, cast(Any, Scripted(*steps))),
        deliver=lambda deltas: delivered.extend(one.token.text for one in deltas if one.token is not None),
        on_failure=lambda: None,
        on_end=lambda: None,
    )


def run(thread: EngineThread, has_ended: threading.Event) -> None:
    """Run a thread until its last step has run."""
    thread.begin()
    assert has_ended.wait(30)
    thread.end()
    thread.join(30)
    thread.give_back_cores()
    assert not thread.is_alive()


def test_a_steps_deltas_arrive_at_the_launch_of_the_next_step_or_at_the_end() -> None:
    delivered: list[str] = []
    seen: list[list[str]] = []
    has_ended = threading.Event()

    def second(launch: Callable[[], None]) -> list[Delta]:
        seen.append([*delivered])
        launch()
        seen.append([*delivered])
        has_ended.set()
        return [delta("b")]

    run(started(lambda _: [delta("a")], second, delivered=delivered), has_ended)
    assert seen == [[], ["a"]]
    assert delivered == ["a", "b"]


def test_deltas_precede_those_of_a_later_command_and_of_a_failure() -> None:
    delivered: list[str] = []
    has_ended = threading.Event()
    thread: EngineThread

    def first(_: Callable[[], None]) -> list[Delta]:
        thread.abort("one")
        return [delta("a")]

    def second(_: Callable[[], None]) -> list[Delta]:
        return [delta("b")]

    def third(_: Callable[[], None]) -> list[Delta]:
        has_ended.set()
        raise RuntimeError("a step fails")

    thread = started(first, second, third, delivered=delivered)
    run(thread, has_ended)
    assert delivered == ["a", "aborted", "b", "failed"]
