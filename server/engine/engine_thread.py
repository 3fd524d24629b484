"""The one thread that owns the engine: commands between steps, steps while there is work, sleep otherwise.

What one request's command raises ends that request. What a step raises ends all that are in flight, and the engine
tries a step of its own: if it cannot take one any more, as after an error that took a CUDA context, it has failed for
good.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch

from server.contracts import Delta, FinishReason, GenerationRequest
from server.engine.engine import Engine
from server.engine.grammars.compiled import Compiled
from server.errors import GenerationFailed, PreludeError
from server.soft_prompts.soft_prompt import SoftPrompt

log = logging.getLogger(__name__)

RETRY_SECONDS = (0.1, 1.0)
"""Pauses between attempts at a step after one that failed."""

TICK_SECONDS = 1.0
"""How often the event loop looks at the clock."""
MOST_SECONDS = 5 * TICK_SECONDS
"""What the clock counts at most between two looks."""

Command = Callable[[], list[Delta]]
"""Runs between two steps."""


class RunningClock:
    """Counts the seconds in which the process runs: not those in which all of it is stopped, as by `docker pause`.

    A process that runs looks at it every `TICK_SECONDS`. Safe from any thread.
    """

    def __init__(self) -> None:
        self._looked = (0.0, time.monotonic())

    def now(self) -> float:
        """Seconds so far."""
        total, at = self._looked
        return total + min(time.monotonic() - at, MOST_SECONDS)

    def tick(self) -> None:
        """Look at it; one thread does."""
        self._looked = (self.now(), time.monotonic())


class EngineThread(threading.Thread):
    """Every request that is added gets exactly one last Delta, unless the engine fails for good."""

    def __init__(
        self,
        engine: Engine,
        *,
        deliver: Callable[[list[Delta]], None],
        on_failure: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        """Wrap an engine that nobody else touches once the thread runs.

        Args:
            engine: the engine.
            deliver: takes what a step or a command answers; called on this thread, as the others are.
            on_failure: the engine has failed for good.
            on_end: the thread ends.
        """
        super().__init__(name="engine", daemon=True)
        self._engine = engine
        self._deliver, self._on_failure, self._on_end = deliver, on_failure, on_end
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self.clock = RunningClock()
        self._turn_began: float | None = None  # None while the thread waits for something to do
        self._num_threads = torch.get_num_threads()
        self._began = threading.Event()

    @property
    def turn_seconds(self) -> float:
        """How long the turn lasts that the thread is at; 0 while there is nothing to do."""
        began = self._turn_began  # once: the thread sets it
        return 0.0 if began is None else self.clock.now() - began

    def begin(self) -> None:
        """Start the thread, and leave torch's helpers to it."""
        self.start()
        self._began.wait()
        torch.set_num_threads(1)  # for this thread and for all that come

    def end(self) -> None:
        """Let the thread end after its turn."""
        self._commands.put(None)

    def give_back_cores(self) -> None:
        """Once it has ended: let torch's next threads have helpers again."""
        torch.set_num_threads(self._num_threads)

    def add(self, request: GenerationRequest, soft_prompt: SoftPrompt | None, compiled: Compiled | None = None) -> None:
        """Accept a checked request, and the grammar that is held for it."""

        def add() -> list[Delta]:
            held = () if compiled is None else (compiled,)
            self._engine.add(request, soft_prompt, *held)
            return []

        self._commands.put(partial(self._alone, request.request_id, add))

    def abort(self, request_id: str) -> None:
        """End a request, if it has not ended."""

        def abort() -> list[Delta]:
            delta = self._engine.abort(request_id)
            return [] if delta is None else [delta]

        self._commands.put(partial(self._alone, request_id, abort))

    def drop_unused(self, prefix_hashes: Iterable[str]) -> None:
        """Forget prefixes, each as the last sequence that uses it ends."""

        def drop() -> list[Delta]:
            try:
                self._engine.scheduler.drop_unused(prefix_hashes)
            except Exception:
                log.exception("unused prefixes stay until memory is needed")
            return []

        self._commands.put(drop)

    def run(self) -> None:
        """The thread's work. If it ends by an error, nobody is left waiting for it."""
        torch.set_num_threads(self._num_threads)
        torch.get_num_threads()  # a thread that has not asked yet takes the number that was set last, by any thread
        self._began.set()
        try:
            self._turns()
        except BaseException:  # whatever it is, it would end the thread without a word
            log.exception("the engine has stopped; the server must be restarted")
            self._on_failure()
        finally:
            self._turn_began = None
            self._on_end()

    def _turns(self) -> None:
        """Commands, a step, commands, a step, until told to stop."""
        while True:
            self._turn_began = None
            commands = self._take_commands()
            self._turn_began = self.clock.now()
            for command in commands:
                if command is None:
                    return
                self._guarded(command)
            self._guarded(self._engine.step)
            if not self._engine.has_work:
                self._engine.check_integrity()

    def _take_commands(self) -> list[Command | None]:
        """All commands that have come; waits for one if there is nothing else to do."""
        commands = [] if self._engine.has_work else [self._commands.get()]
        while not self._commands.empty():
            commands.append(self._commands.get())
        return commands

    def _alone(self, request_id: str, command: Command) -> list[Delta]:
        """Run a command for one request; if it raises, this request ends by it and no other."""
        try:
            return command()
        except BaseException as exc:
            refuse_to_catch(exc)
            if not isinstance(exc, PreludeError):
                log.exception("a request fails; no other is affected")
            error = exc if isinstance(exc, PreludeError) else GenerationFailed("The engine failed on this request.")
            self._deliver([Delta(request_id, None, FinishReason.FAILED, error=error)])
        self._engine.forget(request_id)
        self._engine.check_integrity()  # raises, and so ends all, if more than this request is lost
        return []

    def _guarded(self, work: Command) -> None:
        """Do a piece of work; if it raises, everybody in flight gets an error and the engine goes on empty."""
        try:
            deltas = work()
        except BaseException as exc:
            refuse_to_catch(exc)
            log.exception("an engine step failed; all requests in flight end with an error")
            message = "The engine failed while it worked on this request; nothing else is affected."
            deltas = self._engine.fail_all(message)
            try:
                self._try_out()
            finally:
                self._deliver(deltas)
        else:
            self._deliver(deltas)

    def _try_out(self) -> None:
        """See whether the engine can take a step.

        Raises:
            Exception: it cannot, however often it is tried.
        """
        for pause in RETRY_SECONDS:
            try:
                self._engine.try_out()
            except Exception:
                log.exception("the engine cannot take a step")
                self._engine.fail_all("The engine has failed.")
                time.sleep(pause)
            else:
                return
        self._engine.try_out()


def refuse_to_catch(exc: BaseException) -> None:
    """Raise again what is to end the thread; a panic in a library is no Exception either, and is to be caught."""
    if isinstance(exc, SystemExit | KeyboardInterrupt):
        raise exc
