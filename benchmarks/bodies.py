"""What the worst bodies cost a server: how long its event loop stands still, and by how much its memory grows.

Every route of /openapi.json that takes a body is sent, one after the other, the worst that fits within its limit: many
names, values, items, texts and errors, deep nesting, long names, huge numbers, texts full of escapes or of wide
characters, each as the whole body and in each of the body's fields; forms with large fields and files, many parts, long
headers, and files full of what looks like a boundary.

In the server's process a task sleeps 5 ms at a time and notes by how much it wakes too late: the loop's lag. Of that,
only what the process itself has computed meanwhile counts, or a neighbour on the same cores would be measured. Memory
is the peak of the resident set above what it was before the request, once what was freed had been given back.

    python benchmarks/bodies.py                    # all of them, some minutes
    python benchmarks/bodies.py --short            # a sample, 20 seconds

Prints a table and, last, one line of JSON. Ends with 1 if a lag is over 100 ms, or memory grows by more than three
times the route's limit (JSON) or the body (forms, which may be larger and lie on disk).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fastapi import FastAPI
from tqdm import tqdm

from server import serve as server_serve
from server.api.app import create_app
from server.api.bodies import ORDERS, TEXTS, Bounds
from server.api.limits import MAX_JSON_BYTES, MAX_ORDER_BYTES, json_limit

MOST_LAG_MS = 100.0
MOST_MEMORY = 3
NOISE_BYTES = 8 * 2**20
"""What a request may add whatever its body is: caches that are filled once, threads' stacks."""
FORM_BYTES = 24 * 2**20
REPLY_SECONDS = 60.0
BOUNDARY = b"x"
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """A request."""

    method: str
    path: str
    shape: str
    parts: tuple[bytes, ...]
    """Of the body; those that are large are shared with other cases."""
    content_type: str
    limit: int

    @property
    def body(self) -> bytes:
        """All of it."""
        return b"".join(self.parts)

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return sum(map(len, self.parts))


@dataclass(frozen=True)
class Cost:
    """What one came to."""

    status: int
    seconds: float
    lag_ms: float
    grown: int


