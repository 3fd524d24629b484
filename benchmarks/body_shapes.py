"""The worst bodies within a server's limits, for each route of an OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from server.api.bodies import MAX_NAME, ORDERS, TEXTS, Bounds
from server.api.body_sizes import MAX_JSON_BYTES, MAX_ORDER_BYTES, json_limit
from server.api.jobs.table import KINDS

JOB_PATHS = [kind.router.prefix for kind in KINDS]

BOUNDARY = b"x"


@dataclass(frozen=True)
class Case:
    """A request."""

    method: str
    path: str
    shape: str
    parts: tuple[bytes, ...]
    """The parts of the body; large parts are shared between cases."""
    content_type: str
    limit: int

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(self.parts)

    @property
    def size(self) -> int:
        """Size of the body in bytes."""
        return sum(map(len, self.parts))


def _filled(item: str, size: int, count: int, opening: str = "[", closing: str = "]") -> str:
    """A list with as many copies of an item as fit."""
    return opening + ",".join([item] * min(count, size // (len(item) + 1))) + closing


def _named(value: str, size: int, count: int, name: str = "f{:06d}") -> str:
    each = len(name.format(0)) + len(value) + 4
    return "{" + ",".join(f'"{name.format(n)}":{value}' for n in range(min(count, size // each))) + "}"


def values(size: int, bounds: Bounds) -> dict[str, str]:
    """The worst accepted values as JSON, each at most `size` bytes."""
    count, lists, names = bounds.values - 64, bounds.containers - 64, bounds.names - 64
    wide = min(size, bounds.wide_bytes - 2**12)
    return {
        "a text": '"' + "a" * size + '"',
        "escapes": '"' + "\\u00e9" * (size // 6) + '"',
        "a text with one wide character": '"\U0001f600' + "a" * (wide - 8) + '"',
        "a text with one escaped wide character": '"\\ud83d\\ude00' + "a" * (wide - 16) + '"',
        "a text with one character of two bytes": '"\u4e00' + "a" * (size - 8) + '"',
        "many ids": _filled("7", size, count),
        "many texts": _filled('"ab"', size, count),
        "long texts": _filled('"' + "a" * (size // 129) + '"', size, 128),
        "many lists": _filled("[]", size, lists),
        "lists of ids": _filled(_filled("7", size, count // 130), size, 128),
        "many objects": _filled("{}", size, lists),
        "deep": "[" * 190 + "]" * 190,
        "many deep": _filled("[" * 190 + "]" * 190, size, lists // 190),
        "many numbers": _filled("1.2345e5", size, count),
        "huge numbers": _filled("1" * 1000, size, count),
        "many names": _named("1", size, names),
        "names of texts": _named('"' + "a" * (size // names - 20) + '"', size, names),
        "long names": _named("1", size, names, f"{{:0{MAX_NAME}d}}"),
        "objects of many names": _filled('{"a":1,"b":[]}', size, names // 2),
        "messages": _filled('{"role":"user","content":"a"}', size, names // 2),
        "parts": _filled('{"type":"text","text":"a"}', size, names // 2),
        "one name over and over": _named("1", size, names, "a"),
    }


def refused(size: int) -> dict[str, str]:
    """Values that are refused before they are parsed, as large as the limit allows."""
    return {
        "too many values": _filled("1", size, size),
        "too many lists": _filled("[]", size, size),
        "too many texts": _filled('""', size, size),
        "too many names": _named("1", size, size),
        "too many names in texts": json.dumps(_named("1", size // 2, size)),
        "too deep": "[" * size,
        "too huge a number": "1" * size,
        "too huge a number in a text": '"' + "1" * (size - 2) + '"',
        "too long names": _named("1", size, TEXTS.names - 64, "{:0500d}"),
        "too long a name": '{"' + "a" * (size - 8) + '":1}',
        "too wide": '"\U0001f600' + "a" * (size - 8) + '"',
        "a text without an end": '"' + "a" * (size - 2),
        "quotes": '"' * size,
        "backslashes": '"' + "\\" * (size - 2),
    }


@dataclass(frozen=True)
class Shapes:
    """The material of bodies: JSON that is accepted, JSON that is refused, and contents of forms."""

    values: dict[str, bytes]
    refused: dict[str, bytes]
    contents: dict[str, bytes]

    @classmethod
    def of(cls, limit: int, bounds: Bounds, form_bytes: int) -> Shapes:
        """All shapes within a limit on JSON, with form contents of this size."""
        contents = {
            "letters": b"a" * form_bytes,
            "line breaks": b"\r\n" * (form_bytes // 2),
            "half a boundary": b"\r\n--" * (form_bytes // 4),
            "rows": b'{"input": "a", "target": "b"}\n' * (form_bytes // 30),
            "empty lists": b"[]\n" * (form_bytes // 3),
            "empty lines": b"\n" * form_bytes,
        }
        return cls(
            {shape: text.encode() for shape, text in values(limit - 2**12, bounds).items()},
            {shape: text.encode() for shape, text in refused(limit - 2).items()},
            contents,
        )


def json_cases(method: str, path: str, schema: dict[str, Any], shapes: Shapes) -> Iterator[Case]:
    """A route's worst JSON bodies."""

    def case(shape: str, *parts: bytes) -> Case:
        limit = json_limit(f"{method} {path}", JOB_PATHS)
        assert sum(map(len, parts)) <= limit, shape
        return Case(method, path, shape, parts, "application/json", limit)

    for shape, text in {**shapes.refused, **shapes.values}.items():
        yield case(shape, text)
    example = dict((schema.get("examples") or [{}])[0])
    for place in [*places(schema), ("nobody_knows_it",)]:
        bodies = {".".join(place): put(example, place, "@@")}
        if place in (("prompt",), ("messages",)):
            bodies[f"{place[0]} with echo"] = put({**example, "echo": True, "logprobs": 1}, place, "@@")
        for name, body in bodies.items():
            before, after = json.dumps(body).encode().split(b'"@@"')
            for shape, text in shapes.values.items():
                yield case(f"{name}: {shape}", before, text, after)


