"""Admission: a request above a limit is refused at once, with the time to retry, instead of waiting long.

The unit is the choice, because each choice takes a slot: a request with eight choices counts as much as eight requests.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.contracts import GenerationRequest
from server.errors import Overloaded


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a server; None means no limit."""

    in_flight: int | None = None  # choices that run or wait
    per_task: int | None = None  # of one task
    per_key: int | None = None  # of one API key
    background: int | None = None  # of requests that the server makes itself, for example in an evaluation
    request_timeout: float | None = None  # seconds that a request may take, waiting included


class Admission:
    """Counts choices in flight by task and by key, and refuses requests that exceed a limit."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._in_flight = 0
        self._in_background = 0
        self._by_task: Counter[str | None] = Counter()
        self._by_key: Counter[str | None] = Counter()

    @contextmanager
    def of(self, request: GenerationRequest) -> Iterator[Callable[[], None]]:
        """Count a request as in flight while the block runs, or until the yielded `leave` is called at its end.

        A part of another request is not counted, because that request is.

        Raises Overloaded, which names the limit that is reached.
        """
        choices = 0 if request.is_part else request.num_choices
        if choices:
            self._check(request, choices)
        self._count(request, choices)
        counted = True

        def leave() -> None:
            nonlocal counted
            if counted:
                counted = False
                self._count(request, -choices)

        try:
            yield leave
        finally:
            leave()

    def _check(self, request: GenerationRequest, choices: int) -> None:
        """Refuse a request that exceeds a limit. Background requests count towards no limit of live requests."""
        limits, task, key = self._limits, request.task, request.key_id
        if request.is_background:
            _refuse_over("in flight in the background", self._in_background, choices, limits.background)
            return _refuse_over("in flight", self._in_flight + self._in_background, choices, limits.in_flight)
        _refuse_over("in flight", self._in_flight, choices, limits.in_flight)
        _refuse_over(f"in flight for the task {task}", self._by_task[task], choices, limits.per_task)
        if key is not None:
            _refuse_over(f"in flight for the key {key}", self._by_key[key], choices, limits.per_key)
        return None

    def _count(self, request: GenerationRequest, choices: int) -> None:
        if request.is_background:
            self._in_background += choices
            return
        self._in_flight += choices
        for counter, name in ((self._by_task, request.task), (self._by_key, request.key_id)):
            counter[name] += choices
            if not counter[name]:
                del counter[name]


def _refuse_over(where: str, now: int, more: int, limit: int | None) -> None:
    # A request with more choices than the limit is admitted if nothing else is in flight: it could never be otherwise.
    if limit is not None and now and now + more > limit:
        raise Overloaded(f"{now} answers are {where}, and the server takes {limit}.")
