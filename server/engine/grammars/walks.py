"""The engine's side of grammars: texts in generation, each with the tokens that may come next.

After a token is drawn, its text waits until the grammar's process has taken it. That is a fraction of a millisecond for
a usual grammar, so the engine waits for it, but at most `STEP_SECONDS` in a step. Texts whose answer has not come by
then are left out of the following steps until it has; nobody else waits for them again. Of slow grammars two are asked
at a time, one text each, in turn of their requests, so that they leave the cores to the engine.
"""

from __future__ import annotations

import itertools
import select
import time
from collections import OrderedDict, deque

import numpy as np

from server.engine.grammars.compiled import Compiled, Grammars, brief, limit_reached
from server.engine.grammars.limits import MASK_SECONDS, REQUEST_SECONDS, STALLED_SECONDS, TOKEN_SECONDS
from server.engine.grammars.wire import NO_EXTENSION, Action, GrammarReply, GrammarState
from server.errors import GenerationFailed, InvalidRequest, PreludeError

STEP_SECONDS, IDLE_SECONDS = 0.02, 0.005
"""How long a step waits for grammars in all; and one in which nobody else can run, because commands come in between."""
SLOW_SECONDS = 0.005
"""Processor time: a grammar that takes more for a token is slow."""
COSTLY_SECONDS, COSTLY_TOKEN_SECONDS = 0.25, 0.001
"""Of a processor: a request that takes more than this, and for each of its tokens, is slow from then on."""
AT_ONCE = 2
"""Slow texts that are worked on at a time."""


class Walk:
    """One text's way through a grammar.

    Attributes:
        is_waiting: whether its last token was not taken yet; nothing is known of the next one then.
        is_complete: whether the text matches and nothing can be added to it.
        error: why it cannot go on.
    """

    def __init__(self, walks: RequestWalks, number: int) -> None:
        self.of_request = walks
        self.number = number
        self.is_waiting = False
        self.is_complete = False
        self.error: PreludeError | None = None
        self.mask = walks.compiled.first

    def allowed_bits(self) -> np.ndarray:
        """Which tokens may come next, one bit each, `[bytes]`; tokens beyond its end may not."""
        assert not self.is_waiting, "nothing is drawn before the last token was taken"
        return np.frombuffer(self.mask, dtype=np.uint8)


