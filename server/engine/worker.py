"""From asyncio into the one engine thread and back.

The thread owns the engine: it takes commands between steps, steps while there is work, and sleeps otherwise. Results
cross to the event loop once per step. Every accepted request gets exactly one last Delta, whatever happens: its own
end, an abort, or a step that failed.

It is also the only thread for which torch works on several cores. Every thread that did would get helpers of its own
from OpenMP, and once there are more helpers than cores they sleep between any two operations instead of being ready
for the next one: the same step takes a third longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable

import torch

from server.core import Delta, FinishReason, GenerationRequest, ModelSpec, SamplingParams
from server.engine.admission import Admission, Limits
from server.engine.engine import Engine
from server.engine.kv_cache import SlotAllocator
from server.engine.prefix_cache import PrefixCache
from server.engine.text import ModelText
from server.errors import (
    GenerationFailed,
    InvalidSoftPrompt,
    NotFinite,
    RequestAborted,
    RequestTimedOut,
    ServerDraining,
)
from server.executors import Executor, for_texts
from server.soft_prompts.soft_prompt import SoftPrompt

log = logging.getLogger(__name__)

STUCK_SECONDS = 60.0
"""A step takes far less; an engine that needs longer does not answer."""

READ_SECONDS = 2.0
"""How long those who wait may take to read how their request ended; a client that reads nothing holds up nobody."""

STOP_SECONDS = 1.0
"""How long the thread may take to end: a step on a device that hangs never does."""

UNLIMITED = 4096
"""Long texts that may wait to be tokenised where no limit on requests in flight is set."""

Command = Callable[[], list[Delta]]
"""Runs on the engine thread, between two steps."""


class EngineWorker:
    """The engine's thread and the streams of those who wait for it."""

    def __init__(self, engine: Engine, limits: Limits | None = None) -> None:
        """Wrap an engine that nobody else touches from now on; without limits it takes whatever comes."""
        self._engine = engine
        self._limits = limits or Limits()
        self._admission = Admission(self._limits)
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[Delta]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_turn = time.monotonic()
        self._failed = False
        self._num_threads = torch.get_num_threads()
        self._began = threading.Event()
        self._ended = asyncio.Event()
        self.draining = False
        self.threads: Executor = for_texts(self._limits.in_flight or UNLIMITED)
        """Tokenises what is too long for the event loop's thread."""

    @property
    def model(self) -> ModelSpec:
        """What may be known of the frozen model."""
        return self._engine.model.spec

    @property
    def responsive(self) -> bool:
        """True while the engine's thread runs and, if there is work, its last turn is not long ago."""
        stuck = bool(self._streams) and time.monotonic() - self._last_turn > STUCK_SECONDS
        return self._thread.is_alive() and not self._failed and not stuck

    @property
    def num_in_flight(self) -> int:
        """Accepted requests that have not ended."""
        return len(self._streams)

    @property
    def num_running(self) -> int:
        """Choices that have a slot."""
        return len(self._engine.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Choices that wait for one."""
        return len(self._engine.scheduler.waiting)

    @property
    def num_steps(self) -> int:
        """Forwards so far."""
        return self._engine.steps

    @property
    def slots(self) -> SlotAllocator:
        """The engine's; off its thread, only to be read."""
        return self._engine.kv_cache.allocator

    @property
    def prefixes(self) -> PrefixCache:
        """The engine's; off its thread, only for what may be read at any time: the counters and the budget."""
        return self._engine.prefixes

    @property
    def text(self) -> ModelText:
        """The model's texts and tokens."""
        return self._engine.text

    def check(self, request: GenerationRequest, soft_prompt: SoftPrompt | None) -> None:
        """Refuse what can never run; safe from any thread.

        Raises:
            EmptyInput, InputTooLong: as the engine's.
        """
        self._engine.check(request, soft_prompt)

    def start(self, is_wanted: Callable[[str], bool] = lambda prefix_hash: True) -> None:
        """Start the thread; results go to the running event loop.

        Args:
            is_wanted: whether a prefix may outlive the last sequence that uses it; asked on the engine's thread.
        """
        self._engine.scheduler.is_wanted = is_wanted
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._began.wait()
        torch.set_num_threads(1)  # for this thread and for all that come

    async def generate(self, request: GenerationRequest, soft_prompt: SoftPrompt | None) -> AsyncGenerator[Delta]:
        """Submit a request and yield what every step adds to it; closing the iterator early aborts it.

        Raises:
            EmptyInput, InputTooLong: it can never run.
            InvalidRequest: its grammar cannot be used.
            Overloaded: too much is waiting already, in all, for its task or for its key.
            ServerDraining: nothing new is taken.
            RequestAborted: it was cancelled by the server.
            RequestTimedOut: it took too long.
            GenerationFailed: the engine could not finish it.
        """
        self._refuse_if_closed()
        self._engine.check(request, soft_prompt)
        if (grammar := self._engine.grammar_of(request)) is not None:  # compiled before the engine wants it
            await asyncio.to_thread(self._engine.grammars.check, grammar)
        with self._admission.of(request):
            async with contextlib.aclosing(self._deltas(request, soft_prompt)) as deltas:
                async for delta in deltas:
                    yield delta

    async def _deltas(self, request: GenerationRequest, soft_prompt: SoftPrompt | None) -> AsyncGenerator[Delta]:
        """What `generate` yields of a checked request, whatever the limits are."""
        self._refuse_if_closed()
        stream: asyncio.Queue[Delta] = asyncio.Queue()
        assert request.request_id not in self._streams, "request ids are unique"
        self._streams[request.request_id] = stream
        self._idle.clear()
        self._send(lambda: self._add(request, soft_prompt))
        timer = self._timer(request, stream)
        ended = False
        try:
            while not ended:
                delta = await stream.get()
                if isinstance(delta.error, RequestTimedOut):
                    raise delta.error
                ended = delta.finish_reason is not None and delta.is_last
                if delta.finish_reason is FinishReason.ABORTED:
                    raise RequestAborted("The request was cancelled before its end.")
                if delta.finish_reason is FinishReason.FAILED:
                    raise delta.error or GenerationFailed("The engine could not finish the request.")
                yield delta
        finally:
            if timer is not None:
                timer.cancel()
            del self._streams[request.request_id]
            if not self._streams:
                self._idle.set()
            if not ended:
                self._send(lambda: self._abort(request.request_id))

    def _refuse_if_closed(self) -> None:
        if self.draining:
            raise ServerDraining("The server is shutting down.")
        if self._failed:
            raise GenerationFailed("The engine has stopped.", remedy="Restart the server; its log says why.")

    def _timer(self, request: GenerationRequest, stream: asyncio.Queue[Delta]) -> asyncio.TimerHandle | None:
        """Ends the wait for a request that takes too long, through the queue that it waits on."""
        seconds = self._limits.request_timeout
        if seconds is None:
            return None
        error = RequestTimedOut(f"The request was not done after {seconds:g} s.")
        late = Delta(request.request_id, None, FinishReason.FAILED, error=error)
        return asyncio.get_running_loop().call_later(seconds, stream.put_nowait, late)

    def warm(self, soft_prompts: Iterable[SoftPrompt]) -> None:
        """Compute prefixes that are not known yet; blocks, so not for the event loop's thread.

        Each is an ordinary request of one token, in its own turn: the prefix is left behind as by any first request,
        and the token shows that what comes after the prefix is finite too.

        Raises:
            InvalidSoftPrompt: what the model makes of one is not finite.
            ServerDraining, RequestAborted, GenerationFailed: as `generate`.
        """
        assert self._loop is not None, "the worker runs before anything is published"
        asyncio.run_coroutine_threadsafe(self._warm_all(soft_prompts), self._loop).result()

    def drop_unused(self, prefix_hashes: Iterable[str]) -> None:
        """Forget prefixes, each as the last sequence that uses it ends."""
        hashes = tuple(prefix_hashes)
        if hashes:
            self._send(lambda: self._drop_unused(hashes))

    async def _warm_all(self, soft_prompts: Iterable[SoftPrompt]) -> None:
        await asyncio.gather(*(self._warm(soft_prompt) for soft_prompt in soft_prompts))

    async def _warm(self, soft_prompt: SoftPrompt) -> None:
        request_id = f"warm-{uuid.uuid4().hex}"
        request = GenerationRequest(request_id, (0,), SamplingParams(max_new_tokens=1, ignore_eos=True), request_id)
        try:
            async for _ in self._deltas(request, soft_prompt):
                pass
        except NotFinite as exc:
            raise InvalidSoftPrompt(
                "The model cannot use this soft prompt: what it makes of it is not finite.",
                remedy="Train again with a lower learning rate or with gradient clipping, or serve in float32.",
            ) from exc

    async def drain(self, seconds: float) -> None:
        """Take nothing new, let what runs finish for so long, then abort what is left."""
        self.draining = True
        if await self._idle_within(seconds):
            return
        log.warning("%d requests did not finish within %g s; they are aborted", len(self._streams), seconds)
        for request_id in list(self._streams):
            self._send(lambda request_id=request_id: self._abort(request_id))  # type: ignore[misc]
        await self._idle_within(READ_SECONDS)

    async def stop(self) -> None:
        """End the thread; what is still in flight is aborted."""
        await self.drain(0)
        self._commands.put(None)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), STOP_SECONDS)
        if not self._ended.is_set():
            log.error("the engine's thread does not end; it is left behind")
        torch.set_num_threads(self._num_threads)

    async def _idle_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return self._idle.is_set()

    def _send(self, command: Command) -> None:
        self._commands.put(command)

    def _add(self, request: GenerationRequest, soft_prompt: SoftPrompt | None) -> list[Delta]:
        self._engine.add(request, soft_prompt)
        return []

    def _drop_unused(self, prefix_hashes: Iterable[str]) -> list[Delta]:
        self._engine.scheduler.drop_unused(prefix_hashes)
        return []

    def _abort(self, request_id: str) -> list[Delta]:
        delta = self._engine.abort(request_id)
        return [] if delta is None else [delta]

    def _run(self) -> None:
        """The thread. If it ends by an error, which is our bug, nobody is left waiting for it."""
        torch.set_num_threads(self._num_threads)
        torch.get_num_threads()  # a thread that has not asked yet takes the number that was set last, by any thread
        self._began.set()
        try:
            self._turns()
        except Exception:
            log.exception("the engine has stopped; the server must be restarted")
            self._on_loop(self._fail_streams)
        finally:
            self._on_loop(self._ended.set)

    def _turns(self) -> None:
        """Commands, a step, commands, a step, until told to stop."""
        while True:
            commands = self._take_commands()
            self._last_turn = time.monotonic()
            for command in commands:
                if command is None:
                    return
                self._deliver(self._guarded(command))
            self._deliver(self._guarded(self._engine.step))
            if not self._engine.has_work:
                self._engine.check_integrity()

    def _take_commands(self) -> list[Command | None]:
        """All commands that have come; waits for one if there is nothing else to do."""
        commands = [] if self._engine.has_work else [self._commands.get()]
        while not self._commands.empty():
            commands.append(self._commands.get())
        return commands

    def _guarded(self, work: Command) -> list[Delta]:
        """Do a piece of work; if it raises, everybody in flight gets an error and the engine goes on empty."""
        try:
            return work()
        except Exception:
            log.exception("an engine step failed; all requests in flight end with an error")
            return self._engine.fail_all("The engine failed while it worked on this request; nothing else is affected.")

    def _deliver(self, deltas: list[Delta]) -> None:
        if deltas:
            self._on_loop(lambda: self._hand_out(deltas))

    def _on_loop(self, work: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work)

    def _hand_out(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is not None:
                stream.put_nowait(delta)

    def _fail_streams(self) -> None:
        self._failed = True
        self._hand_out(
            [
                Delta(request_id, None, FinishReason.FAILED, error=GenerationFailed("The engine has stopped."))
                for request_id in self._streams
            ]
        )
