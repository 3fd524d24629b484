"""What all readers of JSON share: null fields, and one sentence for pydantic's errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

MOST_PROBLEMS = 5
MOST_CHARACTERS = 80
"""Of each part of a place: names may be a client's own."""

Location = Sequence[int | str]


def dotted(location: Location) -> str:
    """A place as `config.labels.2`."""
    return ".".join(str(part)[:MOST_CHARACTERS] for part in location)


def first_problems(exc: ValidationError, place: Callable[[Location], str] = dotted) -> str:
    """The first problems with their places, and how many more there are, separated by semicolons."""
    items = exc.errors(include_url=False, include_context=False, include_input=False)
    return listed([_problem(place(item["loc"]), item["msg"]) for item in items[:MOST_PROBLEMS]], len(items))


def listed(problems: Sequence[str], number: int) -> str:
    """The first of `number` problems in one line, and how many more there are."""
    more = f"; and {number - len(problems):,} more" if number > len(problems) else ""
    return "; ".join(problems) + more


def _problem(place: str, message: Any) -> str:
    message = str(message).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def without_nulls(value: Any) -> Any:
    """An object without the values that are null; anything else as it is."""
    return {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value
