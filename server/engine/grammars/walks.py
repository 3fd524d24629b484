"""The engine's side of grammars: the texts being generated, each with the tokens that may come next.

After a token is drawn, its text waits until the grammar's process has accepted the token. For a usual grammar this
takes a fraction of a millisecond, so the engine waits for it, but at most `STEP_SECONDS` per step. Texts whose reply
has not arrived by then are left out of the following steps until it has; later steps do not wait for them. Of the slow
grammars, at most `AT_ONCE` work at a time, on one text each, and requests take turns, so that the cores stay free for
the engine.
"""

from __future__ import annotations

import itertools
import select
import time
from collections import OrderedDict, deque

import numpy as np

from server.engine.grammars.compiled import Compiled, Grammars, brief, limit_reached
from server.engine.grammars.limits import MASK_SECONDS, REQUEST_SECONDS, STALLED_SECONDS, TOKEN_SECONDS
from server.engine.grammars.wire import NO_EXTENSION, Action, Deed, GrammarReply, GrammarState
from server.errors import GenerationFailed, InvalidRequest, PreludeError

STEP_SECONDS, IDLE_SECONDS = 0.02, 0.005
"""Maximum time that a step waits for grammars, and the same for a step without other work. The latter is shorter,
because commands are handled between steps."""
SLOW_SECONDS = 0.005
"""Processor time for one token above which a grammar counts as slow."""
COSTLY_SECONDS, COSTLY_TOKEN_SECONDS = 0.25, 0.001
"""Processor time, initial amount and amount per token, above which a request counts as costly; its grammar is then
slow."""
AT_ONCE = 2
"""Maximum number of slow grammars that work at a time."""


class Walk:
    """One text's progress through a grammar."""

    def __init__(self, walks: RequestWalks, number: int) -> None:
        self.of_request, self.number = walks, number
        self.is_waiting = False  # whether its last token has not been accepted yet, so that the mask is not known
        self.is_complete = False  # whether the text matches and nothing can be added to it
        self.error: PreludeError | None = None  # why the text cannot continue
        self.mask = walks.compiled.first

    def allowed_bits(self) -> np.ndarray:
        """The tokens that may come next, one bit each, `[bytes]`; tokens beyond the end are not allowed."""
        assert not self.is_waiting, "nothing is drawn before the last token was taken"
        return np.frombuffer(self.mask, dtype=np.uint8)


class RequestWalks:
    """The texts of one request, which share its time budget."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self.walks: list[Walk] = []
        self.seconds = 0.0
        self.tokens = 0

    @property
    def is_costly(self) -> bool:
        """Whether the request's masks have taken much time in total, even if each took little."""
        return self.seconds > COSTLY_SECONDS + COSTLY_TOKEN_SECONDS * self.tokens

    def charge(self, seconds: float) -> InvalidRequest | None:
        """Count the time of a token; returns an error if the request has exceeded its budget."""
        self.seconds += seconds
        self.tokens += 1
        if self.seconds <= REQUEST_SECONDS + TOKEN_SECONDS * self.tokens:
            return None
        return InvalidRequest(
            f"The grammar is too slow: finding what may come next took {self.seconds:.1f} s for {self.tokens} tokens; "
            f"the server allows {REQUEST_SECONDS:g} s and {1000 * TOKEN_SECONDS:g} ms for each.",
            remedy="Simplify it (smaller bounds of repetitions, fewer alternatives), or request fewer texts at once.",
        )


