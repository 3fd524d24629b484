"""Shared parts of readers of JSON: handling of null fields, and pydantic's errors as one sentence."""

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

MOST_PROBLEMS = 5
MOST_CHARACTERS = 80
"""Maximum length of each part of a location, because a client may choose names."""

Location = Sequence[int | str]


def dotted(location: Location) -> str:
    """A location as text: `config.labels.2`."""
    return ".".join(str(part)[:MOST_CHARACTERS] for part in location)


def first_problems(exc: ValidationError, place: Callable[[Location], str] = dotted) -> str:
    """The first problems with their locations, and the number of further ones, separated by semicolons."""
    items = exc.errors(include_url=False, include_context=False, include_input=False)
    return listed([_problem(place(item["loc"]), item["msg"]) for item in items[:MOST_PROBLEMS]], len(items))


def listed(problems: Sequence[str], number: int) -> str:
    """The given first problems of `number` on one line, and the number of further ones."""
    more = f"; and {number - len(problems):,} more" if number > len(problems) else ""
    return "; ".join(problems) + more


def _problem(place: str, message: Any) -> str:
    message = str(message).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def without_nulls(value: Any) -> Any:
    """An object without null values; other values are returned unchanged."""
    return {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value
