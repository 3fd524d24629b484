"""How front ends write errors down. Each front end owns its `ErrorFormat`; `app.py` puts them into one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.api.schemas import error_body
from server.errors import PreludeError

Location = tuple[int | str, ...]


def no_fields(path: str) -> Sequence[str]:
    """The fields of a path that takes no body: none."""
    return ()


def own_status(error: PreludeError, status: int | None = None) -> int:
    """The status of an error; `status` where it is not the error's own."""
    return status or error.status


def own_location(location: Location) -> Location:
    """The default: the location of a problem exactly as pydantic reports it."""
    return location


@dataclass(frozen=True)
class ErrorFormat:
    """How the routes of a front end write errors down.

    Attributes:
        prefix: the path above those routes; "" is above all.
        body: function that renders an error as JSON.
        status: function that gives the HTTP status; the second argument is the status to use if it differs from the
            error's own.
        fields: of a path, the fields that its body may have: an unknown field may be a misspelt one of them.
        union_fields: fields of several kinds, such as a text or a list: pydantic names the kind in the location too.
        location: function that maps pydantic's location to the client's view of the body, without the names of our own
            types.
    """

    prefix: str = ""
    body: Callable[[PreludeError], Mapping[str, Any]] = error_body
    status: Callable[[PreludeError, int | None], int] = own_status
    fields: Callable[[str], Sequence[str]] = no_fields
    union_fields: tuple[str, ...] = ()
    location: Callable[[Location], Location] = own_location

    def is_for(self, path: str) -> bool:
        """Whether a path is one of this front end's."""
        return path == self.prefix or path.startswith(f"{self.prefix}/")


@dataclass(frozen=True)
class ErrorFormats:
    """The formats of all front ends.

    Attributes:
        default: for paths of none of the others.
        others: each for its own prefix.
    """

    default: ErrorFormat = ErrorFormat()
    others: tuple[ErrorFormat, ...] = ()

    def of(self, path: str) -> ErrorFormat:
        """The format that clients of a path expect."""
        return next((found for found in self.others if found.is_for(path)), self.default)

    def render(self, path: str, error: PreludeError, status: int | None = None) -> tuple[Mapping[str, Any], int]:
        """An error's body and status as clients of a path expect them; `status` where it is not the error's own."""
        found = self.of(path)
        return found.body(error), found.status(error, status)

    def fields(self, path: str) -> Sequence[str]:
        """The fields that an unknown one at a path may be a misspelling of."""
        return self.of(path).fields(path) or self.default.fields(path)
