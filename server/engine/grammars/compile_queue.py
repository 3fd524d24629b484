"""Schedules the compilation of grammars: a few at a time, clients take turns, no grammar delays others for long.

A usual grammar compiles in milliseconds. `SHORT` grammars are compiled at a time, for `SHORT_SECONDS` each. A grammar
that needs longer frees its slot for the next one. It continues to compile as one of at most `LONG` long compilations;
if there are already that many, it waits for its turn and starts again.
"""

import asyncio
import contextlib
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Callable

from server.contracts import GenerationRequest, Grammar
from server.engine.grammars.compiled import Attempt, Compiled, Grammars
from server.engine.grammars.limits import COMPILE_WALL_SECONDS
from server.engine.grammars.wire import Deed
from server.errors import GenerationFailed, PreludeError
from server.executors import Executor

log = logging.getLogger(__name__)

SHORT, LONG = 2, 4
SHORT_SECONDS = 0.4

Owner = str | None
"""The unit that takes turns: an API key, or a task if the server has no keys."""


class GrammarQueue:
    """The queue of grammars to compile. Only for the event loop; the work runs in processes, on which threads wait."""

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
        """Run a request once its grammar is compiled, unless it is cancelled first.

        Args:
            run: called with the compiled grammar, which it must release.
            fail: called with the error if the grammar cannot be used.
        """

        async def compile_and_run() -> None:
            try:
                compiled = await self.compile(grammar, request.key_id or request.task)
            except PreludeError as exc:
                fail(exc)
            except Exception:
                log.exception("a grammar was not compiled")
                fail(GenerationFailed("The grammar could not be compiled."))
            else:
                run(compiled)

        task = self._pending[request.request_id] = asyncio.create_task(compile_and_run())
        task.add_done_callback(lambda _: self._pending.pop(request.request_id, None))

    def cancel(self, request_id: str) -> bool:
        """Cancel a request whose grammar is not compiled yet; returns whether there was one."""
        task = self._pending.pop(request_id, None)
        return task is not None and task.cancel()

    def cancel_all(self) -> None:
        """Cancel all requests whose grammars are not compiled yet."""
        for request_id in list(self._pending):
            self.cancel(request_id)

    async def compile(self, grammar: Grammar, owner: Owner) -> Compiled:
        """Compile a grammar unless it is already compiled, and hold it.

        Raises:
            InvalidRequest: the grammar cannot be used; the error gives the reason.
            GenerationFailed: the server cannot compile any grammar.
        """
        while (compiled := self._grammars.hold(grammar)) is None:
            task = self._under_way.get(grammar)
            if task is None:
                task = self._under_way[grammar] = asyncio.create_task(self._try_twice(grammar, owner))
            self._wanted[grammar] += 1
            try:
                await asyncio.shield(task)
            finally:
                self._wanted[grammar] -= 1
                if not self._wanted[grammar]:  # it is done, or no request waits for it any more
                    del self._wanted[grammar], self._under_way[grammar]
                    task.cancel()
        return compiled

    async def _try_twice(self, grammar: Grammar, owner: Owner) -> None:
        """Compile a grammar, and once more if its process was killed, as the kernel does when memory is short."""
        try:
            await self._compile(grammar, owner)
        except GenerationFailed as exc:
            log.warning("a grammar is compiled again: %s", exc)
            await self._compile(grammar, owner)

    async def _compile(self, grammar: Grammar, owner: Owner) -> None:
        attempt: Attempt | None = None
        try:
            async with self._short.turn(owner):
                attempt = await self._begin(grammar)
                if await self._threads.run(attempt.wait, SHORT_SECONDS):
                    return
            if self._long.are_full:
                attempt.close()
                attempt = None
            async with self._long.turn(owner):
                attempt = attempt or await self._begin(grammar)
                attempt.process.do(Deed.YIELD)
                while not await self._threads.run(attempt.wait, COMPILE_WALL_SECONDS):
                    pass
        finally:
            if attempt is not None:
                attempt.close()

    async def _begin(self, grammar: Grammar) -> Attempt:
        return await self._threads.run(self._grammars.begin, grammar)


class Turns:
    """A semaphore whose waiters are served in turns by owner."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._waiting: OrderedDict[Owner, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def are_full(self) -> bool:
        """Whether a new caller has to wait."""
        return not self._free

    @contextlib.asynccontextmanager
    async def turn(self, owner: Owner) -> AsyncGenerator[None]:
        """Context manager: wait for a slot and occupy it while the block runs."""
        if self._free:
            self._free -= 1
        else:
            slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(owner, deque()).append(slot)
            try:
                await slot
            except asyncio.CancelledError:
                if not slot.cancelled():  # the slot was assigned just before the cancellation
                    self._pass_on()
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        """Give the slot to the next waiter, or free it."""
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
