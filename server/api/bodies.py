"""Reads the bodies of requests: JSON, or a form of fields and files. All routes read theirs here.

What holds up the event loop or fills memory is refused before it is read: by a body's size (`body_sizes.py`), the
number of its values and names, the length of a name. This limits how long validation takes and how many errors it can
report.
"""

import difflib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from server.api.forms import read_form
from server.errors import InvalidRequest, PayloadTooLarge

FORM, JSON = "multipart/form-data", "application/json"
KINDS = ("bool", "int", "float", "str")
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
"""pydantic error types whose location ends with a field name that the client invented."""


@dataclass(frozen=True)
class Bounds:
    """Of a JSON body, its texts and names not counted.

    Attributes:
        values: number of commas, colons and opening brackets: an upper bound on the number of values.
        containers: lists and objects.
        names: of all objects together. An unknown one costs an error, some microseconds and a kilobyte.
        wide_bytes: of a body with characters beyond U+FFFF: a text that holds one takes four bytes for each character.
        characters: of a body with characters beyond U+00FF: a text that holds one takes two bytes for each.
    """

    values: int
    containers: int
    names: int
    wide_bytes: int
    characters: int


TEXTS = Bounds(values=2**17, containers=2**14, names=2**13, wide_bytes=3 * 2**19, characters=5 * 2**19)
"""For bodies that bring texts, token ids or a schema."""
ORDERS = Bounds(values=2**13, containers=2**10, names=2**10, wide_bytes=3 * 2**17, characters=5 * 2**17)
"""For bodies that request a job."""

MAX_NAME = 256
"""Characters of a name."""
MAX_DIGITS = 1000
"""Of a number: to read a longer one takes time that grows with the square of its length."""
PIECE = 2**17

_TEXT = re.compile(rb'"[^"]*+"')
_REST_OF_ESCAPE = re.compile(rb"\\*+.?", re.DOTALL)
_BELOW_FOUR_BYTES = bytes(range(0xF0))
_LATIN = bytes(range(0xC4))
"""The bytes with which characters up to U+00FF are encoded in UTF-8."""
_CONTINUATION = bytes(range(0x80, 0xC0))
_ESCAPE_BEYOND_LATIN = re.compile(rb"\\u(?!00)")
_AS_ZERO = bytes.maketrans(b"123456789", b"0" * 9)
_RECURSION = "recursion limit"
_SPLIT_IT = "Send the texts in several requests."


class BoundedRequest(Request):
    """A request whose body is read within bounds, by FastAPI too."""

    async def json(self) -> Any:
        """The body as JSON.

        Raises:
            HTTPException: (400) it is not text, or its nesting or a number exceeds the parser's limits.
            InvalidRequest, PayloadTooLarge: it is not JSON, or has more of something than the server takes.
        """
        if not hasattr(self, "_json"):
            self._json = parse_json(await self.body())
        return self._json

    async def body(self) -> bytes:
        """The body's bytes, put together without a second copy.

        Not a bytearray: the parser would copy it.
        """
        if not hasattr(self, "_body"):
            whole = io.BytesIO()
            async for piece in self.stream():
                whole.write(piece)
            self._body = whole.getvalue()
        return self._body

    async def form(self, **_: Any) -> FormData:  # type: ignore[override]  # ours is never a context manager
        """The body as a form, read once; without fields if it is none. Raises what `read_form` raises."""
        if self._form is None:
            self._form = await read_form(self)
        return self._form


@dataclass(frozen=True)
class Body:
    """A body of one of the two kinds.

    Attributes:
        value: the JSON; of a form its fields that are no files.
        files: of a form, by field.
        is_json: which kind it is.
    """

    value: Any
    files: Mapping[str, UploadFile]
    is_json: bool


