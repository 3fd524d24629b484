"""The thread that owns the engine. It runs commands between steps, steps while there is work, and sleeps otherwise.

An error in a request's command ends that request. An error in a step ends all requests in flight, and the engine then
tries a step of its own. If that fails too, for example because the error has destroyed the CUDA context, the engine has
failed permanently.
"""

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
"""Pauses before further attempts after a failed step."""

TICK_SECONDS = 1.0
"""How often the event loop ticks the clock."""
MOST_SECONDS = 5 * TICK_SECONDS
"""Maximum time that the clock counts between two ticks."""

Command = Callable[[], list[Delta]]
"""A function that runs between two steps."""


class RunningClock:
    """Counts the seconds in which the process runs, without pauses such as `docker pause`.

    A running process ticks it every `TICK_SECONDS`. Reading it is safe from any thread.
    """

    def __init__(self) -> None:
        self._looked = (0.0, time.monotonic())

    def now(self) -> float:
        """Seconds so far."""
        total, at = self._looked
        return total + min(time.monotonic() - at, MOST_SECONDS)

    def tick(self) -> None:
        """Count the time since the last tick. Only one thread may call it."""
        self._looked = (self.now(), time.monotonic())


class EngineThread(threading.Thread):
    """Runs the engine. Every added request gets exactly one last Delta, unless the engine fails permanently."""

    def __init__(
        self,
        engine: Engine,
        *,
        deliver: Callable[[list[Delta]], None],
        on_failure: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        """Wrap an engine, which no other thread may use once this one runs; the callbacks are called on this thread.

        `deliver` receives the deltas of a step or command; `on_failure` is called when the engine has failed
        permanently, and `on_end` when the thread ends.
        """
        super().__init__(name="engine", daemon=True)
        self._engine = engine
        self._deliver, self._on_failure, self._on_end = deliver, on_failure, on_end
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self.clock = RunningClock()
        self._turn_began: float | None = None  # None while the thread waits for work
        self._held: list[Delta] = []
        """The deltas of the last step, until the next one is launched."""
        engine.runner.on_launch = self._release
        self._num_threads = torch.get_num_threads()
        self._began = threading.Event()

    @property
    def turn_seconds(self) -> float:
        """Duration so far of the current turn; 0 while the thread waits for work."""
        began = self._turn_began  # read once, because the thread may change it
        return 0.0 if began is None else self.clock.now() - began

    def begin(self) -> None:
        """Start the thread, and let only this thread use torch's OpenMP threads."""
        self.start()
        self._began.wait()
        torch.set_num_threads(1)  # for the calling thread and all later threads

    def end(self) -> None:
        """End the thread after its current turn."""
        self._commands.put(None)

    def give_back_cores(self) -> None:
        """After the thread has ended: let later threads use OpenMP threads again."""
        torch.set_num_threads(self._num_threads)

    def add(self, request: GenerationRequest, soft_prompt: SoftPrompt | None, compiled: Compiled | None = None) -> None:
        """Accept a checked request and its compiled grammar."""

        def add() -> list[Delta]:
            held = () if compiled is None else (compiled,)
            self._engine.add(request, soft_prompt, *held)
            return []

        self._commands.put(partial(self._alone, request.request_id, add))

    def abort(self, request_id: str) -> None:
        """Abort a request, if it has not ended."""

        def abort() -> list[Delta]:
            delta = self._engine.abort(request_id)
            return [] if delta is None else [delta]

        self._commands.put(partial(self._alone, request_id, abort))

    def drop_unused(self, prefix_hashes: Iterable[str]) -> None:
        """Drop prefixes, each when the last sequence that uses it ends."""

        def drop() -> list[Delta]:
            try:
                self._engine.scheduler.drop_unused(prefix_hashes)
            except Exception:
                log.exception("unused prefixes stay until memory is needed")
            return []

        self._commands.put(drop)

    def run(self) -> None:
        """The thread's main function. If it ends with an error, `on_failure` and `on_end` are still called."""
        torch.set_num_threads(self._num_threads)
        torch.get_num_threads()  # fixes the number: a thread's first call takes the number that any thread has set last
        self._began.set()
        try:
            self._turns()
        except BaseException:  # any exception would end the thread silently
            log.exception("the engine has stopped; the server must be restarted")
            self._release()
            self._on_failure()
        finally:
            self._turn_began = None
            self._on_end()

    def _turns(self) -> None:
        """Alternate between commands and steps, until `end` is called.

        A step's deltas are delivered when the next step is launched. Sooner, the event loop would keep Python's lock
        while this thread needs it to prepare that step, and a core would wait.
        """
        while True:
            self._turn_began = None
            commands = self._take_commands()
            self._turn_began = self.clock.now()
            for command in commands:
                self._release()
                if command is None:
                    return
                self._deliver(self._guarded(command))
            deltas = self._guarded(self._engine.step)
            self._release()
            self._held = deltas
            if not self._engine.has_work:
                self._release()
                self._engine.check_integrity()

    def _release(self) -> None:
        """Deliver what is held."""
        held, self._held = self._held, []
        self._deliver(held)

    def _take_commands(self) -> list[Command | None]:
        """All queued commands; waits for one if the engine has no work."""
        commands = [] if self._engine.has_work else [self._commands.get()]
        while not self._commands.empty():
            commands.append(self._commands.get())
        return commands

    def _alone(self, request_id: str, command: Command) -> list[Delta]:
        """Run a command for one request; if it raises, only this request ends."""
        try:
            return command()
        except BaseException as exc:
            refuse_to_catch(exc)
            if not isinstance(exc, PreludeError):
                log.exception("a request fails; no other is affected")
            error = exc if isinstance(exc, PreludeError) else GenerationFailed("The engine failed on this request.")
            self._deliver([Delta(request_id, None, FinishReason.FAILED, error=error)])
        self._engine.forget(request_id)
        self._engine.check_integrity()  # raises, which ends all requests, if more than this request is affected
        return []

    def _guarded(self, work: Command) -> list[Delta]:
        """Run work; if it raises, all requests in flight end with an error and the engine continues empty."""
        try:
            return work()
        except BaseException as exc:
            refuse_to_catch(exc)
            log.exception("an engine step failed; all requests in flight end with an error")
            self._release()
            deltas = self._engine.fail_all(
                "The engine failed while it worked on this request; nothing else is affected."
            )
            try:
                self._try_out()
            finally:
                self._deliver(deltas)
        return []

    def _try_out(self) -> None:
        """Check that the engine can run a step; raises the error of the last attempt."""
        for pause in RETRY_SECONDS:
            try:
                return self._engine.try_out()
            except Exception:
                log.exception("the engine cannot take a step")
                self._engine.fail_all("The engine has failed.")
                time.sleep(pause)
        return self._engine.try_out()


def refuse_to_catch(exc: BaseException) -> None:
    """Re-raise exceptions that must end the thread; other BaseExceptions, such as a library's panic, are handled."""
    if isinstance(exc, SystemExit | KeyboardInterrupt):
        raise exc