def _filled(item: str, size: int, count: int, opening: str = "[", closing: str = "]") -> str:
    """As many copies of an item as fit."""
    return opening + ",".join([item] * min(count, size // (len(item) + 1))) + closing


def _named(value: str, size: int, count: int, name: str = "f{:06d}") -> str:
    each = len(name.format(0)) + len(value) + 4
    return "{" + ",".join(f'"{name.format(n)}":{value}' for n in range(min(count, size // each))) + "}"


def values(size: int, bounds: Bounds) -> dict[str, str]:
    """The worst values that are read, none longer than `size` bytes, as JSON."""
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
        "long names": _named("1", size, names, "{:0500d}"),
        "objects of many names": _filled('{"a":1,"b":[]}', size, names // 2),
        "messages": _filled('{"role":"user","content":"a"}', size, names // 2),
        "parts": _filled('{"type":"text","text":"a"}', size, names // 2),
        "one name over and over": _named("1", size, names, "a"),
    }


def refused(size: int) -> dict[str, str]:
    """What is refused before it is read, as large as it may arrive."""
    return {
        "too many values": _filled("1", size, size),
        "too many lists": _filled("[]", size, size),
        "too many texts": _filled('""', size, size),
        "too many names": _named("1", size, size),
        "too many names in texts": json.dumps(_named("1", size // 2, size)),
        "too deep": "[" * size,
        "too huge a number": "1" * size,
        "too huge a number in a text": '"' + "1" * (size - 2) + '"',
        "too long a name": '{"' + "a" * (size - 8) + '":1}',
        "too wide": '"\U0001f600' + "a" * (size - 8) + '"',
        "a text without an end": '"' + "a" * (size - 2),
        "quotes": '"' * size,
        "backslashes": '"' + "\\" * (size - 2),
    }


@dataclass(frozen=True)
class Shapes:
    """What bodies are made of: JSON that is read, JSON that is refused, and contents of forms."""

    values: dict[str, bytes]
    refused: dict[str, bytes]
    contents: dict[str, bytes]

    @classmethod
    def of(cls, limit: int, bounds: Bounds, form_bytes: int) -> Shapes:
        """All of them within a limit of JSON, and contents of forms in this size."""
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
    """A route's worst bodies of JSON."""

    def case(shape: str, *parts: bytes) -> Case:
        limit = json_limit(f"{method} {path}")
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
    """A schema's fields, and those of the objects in them."""
    for name, field in schema.get("properties", {}).items():
        yield (name,)
        for kind in [field, *field.get("anyOf", ())]:
            if depth > 1 and "properties" in kind:
                yield from ((name, *inner) for inner in places(kind, depth - 1))


def put(body: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A body with something in one place of it."""
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
                    is_order = json_limit(f"{method.upper()} {address}") == MAX_ORDER_BYTES
                    yield from json_cases(method.upper(), address, schema, orders if is_order else texts)
                else:
                    assert kind == "multipart/form-data", kind
                    yield from form_cases(method.upper(), address, schema, orders)


def measure(port: int, process: int, case: Case) -> Cost:
    """Send one, and look at the server."""
    ask(port, "GET", "/bench/lag")
    status = Path(f"/proc/{process}/status")
    with contextlib.suppress(OSError):
        Path(f"/proc/{process}/clear_refs").write_text("5")
    before = _kilobytes(status, "VmRSS")
    began = time.perf_counter()
    answer, _ = ask(port, case.method, case.path, case.body, {"Content-Type": case.content_type})
    seconds = time.perf_counter() - began
    time.sleep(0.02)
    grown = max(0, _kilobytes(status, "VmHWM") - before) * 1024
    lag = json.loads(ask(port, "GET", "/bench/lag")[1])["lag_ms"]
    return Cost(answer, seconds, lag, grown)


def _kilobytes(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))


def ask(
    port: int, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of a reply; 0 where the server hung up, 599 where it did not answer in time."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REPLY_SECONDS)
    try:
        connection.request(method, path, body, headers or {})
        reply = connection.getresponse()
        return reply.status, reply.read()
    except (BrokenPipeError, ConnectionResetError):
        return 0, b""
    except TimeoutError:
        return 599, b""
    finally:
        connection.close()


def serve(port: int, folder: Path) -> None:
    """The server, with the probe in it."""

    def probed(*arguments: Any) -> FastAPI:
        app = create_app(*arguments)
        worst = [0.0]
        libc = ctypes.CDLL(None)

        async def watch() -> None:
            while True:
                began, computed = time.perf_counter(), time.process_time()
                await asyncio.sleep(0.005)
                late = time.perf_counter() - began - 0.005
                worst[0] = max(worst[0], min(late, time.process_time() - computed))

        tasks: list[asyncio.Task[None]] = []

        @app.get("/bench/lag", include_in_schema=False)
        async def lag() -> dict[str, float]:
            if not tasks:
                tasks.append(asyncio.create_task(watch()))
            found, worst[0] = worst[0], 0.0
            if hasattr(libc, "malloc_trim"):
                libc.malloc_trim(0)
                await asyncio.sleep(0.01)
                worst[0] = 0.0
            return {"lag_ms": 1000 * found}

        return app

    settings = server_serve.Settings.load(
        port=port, prompts_dir=folder / "prompts", jobs_dir=folder / "jobs", store=f"file:{folder / 'store'}"
    )
    with mock.patch.object(server_serve, "create_app", probed):
        server_serve.serve(settings)


@contextmanager
def started(folder: Path) -> Iterator[tuple[int, int]]:
    """A server of its own; answers its port and its process."""
    shutil.copytree(ROOT / "prompts/sms_spam", folder / "prompts/sms_spam")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRELUDE_")}
    command = [sys.executable, __file__, "--serve", str(port), "--folder", str(folder)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env={**environment, "HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if ask(port, "GET", "/ready")[0] == 200:
                    break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server does not start:\n{(folder / 'log').read_text()[-3000:]}")
            time.sleep(0.3)
        yield port, process.pid
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_over(case: Case, cost: Cost) -> bool:
    """Whether a case misses the target."""
    allowed = MOST_MEMORY * (case.limit or case.size) + NOISE_BYTES
    return cost.lag_ms > MOST_LAG_MS or cost.grown > allowed or cost.status >= 500


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a sample of them")
    parser.add_argument("--sample", type=int, help="so many of them, chosen at random")
    parser.add_argument("--only", default="", help="routes whose path holds this")
    parser.add_argument("--rows", type=int, default=15, help="how many of the worst to print")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder)
        return
    with tempfile.TemporaryDirectory(prefix="prelude-bodies-") as folder, started(Path(folder)) as (port, process):
        document = json.loads(ask(port, "GET", "/openapi.json")[1])
        form_bytes = FORM_BYTES // (6 if options.short else 1)
        cases = [case for case in cases_of(document, form_bytes) if options.only in case.path]
        routes = {(case.method, case.path) for case in cases}
        count = options.sample or (80 if options.short else len(cases))
        cases = random.Random(7).sample(cases, min(count, len(cases)))
        measure(port, process, cases[0])  # the first request of all fills caches
        found: list[tuple[Case, Cost]] = []
        for case in tqdm(cases, desc="bodies", unit="body", mininterval=1 if sys.stderr.isatty() else 30):
            cost = measure(port, process, case)
            if is_over(case, cost):  # once more: a first time may have been another's fault
                again = measure(port, process, case)
                cost = min(cost, again, key=lambda one: (is_over(case, one), one.lag_ms))
            found.append((case, cost))
    over = [(case, cost) for case, cost in found if is_over(case, cost)]
    print(f"\n{len(found):,} bodies to {len(routes)} routes; the slowest and the largest, and what misses the target\n")
    slowest = sorted(found, key=lambda one: -one[1].lag_ms)[: options.rows]
    largest = sorted(found, key=lambda one: -one[1].grown)[: options.rows]
    print(f"{'route':<32} {'body':<58} {'MiB':>6} {'status':>6} {'s':>6} {'lag, ms':>8} {'grown, MiB':>10}")
    for case, cost in dict.fromkeys([*over, *slowest, *largest]):
        print(
            f"{case.method + ' ' + case.path:<32.32} {case.shape:<58.58} {case.size / 2**20:>6.1f} {cost.status:>6} "
            f"{cost.seconds:>6.2f} {cost.lag_ms:>8.1f} {cost.grown / 2**20:>10.1f}{'  MISSED' * is_over(case, cost)}"
        )
    worst = {
        "bodies": len(found),
        "routes": len(routes),
        "missed": len(over),
        "lag_ms": round(max(cost.lag_ms for _, cost in found), 1),
        "grown_mib_json": round(max((cost.grown for case, cost in found if case.limit), default=0) / 2**20, 1),
        "grown_mib_form": round(max((cost.grown for case, cost in found if not case.limit), default=0) / 2**20, 1),
    }
    print(json.dumps(worst))
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    main()