def places(schema: dict[str, Any], depth: int = 2) -> Iterator[tuple[str, ...]]:
    """The paths of a schema's fields, including fields of nested objects."""
    for name, field in schema.get("properties", {}).items():
        yield (name,)
        for kind in [field, *field.get("anyOf", ())]:
            if depth > 1 and "properties" in kind:
                yield from ((name, *inner) for inner in places(kind, depth - 1))


def put(body: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of a body with a value at this path."""
    name, *rest = place
    inner = body.get(name)
    return {**body, name: put(inner if isinstance(inner, dict) else {}, tuple(rest), value) if rest else value}


def form_cases(method: str, path: str, schema: dict[str, Any], shapes: Shapes) -> Iterator[Case]:
    """A route's worst forms."""
    properties = schema["properties"]
    files = [
        name for name, field in properties.items() if "binary" in json.dumps(field) or "octet" in json.dumps(field)
    ]

    def case(shape: str, *parts: bytes, end: bytes = b"--x--\r\n", boundary: bytes = BOUNDARY) -> Case:
        content_type = f"multipart/form-data; boundary={boundary.decode()}"
        return Case(method, path, shape, (*parts, end), content_type, 0)

    def part(name: str, content: bytes, filename: str | None = None, headers: bytes = b"") -> tuple[bytes, ...]:
        file = "" if filename is None else f'; filename="{filename}"'
        head = f'--x\r\nContent-Disposition: form-data; name="{name}"{file}\r\n'.encode() + headers
        return head + b"\r\n", content, b"\r\n"

    task = part("task", b"sms_spam") if "task" in properties else part("spec", b'{"task": "mood"}')
    known = task if "task" in properties or "spec" in properties else ()
    row = b'{"input": "a", "target": "b"}\n'
    for name in files:
        data = part("data", row, "a.jsonl") if name == "references" else ()
        for shape, content in shapes.contents.items():
            yield case(f"{name}: a file of {shape}", *known, *data, *part(name, content, "a.jsonl"))
    for name in properties:
        for shape, content in shapes.contents.items():
            yield case(f"{name}: a field of {shape}", *known, *part(name, content))
    letters = shapes.contents["letters"]
    size = len(letters)
    yield case("many parts", b"".join(part("files", b"", "a")) * (size // 70))
    yield case("many fields", b"".join(part("task", b"")) * (size // 60))
    yield case("a long header", b'--x\r\nContent-Disposition: form-data; name="data"\r\nX: ', letters, b"\r\n\r\n\r\n")
    yield case("many headers", *part("data", b"", "a", b"X: a\r\n" * (size // 6)))
    yield case("a long file name", *part("data", b"", "a" * size))
    yield case("a long name", *part("a" * size, b""))
    yield case("letters before the boundary", letters)
    yield case("line breaks before the boundary", shapes.contents["line breaks"])
    yield case("boundaries behind the last one", *known, b"--x--\r\n", b"\r\n--x\r\n" * (size // 8), end=b"")
    yield case("no end", *known, *part(files[0] if files else "a", letters, "a"), end=b"")
    if "spec" in properties:
        for shape, text in {**values(2**20 - 2**10, ORDERS), **refused(2**20 - 2**10)}.items():
            yield case(f"spec: {shape}", *part("spec", text.encode()), *part("data", b"", "a"))


def cases_of(document: dict[str, Any], form_bytes: int) -> Iterator[Case]:
    """The cases of every route that takes a body."""
    schemas = document["components"]["schemas"]

    def whole(schema: Any, depth: int = 8) -> Any:
        if isinstance(schema, list):
            return [whole(item, depth) for item in schema]
        if not isinstance(schema, dict) or depth == 0:
            return schema
        if "$ref" in schema:
            return whole(schemas[schema["$ref"].rpartition("/")[2]], depth - 1)
        return {name: whole(item, depth) for name, item in schema.items()}

    texts = Shapes.of(MAX_JSON_BYTES, TEXTS, form_bytes)
    orders = Shapes.of(MAX_ORDER_BYTES, ORDERS, form_bytes)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                address = path.replace("{task}", "sms_spam").replace("{version}", "1").replace("{", "").replace("}", "")
                schema = whole(content["schema"])
                if kind == "application/json":
                    is_order = json_limit(f"{method.upper()} {address}", JOB_PATHS) == MAX_ORDER_BYTES
                    yield from json_cases(method.upper(), address, schema, orders if is_order else texts)
                else:
                    assert kind == "multipart/form-data", kind
                    yield from form_cases(method.upper(), address, schema, orders)