class Walks:
    """All texts in progress. Only for the engine's thread."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._numbers = itertools.count(1)
        self._requests: dict[str, RequestWalks] = {}
        self._sent: dict[Compiled, dict[int, Walk]] = {}  # texts whose reply has not arrived, by number
        self._since: dict[Compiled, float] = {}  # time of the last reply of each process that owes replies
        self._slow: set[Compiled] = set()
        self._delayed: OrderedDict[RequestWalks, deque[tuple[Walk, Action, int]]] = OrderedDict()

    @property
    def has_work(self) -> bool:
        """Whether a text waits."""
        return bool(self._sent or self._delayed)

    def begin(self, request_id: str, compiled: Compiled, count: int) -> list[Walk]:
        """Start the texts of a request, which holds its grammar until it ends."""
        request = self._requests[request_id] = RequestWalks(compiled)
        request.walks = [Walk(request, next(self._numbers)) for _ in range(count)]
        return request.walks

    def end(self, request_id: str) -> list[Walk]:
        """Remove a request's texts, if it has any, and return them."""
        if (request := self._requests.pop(request_id, None)) is None:
            return []
        compiled = request.compiled
        self._delayed.pop(request, None)
        for walk in request.walks:
            compiled.process.order(Action.DROP, walk.number)
            if self._sent.get(compiled, {}).pop(walk.number, None) is not None:
                self._settle(compiled)
        compiled.process.flush()
        self._grammars.release(compiled)
        if not compiled.users:
            self._slow.discard(compiled)
        return request.walks

    def accept(self, walk: Walk, token_id: int, *, is_last: bool) -> None:
        """Send a text's next token to its grammar; `collect` returns the text once the token is accepted."""
        walk.is_waiting = True
        request, action = walk.of_request, Action.ACCEPT_LAST if is_last else Action.ACCEPT
        if request.compiled in self._slow:
            self._delayed.setdefault(request, deque()).append((walk, action, token_id))
        else:
            self._send(walk, action, token_id)

    def collect(self, *, also_slow: bool = False) -> list[Walk]:
        """The texts whose tokens were accepted, or that have failed; waits for slow grammars only if `also_slow`."""
        self._send_delayed()
        answered: list[Walk] = []
        until = time.monotonic() + (IDLE_SECONDS if also_slow else STEP_SECONDS)
        while self._sent:
            waits = self._sent.keys() - self._slow or (also_slow and not answered)
            left = max(0.0, until - time.monotonic()) if waits else 0.0
            ready = self._wait(left)
            for compiled in ready:
                answered += self._read(compiled)
            if not ready and not left:
                break
        self._slow |= self._sent.keys()
        self._send_delayed()
        return answered + self._stalled()

    def _wait(self, seconds: float) -> list[Compiled]:
        poll = select.poll()
        processes = {compiled.process.fileno(): compiled for compiled in self._sent}
        for descriptor, compiled in processes.items():
            poll.register(descriptor, select.POLLIN if compiled.process.flush() else select.POLLIN | select.POLLOUT)
        return [processes[descriptor] for descriptor, _ in poll.poll(1000 * seconds)]

    def _send(self, walk: Walk, action: Action, token_id: int) -> None:
        compiled = walk.of_request.compiled
        self._since.setdefault(compiled, time.monotonic())
        self._sent.setdefault(compiled, {})[walk.number] = walk
        compiled.process.order(action, walk.number, token_id)

    def _send_delayed(self) -> None:
        """Send at most `AT_ONCE` slow grammars one token each; requests take turns."""
        busy = self._slow & self._sent.keys()
        for request in list(self._delayed):
            if len(busy) >= AT_ONCE:
                return
            if request.compiled in busy:
                continue
            busy.add(request.compiled)
            orders = self._delayed[request]
            self._send(*orders.popleft())
            request.compiled.process.flush()
            self._delayed.move_to_end(request)
            if not orders:
                del self._delayed[request]

    def _read(self, compiled: Compiled) -> list[Walk]:
        """Read a process's replies; returns the texts that they concern."""
        answered: list[Walk] = []
        for frame in compiled.process.receive():
            if frame.state is GrammarState.ENDED:
                answered += self._fail(compiled, _ended(frame))
                break
            self._since[compiled] = time.monotonic()
            if (walk := self._sent.get(compiled, {}).pop(frame.walk, None)) is not None:
                self._take(walk, frame)
                self._judge(walk.of_request, frame)
                answered.append(walk)
        self._settle(compiled)
        if (largest := self._grammars.largest()) is not None:
            answered += self._fail(largest, InvalidRequest("The grammar takes too much memory.", remedy="Simplify it."))
        return answered

    def _judge(self, request: RequestWalks, frame: GrammarReply) -> None:
        """Decide from this reply and the earlier ones whether a grammar is slow."""
        compiled = request.compiled
        if frame.seconds <= SLOW_SECONDS and not request.is_costly:
            self._slow.discard(compiled)
            return
        self._slow.add(compiled)
        if frame.seconds > 10 * SLOW_SECONDS or request.is_costly:
            compiled.process.do(Deed.IDLE)

    def _take(self, walk: Walk, frame: GrammarReply) -> None:
        walk.is_waiting = False
        walk.error = walk.of_request.charge(frame.seconds)
        walk.is_complete = frame.state is GrammarState.COMPLETE
        walk.mask = frame.payload
        if frame.state is GrammarState.FAILED:
            why = brief(frame.payload.decode(errors="replace"))
            walk.error = _too_complex(why)
            if why.startswith(NO_EXTENSION):
                walk.error = InvalidRequest(
                    "The grammar has a dead end: no token can follow the generated text, which does not match it yet.",
                    remedy="Make sure that each alternative of the rule can be completed.",
                )

    def _fail(self, compiled: Compiled, error: PreludeError) -> list[Walk]:
        """End a grammar's process, and refuse the grammar for a while; returns the texts that wait for it."""
        self._grammars.discard(compiled, error if isinstance(error, InvalidRequest) else None)
        waiting = list(self._sent.pop(compiled, {}).values())
        self._since.pop(compiled, None)
        for request in [request for request in self._delayed if request.compiled is compiled]:
            waiting += [walk for walk, *_ in self._delayed.pop(request)]
        for walk in waiting:
            walk.is_waiting, walk.error = False, error
        return waiting

    def _settle(self, compiled: Compiled) -> None:
        if not self._sent.get(compiled, True):
            del self._sent[compiled], self._since[compiled]

    def _stalled(self) -> list[Walk]:
        """End processes that have not replied for `STALLED_SECONDS`."""
        long_ago = time.monotonic() - STALLED_SECONDS
        late = [compiled for compiled, since in self._since.items() if since < long_ago]
        error = InvalidRequest(f"The grammar is too slow: no reply for {STALLED_SECONDS:g} s.", remedy="Simplify it.")
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