async def read_body(request: Request, files: Sequence[str]) -> Body:
    """Read a JSON body, or a form in which no field occurs twice and only the fields in `files` may be files.

    `request.close` closes the files.

    Args:
        request: one whose body was not read yet.
        files: fields that may be files.

    Raises:
        HTTPException, PayloadTooLarge: the body cannot be read.
        InvalidRequest: it is neither of both, or not valid, or the form has a field that it may not have.
    """
    kind = media_type(request)
    if kind == JSON:
        return Body(parse_json(await request.body(), ORDERS), {}, True)
    if kind != FORM:
        raise InvalidRequest(
            "The body is neither a multipart form nor JSON.",
            remedy=f"Send application/json, or {FORM} with the files {', '.join(files)}.",
        )
    form = await request.form()
    for name, value in form.multi_items():
        if len(form.getlist(name)) > 1:
            raise InvalidRequest(f"The form field {name[:80]!r} comes twice.", remedy="Send each field once.")
        if isinstance(value, UploadFile) and name not in files:
            raise InvalidRequest(f"The form field {name[:80]!r} is no file.", remedy=f"Files are {', '.join(files)}.")
    return Body(
        {name: value for name, value in form.items() if isinstance(value, str)},
        {name: value for name, value in form.items() if isinstance(value, UploadFile)},
        False,
    )


def media_type(request: Request) -> str:
    """The Content-Type without its parameters, in lower case; empty if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_json(body: bytes, bounds: Bounds = TEXTS) -> Any:
    """A body's JSON, in time and memory that its size and the bounds limit; raises as `BoundedRequest.json`."""
    _check_json(body, bounds)
    try:
        value = from_json(body[3:] if body.startswith(b"\xef\xbb\xbf") else body, cache_strings="none")
    except ValueError as exc:
        raise _unreadable(body, str(exc)) from exc
    _check_names(value)
    return value


def _check_json(body: bytes, bounds: Bounds) -> None:
    """Refuse JSON that would take too long or too much memory to read, by what can be counted quickly."""
    if len(body) > bounds.wide_bytes and _is_wide(body):
        raise PayloadTooLarge(
            f"The body holds characters beyond U+FFFF and has more than {bounds.wide_bytes:,} bytes.", remedy=_SPLIT_IT
        )
    if len(body) > bounds.characters and _is_beyond_latin(body) and _characters(body) > bounds.characters:
        raise PayloadTooLarge(
            f"The body holds characters beyond U+00FF and has more than {bounds.characters:,} characters.",
            remedy=_SPLIT_IT,
        )
    if _has_long_number(body):
        body = _outside_texts(body, bounds)
        if _has_long_number(body):
            raise HTTPException(400, f"The body cannot be read: a number has more than {MAX_DIGITS:,} digits")
    if _excess(body, bounds) is not None:
        excess = _excess(_outside_texts(body, bounds), bounds)
        if excess is not None:
            raise _too_deep(body[:4096]) or excess


def _too_deep(start: bytes) -> Exception | None:
    """The error for a body that begins with more nesting than is read."""
    try:
        from_json(start)
    except ValueError as exc:
        return _unreadable(b"", str(exc)) if _RECURSION in str(exc) else None
    return None


def _excess(body: bytes, bounds: Bounds) -> InvalidRequest | None:
    """What a body may have too much of, if its texts are counted too."""
    names, containers = body.count(b":"), body.count(b"[") + body.count(b"{")
    values = body.count(b",") + names + containers
    for count, most, what in (
        (names, bounds.names, "named values"),
        (containers, bounds.containers, "lists and objects"),
        (values, bounds.values, "values"),
    ):
        if count > most:
            return _too_many(what, most)
    return None


def _outside_texts(body: bytes, bounds: Bounds) -> bytes:
    """JSON without its names and texts, or refused for their number."""
    outside = bytearray()
    num_quotes = 0
    for piece in _without_escapes(body):
        rest = piece
        if num_quotes % 2:  # the piece begins within a text
            _, quote, rest = piece.partition(b'"')
            num_quotes += len(quote)
        num_quotes += rest.count(b'"')
        if num_quotes > 2 * bounds.values:
            raise _too_many("values", bounds.values)
        outside += _TEXT.sub(b"", rest).partition(b'"')[0]
    return cast(bytes, outside)


def _without_escapes(body: bytes) -> Iterator[bytes]:
    """A body piece by piece, without its escaped backslashes and quotation marks."""
    start = 0
    while start < len(body):
        end = start + PIECE
        if body[end - 1 : end] == b"\\":  # what it escapes belongs to the same piece
            end = _REST_OF_ESCAPE.match(body, end).end()  # type: ignore[union-attr]  # it matches anything
        yield bytes(body[start:end]).replace(b"\\\\", b"").replace(b'\\"', b"")
        start = end


