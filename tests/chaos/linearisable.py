"""Finds an order of concurrent calls that explains their answers: Wing and Gong's search, with Lowe's memory.

A history is linearisable if each call can be given one moment between its beginning and its end so that the calls, in
the order of these moments, have the answers that were seen. A call of unknown outcome may have had its effect at any
moment after its beginning, or never.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)

UNKNOWN = math.inf
"""The end of a call whose outcome its client does not know."""


@dataclass(frozen=True)
class Call(Generic[S]):
    """One call of a client.

    Attributes:
        began, ended: times of one clock; `ended` is UNKNOWN if the outcome is.
        step: state -> the state after the call; None if its answer cannot be given in this state.
        changes: False for a read, which never changes a state; its `began` may be earlier, by how old it may be.
        text: for people.
    """

    began: float
    ended: float
    step: Callable[[S], S | None]
    changes: bool = True
    text: str = ""


class NotLinearisable(AssertionError):
    """No order explains the answers; shows the longest one that explains the first of them."""


def linearise(calls: Sequence[Call[S]], initial: S) -> list[Call[S]]:
    """An order that explains all answers; calls of unknown outcome are in it if they had an effect.

    Raises NotLinearisable if there is none.
    """
    calls = sorted(calls, key=lambda call: call.began)
    known = sum(1 << i for i, call in enumerate(calls) if call.ended != UNKNOWN)
    seen = set[tuple[int, S]]()
    longest: tuple[list[int], S] = ([], initial)
    waiting: list[tuple[int, S, tuple[int, ...]]] = [(0, initial, ())]
    while waiting:
        done, state, order = waiting.pop()
        done, order = _with_reads(calls, done, state, order)
        if done & known == known:
            return [calls[i] for i in order]
        if (done, state) in seen:
            continue
        seen.add((done, state))
        if len(order) > len(longest[0]):
            longest = list(order), state
        # The last one is tried first: the call that ends first.
        for i in sorted(_next(calls, done), key=lambda i: -calls[i].ended):
            after = calls[i].step(state) if calls[i].changes else None
            if after is None or (after == state and calls[i].ended == UNKNOWN):  # the latter is as good as never
                continue
            waiting.append((done | 1 << i, after, (*order, i)))
    raise NotLinearisable(_story(calls, *longest))


def _next(calls: Sequence[Call[S]], done: int) -> list[int]:
    """Calls that may be next: those that began before the first of the others ended."""
    rest = [i for i in range(len(calls)) if not done >> i & 1]
    end = min(calls[i].ended for i in rest)
    return [i for i in rest if calls[i].began <= end]


def _with_reads(calls: Sequence[Call[S]], done: int, state: S, order: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Add all reads that may be next and have seen this state; no order is lost, because they change nothing."""
    while done.bit_count() < len(calls):
        found = [i for i in _next(calls, done) if not calls[i].changes and calls[i].step(state) is not None]
        if not found:
            break
        done |= sum(1 << i for i in found)
        order = (*order, *found)
    return done, order


def _story(calls: Sequence[Call[S]], order: Sequence[int], state: S) -> str:
    rest = [i for i in range(len(calls)) if i not in set(order)]
    lines = ["No order explains these answers. The longest beginning:"]
    lines += [f"  {_line(calls[i])}" for i in order[-20:]]
    lines += [f"leads to {state}, and then none of these fits:"]
    lines += [f"  {_line(calls[i])}" for i in rest[:20]]
    return "\n".join(lines)


def _line(call: Call[S]) -> str:
    return f"{call.began:9.3f} {call.ended:9.3f}  {call.text}"
