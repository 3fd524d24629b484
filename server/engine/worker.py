"""Connects asyncio with the engine's thread.

Results are passed to the event loop once per step. Every accepted request gets exactly one last Delta, whether it
finishes, is aborted, or its step or the engine fails.

The engine's thread is also the only one in which torch uses several cores: with a team of helpers for each thread,
OpenMP's helpers would sleep between operations, and a step would take a third longer.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator

from server.contracts import Delta, FinishReason, GenerationRequest, SamplingParams
from server.engine.admission_control import Admission, Limits
from server.engine.engine import Engine
from server.engine.engine_thread import TICK_SECONDS, EngineThread
from server.engine.grammars.compile_queue import GrammarQueue
from server.engine.unread_deltas import Stream, Streams
from server.errors import (
    GenerationFailed,
    InvalidSoftPrompt,
    NotFinite,
    RequestAborted,
    RequestTimedOut,
    ServerDraining,
)
from server.executors import for_texts
from server.soft_prompts.soft_prompt import SoftPrompt

log = logging.getLogger(__name__)

STUCK_SECONDS = 60.0
"""An engine whose turn takes longer counts as unresponsive; a normal step takes far less."""

LOST_SECONDS = 300.0
"""A step that takes longer is assumed never to end; the server must be restarted."""

RESTART = "Send the request to another replica, or again after the server has restarted; its log gives the reason."

READ_SECONDS = 2.0
"""How long shutdown waits for clients to read how their requests ended; clients that read nothing do not block it."""

STOP_SECONDS = 1.0
"""How long to wait for the thread to end; a step on a device that hangs never ends."""

UNLIMITED = 4096
"""Maximum number of long texts that wait to be tokenised if the number of requests in flight is not limited."""


class EngineWorker:
    """The engine's thread, and the streams of the requests in flight.

    Attributes:
        model: facts about the frozen model.
        text: converts between texts and tokens.
        frozen: the model itself, for work beside the engine; its forward may run on another thread.
        embeddings_of: input embeddings `[tokens, hidden_size]` of token ids; safe from any thread.
        check: refuses a request that can never run, see `check_request`; safe from any thread.
        scheduler, slots, prefixes: the engine's; other threads may only read counters and budgets.
        request_timeout: time limit of a request in seconds; None for no limit.
        draining: whether no new requests are accepted.
        threads: tokenises texts that are too long for the event loop's thread.
    """

    def __init__(self, engine: Engine, limits: Limits | None = None) -> None:
        """Wrap an engine, which must not be used otherwise; without `limits` it accepts any number of requests."""
        self._engine = engine
        self.model, self.text, self.frozen = engine.model.spec, engine.model.text, engine.model
        self.embeddings_of, self.check = engine.model.embeddings_of, engine.check
        self.scheduler, self.slots, self.prefixes = engine.scheduler, engine.kv_cache.allocator, engine.prefixes
        limits = limits or Limits()
        self.request_timeout = limits.request_timeout
        self._admission = Admission(limits)
        self._grammars = GrammarQueue(engine.grammars)
        self._streams = Streams()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()
        self._ticking: asyncio.TimerHandle | None = None
        self._thread = EngineThread(
            engine,
            deliver=self._deliver,
            on_failure=lambda: self._on_loop(self._fail),
            on_end=lambda: self._on_loop(self._ended.set),
        )
        self._failed = False
        self.draining = False
        self.threads = for_texts(limits.in_flight or UNLIMITED)

    @property
    def responsive(self) -> bool:
        """True while the engine's thread runs and its current turn, if any, has not exceeded `STUCK_SECONDS`."""
        return self._thread.is_alive() and not self._failed and self._thread.turn_seconds <= STUCK_SECONDS

    @property
    def has_failed(self) -> bool:
        """True once the engine has failed permanently and the server must be restarted; its requests have ended."""
        if not self._failed and self._thread.turn_seconds > LOST_SECONDS:
            log.error("an engine step has not ended after %g s; the server must be restarted", LOST_SECONDS)
            self._fail()
        return self._failed

    @property
    def num_in_flight(self) -> int:
        """Accepted requests that have not ended."""
        return len(self._streams)

    @property
    def num_steps(self) -> int:
        """Number of steps so far."""
        return self._engine.steps

    def start(self, is_wanted: Callable[[str], bool] = lambda prefix_hash: True) -> None:
        """Start the thread; results are passed to the running event loop.

        The engine's thread calls `is_wanted` to ask whether a prefix may outlive the last sequence that uses it.
        """
        self.scheduler.is_wanted = is_wanted
        self._loop = asyncio.get_running_loop()
        self._thread.begin()
        self._tick()

    def _tick(self) -> None:
        self._thread.clock.tick()
        if self._loop is not None and not self._ended.is_set():
            self._ticking = self._loop.call_later(TICK_SECONDS, self._tick)

    async def generate(
        self, request: GenerationRequest, soft_prompt: SoftPrompt | None, *, seconds: float = 0.0
    ) -> AsyncGenerator[Delta]:
        """Submit a request and yield its deltas; closing the iterator early aborts it.

        Args:
            request: the request.
            soft_prompt: its virtual tokens precede the input.
            seconds: time that the request has already used of its time limit.

        Raises:
            EmptyInput, InputTooLong: the request can never run.
            InvalidRequest: its grammar cannot be used.
            Overloaded: too many requests are waiting in total, for its task or for its key.
            ServerDraining: the server accepts no new requests.
            RequestAborted: the server cancelled the request, for example because its deltas were not read.
            RequestTimedOut: the request took too long.
            GenerationFailed: the engine could not finish the request.
        """
        self._refuse_if_closed(request)
        self.check(request, soft_prompt)
        with self._admission.of(request) as leave:  # called with the last delta, read or not
            async with contextlib.aclosing(self._deltas(request, soft_prompt, leave, seconds)) as deltas:
                async for delta in deltas:
                    yield delta

    @contextlib.contextmanager
    def holding(self, request: GenerationRequest) -> Iterator[None]:
        """Context manager: count a request until the block ends, so that its parts (`is_part`) need no admission.

        A shutdown waits for the block as for any accepted request.

        Raises:
            Overloaded, ServerDraining, GenerationFailed: see `generate`.
        """
        self._refuse_if_closed(request)
        with self._admission.of(request), self._streams.open(f"held-{request.request_id}", lambda: None):
            yield

    async def _deltas(
        self,
        request: GenerationRequest,
        soft_prompt: SoftPrompt | None,
        on_end: Callable[[], None] = lambda: None,
        seconds: float = 0.0,
    ) -> AsyncGenerator[Delta]:
        """The deltas of a checked request, regardless of the admission limits."""
        self._refuse_if_closed(request)
        with self._streams.open(request.request_id, on_end) as stream:
            self._begin(request, soft_prompt, stream)
            timer = self._timer(request.request_id, stream, seconds)
            ended = False
            try:
                while not ended:
                    delta = await stream.get()
                    ended = delta.finish_reason is not None and delta.is_last
                    if delta.finish_reason is FinishReason.ABORTED:
                        raise RequestAborted("The request was cancelled before its end.")
                    if delta.finish_reason is FinishReason.FAILED:
                        raise delta.error or GenerationFailed("The engine could not finish the request.")
                    yield delta
            finally:
                if timer is not None:
                    timer.cancel()
                self._grammars.cancel(request.request_id)
                if not ended:
                    self._thread.abort(request.request_id)

    def _begin(self, request: GenerationRequest, soft_prompt: SoftPrompt | None, stream: Stream) -> None:
        """Pass a request to the engine as soon as its grammar is compiled."""
        grammar = None if request.labels else self._engine.grammar_of(request)
        if grammar is None:
            return self._thread.add(request, soft_prompt)
        return self._grammars.when_compiled(
            request,
            grammar,
            lambda compiled: self._thread.add(request, soft_prompt, compiled),
            lambda error: stream.put(Delta(request.request_id, None, FinishReason.FAILED, error=error)),
        )

    def _refuse_if_closed(self, request: GenerationRequest) -> None:
        if self.draining and not request.is_part:
            raise ServerDraining("The server is shutting down.")
        if self._failed:
            raise GenerationFailed("The engine has stopped.", remedy=RESTART)

    def _timer(self, request_id: str, stream: Stream, seconds: float) -> asyncio.TimerHandle | None:
        """A timer that ends a request that takes too long, even if its deltas are not read."""
        limit = self.request_timeout
        if limit is None:
            return None

        def end() -> None:
            self._grammars.cancel(request_id)
            stream.end_with(Delta(request_id, None, FinishReason.FAILED, error=timed_out(limit)))
            self._thread.abort(request_id)

        return asyncio.get_running_loop().call_later(max(0.0, limit - seconds), end)

    def warm(self, soft_prompts: Iterable[SoftPrompt]) -> None:
        """Compute the prefixes that are not cached yet. Blocks, so never call it on the event loop's thread.

        Each prefix is computed by an ordinary request of one token, queued as a task of its own. The request caches the
        prefix like any first request, and its token shows that the values after the prefix are finite too. Raises
        InvalidSoftPrompt if they are not; else as `generate`.
        """
        assert self._loop is not None, "the worker runs before anything is published"

        async def warm_all() -> None:
            await asyncio.gather(*map(self._warm, soft_prompts))

        asyncio.run_coroutine_threadsafe(warm_all(), self._loop).result()

    def drop_unused(self, prefix_hashes: Iterable[str]) -> None:
        """Drop prefixes, each when the last sequence that uses it ends."""
        if hashes := tuple(prefix_hashes):
            self._thread.drop_unused(hashes)

    async def _warm(self, soft_prompt: SoftPrompt) -> None:
        request_id = f"warm-{uuid.uuid4().hex}"
        request = GenerationRequest(request_id, (0,), SamplingParams(max_new_tokens=1, ignore_eos=True), request_id)
        try:
            async for _ in self._deltas(request, soft_prompt):
                pass
        except NotFinite as exc:
            raise InvalidSoftPrompt(
                "The model cannot use this soft prompt: its output is not finite.",
                remedy="Train again with a lower learning rate or with gradient clipping, or serve in float32.",
            ) from exc

    async def drain(self, seconds: float) -> None:
        """Accept no new requests, let requests finish for `seconds`, then abort the remaining ones."""
        self.draining = True
        if await self._streams.idle_within(seconds):
            return
        log.warning("%d requests did not finish within %g s; they are aborted", len(self._streams), seconds)
        for request_id in self._streams:
            if self._grammars.cancel(request_id):  # the engine does not know it yet
                self._streams.hand_out([Delta(request_id, None, FinishReason.ABORTED)])
            self._thread.abort(request_id)
        await self._streams.idle_within(READ_SECONDS)

    async def stop(self) -> None:
        """Abort the requests in flight and end the thread."""
        await self.drain(0)
        self._thread.end()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), STOP_SECONDS)
        if self._ended.is_set():
            self._thread.join()  # returns at once
        else:
            log.error("the engine's thread does not end; it is left behind")
        if self._ticking is not None:
            self._ticking.cancel()
        self._engine.grammars.close()
        self._thread.give_back_cores()

    def _deliver(self, deltas: list[Delta]) -> None:
        if deltas:
            self._on_loop(lambda: self._hand_out(deltas))

    def _on_loop(self, work: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work)

    def _hand_out(self, deltas: list[Delta]) -> None:
        for request_id in self._streams.hand_out(deltas):
            self._thread.abort(request_id)

    def _fail(self) -> None:
        """Mark the engine as failed and end all requests."""
        self._failed = True
        self._grammars.cancel_all()
        self._streams.end_all(GenerationFailed("The engine has stopped.", remedy=RESTART))


def timed_out(seconds: float) -> RequestTimedOut:
    """The error of a request that exceeds the time limit."""
    return RequestTimedOut(f"The request was not complete after {seconds:g} s.")
