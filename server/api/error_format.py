"""How front ends write errors down. Each front end owns its `ErrorFormat`; `app.py` puts them into one table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.api.schemas import error_body
from server.errors import PreludeError

Location = tuple[int | str, ...]


@dataclass(frozen=True)
class ErrorFormat:
    """How the routes of a front end write errors down."""

    prefix: str = ""
    """The path above those routes; "" is above all."""
    body: Callable[[PreludeError], Mapping[str, Any]] = error_body
    """Renders an error as JSON."""
    status: Callable[[PreludeError, int | None], int] = lambda error, status: status or error.status
    """The HTTP status of an error; the second argument replaces the error's own, if given."""
    fields: Callable[[str], Sequence[str]] = lambda path: ()
    """The fields of a path's body, of which an unknown field may be a misspelling."""
    union_fields: tuple[str, ...] = ()
    """Fields of several types, such as a text or a list: pydantic puts the type's name into the location."""
    location: Callable[[Location], Location] = lambda location: location
    """Maps pydantic's location to the client's view of the body, without the names of our own types."""

    def is_for(self, path: str) -> bool:
        """Whether a path is one of this front end's."""
        return path == self.prefix or path.startswith(f"{self.prefix}/")


@dataclass(frozen=True)
class ErrorFormats:
    """The formats of all front ends; `default` is for paths of none of the others."""

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