def _too_many(what: str, most: int) -> InvalidRequest:
    return InvalidRequest(f"The body has more than {most:,} {what}.", remedy="Send less, or several requests.")


def _is_wide(body: bytes) -> bool:
    if b"\\ud" in body or b"\\uD" in body:
        return True
    return not body.isascii() and any(piece.translate(None, _BELOW_FOUR_BYTES) for piece in _pieces(body, 0))


def _is_beyond_latin(body: bytes) -> bool:
    if _ESCAPE_BEYOND_LATIN.search(body):
        return True
    return not body.isascii() and any(piece.translate(None, _LATIN) for piece in _pieces(body, 0))


def _characters(body: bytes) -> int:
    return sum(len(piece.translate(None, _CONTINUATION)) for piece in _pieces(body, 0))


def _has_long_number(body: bytes) -> bool:
    """Whether the body contains a longer run of digits than a number may have. Digits inside strings count too."""
    digits = b"0" * (MAX_DIGITS + 1)
    return len(body) > MAX_DIGITS and any(digits in piece.translate(_AS_ZERO) for piece in _pieces(body, MAX_DIGITS))


def _pieces(body: bytes, overlap: int) -> Iterator[bytes]:
    """The body in pieces: a whole copy would take memory that the limits do not allow for."""
    return (body[at : at + PIECE + overlap] for at in range(0, len(body), PIECE))


def _check_names(value: Any) -> None:
    """Refuse a field name that is too long: error messages quote names, and each quotation copies the name."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if any(len(name) > MAX_NAME for name in item):
                raise InvalidRequest(
                    f"A name in the body has more than {MAX_NAME} characters.", remedy="See /docs for the fields."
                )
            waiting += [part for part in item.values() if isinstance(part, dict | list)]
        elif isinstance(item, list):
            waiting += [part for part in item if isinstance(part, dict | list)]


def _unreadable(body: bytes, why: str) -> Exception:
    """The error for a body that is not JSON, or that no parser takes."""
    try:
        body.decode()
    except UnicodeDecodeError as exc:
        return HTTPException(400, f"The body cannot be read: it is not UTF-8 at byte {exc.start:,}")
    if _RECURSION in why:
        return HTTPException(400, "The body cannot be read: it is nested too deeply")
    if "surrogate" in why or "escape" in why:
        return InvalidRequest(
            "The body holds a broken escape, or half of a surrogate pair, which is not text.",
            remedy="Send characters whole.",
        )
    return InvalidRequest(f"The body is not valid JSON: {why}.", remedy="Send one JSON value, in UTF-8.")


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that a misspelt one is most like, if there is one; none for names longer than any known one."""
    near = difflib.get_close_matches(name, known, n=1) if len(name) <= 2 * max(map(len, known), default=0) else []
    return near[0] if near else None


def misfit(exc: ValidationError) -> RequestValidationError:
    """Convert a pydantic ValidationError into the error that FastAPI raises for bodies that it validates itself.

    For a field with a union type, pydantic reports one error for each member, and puts its own name for the member into
    the location; these names are removed.
    """
    problems: dict[tuple[int | str, ...], dict[str, Any]] = {}
    for problem in exc.errors(include_url=False):
        place = _place(problem["loc"], is_unknown=problem["type"] in UNKNOWN)
        other = problems.get(place)
        message = problem["msg"] if other is None else f"{other['msg']}, or: {problem['msg']}"
        problems[place] = {**problem, "loc": ("body", *place), "msg": message}
    above = {place[:length] for place in problems for length in range(len(place))}
    return RequestValidationError([problem for place, problem in problems.items() if place not in above])


def _place(location: tuple[int | str, ...], *, is_unknown: bool) -> tuple[int | str, ...]:
    """Names and numbers of a request's parts, without those of pydantic's kinds."""
    last = len(location) - 1
    return tuple(
        part
        for place, part in enumerate(location)
        if not isinstance(part, str) or (is_unknown and place == last) or (part.isidentifier() and part not in KINDS)
    )
