"""The order of compiling grammars: a few at a time, clients take turns, and no grammar delays others for long.

A usual grammar takes milliseconds. `SHORT` are compiled at a time, for `SHORT_SECONDS` each. One that needs longer
makes room for the next: it continues beside it, or, where `LONG` do already, starts again in its turn among those.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Callable

from server.contracts import GenerationRequest, Grammar
from server.engine.grammars.compiled import Attempt, Compiled, Grammars
from server.engine.grammars.limits import COMPILE_WALL_SECONDS
from server.errors import GenerationFailed, PreludeError
from server.executors import Executor

log = logging.getLogger(__name__)

SHORT, LONG = 2, 4
SHORT_SECONDS = 0.4

Owner = str | None
"""Whose turn it is: a key, or without keys a task."""


class GrammarQueue:
    """For the event loop; what it waits for runs in other processes, and in threads of its own that only wait too."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._threads = Executor("grammars", "grammars", threads=SHORT + LONG, most_waiting=SHORT + LONG)
        self._pending: dict[str, asyncio.Task[None]] = {}
        self._short, self._long = Turns(SHORT), Turns(LONG)
        self._under_way: dict[Grammar, asyncio.Task[None]] = {}
        self._wanted: Counter[Grammar] = Counter()

    def when_compiled(
        self,
        request: GenerationRequest,
        grammar: Grammar,
        run: Callable[[Compiled], object],
        fail: Callable[[PreludeError], object],
    ) -> None:
        """Run a request once its grammar is compiled, unless it is cancelled before.

        Args:
            request: in whose turn the grammar is compiled.
            grammar: to be compiled.
            run: gets the compiled grammar, held for it.
            fail: gets the error, if the grammar cannot be used.
        """
        task = asyncio.create_task(self._run(grammar, request.key_id or request.task, run, fail))
        self._pending[request.request_id] = task
        task.add_done_callback(lambda _: self._pending.pop(request.request_id, None))

    def cancel(self, request_id: str) -> bool:
        """Forget a request, if its grammar is not compiled yet; answers whether it was so."""
        task = self._pending.pop(request_id, None)
        return task is not None and task.cancel()

    def cancel_all(self) -> None:
        """Forget all requests whose grammars are not compiled yet."""
        for request_id in list(self._pending):
            self.cancel(request_id)

    async def _run(
        self,
        grammar: Grammar,
        owner: Owner,
        run: Callable[[Compiled], object],
        fail: Callable[[PreludeError], object],
    ) -> None:
        try:
            compiled = await self.compile(grammar, owner)
        except PreludeError as exc:
            fail(exc)
        except Exception:
            log.exception("a grammar was not compiled")
            fail(GenerationFailed("The grammar could not be compiled."))
        else:
            run(compiled)

    async def compile(self, grammar: Grammar, owner: Owner) -> Compiled:
        """Compile a grammar, if it is not there yet, and hold it.

        Raises:
            InvalidRequest: it cannot be used; says why.
            GenerationFailed: no grammar can be compiled.
        """
        while (compiled := self._grammars.hold(grammar)) is None:
            task = self._under_way.get(grammar)
            if task is None:
                task = self._under_way[grammar] = asyncio.create_task(self._compile(grammar, owner))
            self._wanted[grammar] += 1
            try:
                await asyncio.shield(task)
            finally:
                self._wanted[grammar] -= 1
                if not self._wanted[grammar]:  # it is done, or all who wanted it have left
                    del self._wanted[grammar], self._under_way[grammar]
                    task.cancel()
        return compiled

    async def _compile(self, grammar: Grammar, owner: Owner) -> None:
        attempt: Attempt | None = None
        try:
            async with self._short.turn(owner):
                attempt = await self._begin(grammar)
                if await self._waited(attempt, SHORT_SECONDS):
                    return
            if self._long.are_full:
                attempt.close()
                attempt = None
            async with self._long.turn(owner):
                attempt = attempt or await self._begin(grammar)
                attempt.yield_further()
                while not await self._waited(attempt, COMPILE_WALL_SECONDS):
                    pass
        finally:
            if attempt is not None:
                attempt.close()

    async def _begin(self, grammar: Grammar) -> Attempt:
        return await self._threads.run(self._grammars.begin, grammar)

    async def _waited(self, attempt: Attempt, seconds: float) -> bool:
        return await self._threads.run(attempt.wait, seconds)


class Turns:
    """A number of places; those who wait for one are served in turn of their owners."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._waiting: OrderedDict[Owner, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def are_full(self) -> bool:
        """Whether one has to wait."""
        return not self._free

    @contextlib.asynccontextmanager
    async def turn(self, owner: Owner) -> AsyncGenerator[None]:
        """Wait for a place, and have it while the block runs."""
        if self._free:
            self._free -= 1
        else:
            slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(owner, deque()).append(slot)
            try:
                await slot
            except asyncio.CancelledError:
                if not slot.cancelled():  # it was given just now
                    self._pass_on()
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        """Give a place to the next who still waits."""
        while self._waiting:
            owner, slots = next(iter(self._waiting.items()))
            slot = slots.popleft()
            self._waiting.move_to_end(owner)
            if not slots:
                del self._waiting[owner]
            if not slot.done():
                slot.set_result(None)
                return
        self._free += 1