class RequestWalks:
    """The texts of one request, which share its budget of time."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self.walks: list[Walk] = []
        self.seconds = 0.0
        self.tokens = 0

    @property
    def is_costly(self) -> bool:
        """Whether its masks take much time in all, though each may take little."""
        return self.seconds > COSTLY_SECONDS + COSTLY_TOKEN_SECONDS * self.tokens

    def charge(self, seconds: float) -> InvalidRequest | None:
        """Count what a token took; an error if the request has used up its budget."""
        self.seconds += seconds
        self.tokens += 1
        if self.seconds <= REQUEST_SECONDS + TOKEN_SECONDS * self.tokens:
            return None
        return InvalidRequest(
            f"The grammar is too slow: to find what may come next took {self.seconds:.1f} s for {self.tokens} tokens; "
            f"the server allows {REQUEST_SECONDS:g} s and {1000 * TOKEN_SECONDS:g} ms for each.",
            remedy="Simplify it: smaller bounds of repetitions, fewer alternatives; or ask for fewer texts at once.",
        )


class Walks:
    """All texts under way; for the engine's thread alone."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._numbers = itertools.count(1)
        self._requests: dict[str, RequestWalks] = {}
        self._asked: dict[Compiled, dict[int, Walk]] = {}
        """Those whose answer has not come, by their numbers."""
        self._since: dict[Compiled, float] = {}
        """When a process that owes answers answered last."""
        self._slow: set[Compiled] = set()
        self._delayed: OrderedDict[RequestWalks, deque[tuple[Walk, Action, int]]] = OrderedDict()

    @property
    def has_work(self) -> bool:
        """Whether a text waits."""
        return bool(self._asked or self._delayed)

    def begin(self, request_id: str, compiled: Compiled, count: int) -> list[Walk]:
        """The texts of a request, which holds its grammar until it ends."""
        request = self._requests[request_id] = RequestWalks(compiled)
        request.walks = [Walk(request, next(self._numbers)) for _ in range(count)]
        return request.walks

    def end(self, request_id: str) -> list[Walk]:
        """Forget a request's texts, if it has any, wherever they are; returns them."""
        if (request := self._requests.pop(request_id, None)) is None:
            return []
        compiled = request.compiled
        self._delayed.pop(request, None)
        for walk in request.walks:
            compiled.process.order(Action.DROP, walk.number)
            if self._asked.get(compiled, {}).pop(walk.number, None) is not None:
                self._settle(compiled)
        compiled.process.flush()
        self._grammars.release(compiled)
        if not compiled.users:
            self._slow.discard(compiled)
        return request.walks

    def accept(self, walk: Walk, token_id: int, *, is_last: bool) -> None:
        """Have a text's next token taken; `collect` answers the text once it is."""
        walk.is_waiting = True
        request, action = walk.of_request, Action.ACCEPT_LAST if is_last else Action.ACCEPT
        if request.compiled in self._slow:
            self._delayed.setdefault(request, deque()).append((walk, action, token_id))
        else:
            self._ask(walk, action, token_id)

    def collect(self, *, also_slow: bool = False) -> list[Walk]:
        """The texts whose tokens were taken, or that have failed.

        Args:
            also_slow: wait for slow grammars too, as there is nothing else to do.
        """
        self._ask_delayed()
        answered: list[Walk] = []
        until = time.monotonic() + (IDLE_SECONDS if also_slow else STEP_SECONDS)
        while self._asked:
            prompt_ones = self._asked.keys() - self._slow
            left = max(0.0, until - time.monotonic()) if prompt_ones or (also_slow and not answered) else 0.0
            ready = self._wait(left)
            for compiled in ready:
                answered += self._read(compiled)
            if not ready and not left:
                break
        self._slow |= self._asked.keys()
        self._ask_delayed()
        return answered + self._stalled()

    def _wait(self, seconds: float) -> list[Compiled]:
        poll = select.poll()
        processes = {compiled.process.fileno(): compiled for compiled in self._asked}
        for descriptor, compiled in processes.items():
            poll.register(descriptor, select.POLLIN if compiled.process.flush() else select.POLLIN | select.POLLOUT)
        return [processes[descriptor] for descriptor, _ in poll.poll(1000 * seconds)]

    def _ask(self, walk: Walk, action: Action, token_id: int) -> None:
        compiled = walk.of_request.compiled
        self._since.setdefault(compiled, time.monotonic())
        self._asked.setdefault(compiled, {})[walk.number] = walk
        compiled.process.order(action, walk.number, token_id)

    def _ask_delayed(self) -> None:
        """Ask `AT_ONCE` of the slow grammars for one text each, in turn of the requests."""
        busy = self._slow & self._asked.keys()
        for request in list(self._delayed):
            if len(busy) >= AT_ONCE:
                return
            if request.compiled in busy:
                continue
            busy.add(request.compiled)
            orders = self._delayed[request]
            self._ask(*orders.popleft())
            request.compiled.process.flush()
            self._delayed.move_to_end(request)
            if not orders:
                del self._delayed[request]

    def _read(self, compiled: Compiled) -> list[Walk]:
        """What a process has to say."""
        answered: list[Walk] = []
        for frame in compiled.process.receive():
            if frame.state is GrammarState.ENDED:
                answered += self._fail(compiled, _ended(frame))
                break
            self._since[compiled] = time.monotonic()
            if (walk := self._asked.get(compiled, {}).pop(frame.walk, None)) is not None:
                self._take(walk, frame)
                self._judge(walk.of_request, frame)
                answered.append(walk)
        self._settle(compiled)
        if (largest := self._grammars.largest()) is not None:
            answered += self._fail(largest, InvalidRequest("The grammar takes too much memory.", remedy="Simplify it."))
        return answered

    def _judge(self, request: RequestWalks, frame: GrammarReply) -> None:
        """Whether a grammar is slow, as far as this answer and those before it show."""
        compiled = request.compiled
        if frame.seconds <= SLOW_SECONDS and not request.is_costly:
            self._slow.discard(compiled)
            return
        self._slow.add(compiled)
        if frame.seconds > 10 * SLOW_SECONDS or request.is_costly:
            compiled.process.take_what_is_left()

    def _take(self, walk: Walk, frame: GrammarReply) -> None:
        walk.is_waiting = False
        walk.error = walk.of_request.charge(frame.seconds)
        walk.is_complete = frame.state is GrammarState.COMPLETE
        walk.mask = frame.payload
        if frame.state is GrammarState.FAILED:
            why = brief(frame.payload.decode(errors="replace"))
            walk.error = _dead_end() if why.startswith(NO_EXTENSION) else _too_complex(why)

    def _fail(self, compiled: Compiled, error: PreludeError) -> list[Walk]:
        """End a grammar's process, and refuse the grammar for a while; answers the texts that wait for it."""
        self._grammars.discard(compiled, error if isinstance(error, InvalidRequest) else None)
        waiting = list(self._asked.pop(compiled, {}).values())
        self._since.pop(compiled, None)
        for request in [request for request in self._delayed if request.compiled is compiled]:
            waiting += [walk for walk, *_ in self._delayed.pop(request)]
        for walk in waiting:
            walk.is_waiting, walk.error = False, error
        return waiting

    def _settle(self, compiled: Compiled) -> None:
        if not self._asked.get(compiled, True):
            del self._asked[compiled], self._since[compiled]

    def _stalled(self) -> list[Walk]:
        """Give up processes that have not answered for very long."""
        long_ago = time.monotonic() - STALLED_SECONDS
        late = [compiled for compiled, since in self._since.items() if since < long_ago]
        why = f"The grammar is too slow: nothing came for {STALLED_SECONDS:g} s."
        error = InvalidRequest(why, remedy="Simplify it.")
        return [walk for compiled in late for walk in self._fail(compiled, error)]


def _ended(frame: GrammarReply) -> PreludeError:
    """Why a process has ended."""
    try:
        why = limit_reached(frame, f"it takes more than {MASK_SECONDS:g} s to find what may come next")
    except GenerationFailed as exc:
        return exc
    return _too_complex(why)


def _too_complex(why: str) -> PreludeError:
    return InvalidRequest(f"The grammar is too complex: {why}.", remedy="Simplify it.")


def _dead_end() -> PreludeError:
    return InvalidRequest(
        "The grammar has a dead end: no token can follow the text that was generated, which does not match it yet.",
        remedy="Mend the rule: see that each of its alternatives can be completed.",
    )
