"""A hostile client: one request of each kind that once ended, hung or starved a server, again and again.

It runs in a process of its own, because what it builds and sends would otherwise slow the clients that a test times.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

JSON = {"Content-Type": "application/json"}
MiB = 2**20


@dataclass
class Hostile:
    """One client, its key, and what it was answered.

    Attributes:
        seconds: how long it waits for any one answer.
        statuses: the answers so far, by attack; 0 where the connection ended without one.
        held: connections that it keeps open and neither reads nor finishes.
    """

    port: int
    key: str
    task: str
    seconds: float = 20.0
    statuses: dict[str, list[int]] = field(default_factory=dict)
    held: list[socket.socket] = field(default_factory=list)

    def attack(self, name: str) -> None:
        """Do one of `ATTACKS` once."""
        status = 0
        with contextlib.suppress(OSError, http.client.HTTPException):
            status = ATTACKS[name](self)
        self.statuses.setdefault(name, []).append(status)

    def send(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> int:
        """POST a body and read the whole answer; its status."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.seconds)
        try:
            connection.request("POST", path, body, {**(headers or JSON), "Authorization": f"Bearer {self.key}"})
            reply = connection.getresponse()
            reply.read()
            return reply.status
        finally:
            connection.close()

    def generate(self, **parameters: Any) -> int:
        """Ask for a text of a task."""
        body = {"inputs": "x", "parameters": {"max_new_tokens": 20, **parameters}}
        return self.send(f"/generate?task={self.task}", json.dumps(body).encode())

    def grammar(self, kind: str, value: Any, **parameters: Any) -> int:
        """Ask for a text that matches a grammar."""
        return self.generate(grammar={"type": kind, "value": value}, **parameters)

    def open(self, data: bytes) -> None:
        """Send something and keep the connection; the oldest of many is closed."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(self.seconds)
        connection.connect(("127.0.0.1", self.port))
        self.held.append(connection)
        connection.sendall(data)
        if len(self.held) > 50:
            self.held.pop(0).close()

    def leave(self) -> None:
        """Close everything that is open."""
        for connection in self.held:
            connection.close()
        self.held.clear()


def _chain_of_references(client: Hostile) -> int:
    length = random.randrange(1_000, 10_000)
    definitions: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return client.grammar("json", {"$defs": {**definitions, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"})


def _deep_schema(client: Hostile) -> int:
    depth = random.randrange(200, 4_000)
    wrapper = random.choice(['{"allOf":[%s]}', '{"items":%s}', '{"anyOf":[%s,{"type":"null"}]}'])
    before, after = wrapper.split("%s")
    schema = before * depth + '{"type":"string"}' + after * depth
    body = '{"inputs":"x","parameters":{"max_new_tokens":1,"grammar":{"type":"json","value":' + schema + "}}}"
    return client.send(f"/generate?task={client.task}", body.encode())


def _endless_product(client: Hostile) -> int:
    numbers = random.sample([9_973, 9_967, 9_949, 9_941, 9_931, 9_929], 2)
    return client.grammar("json", {"allOf": [{"type": "integer", "multipleOf": n} for n in numbers]})


def _endless_intersection(client: Hostile) -> int:
    patterns = [{"pattern": f".*a.{{{i}}}b"} for i in range(1, random.randrange(15, 25))]
    return client.grammar("json", {"type": "string", "allOf": patterns})


def _many_required(client: Hostile) -> int:
    names = [f"n{i}" for i in range(random.randrange(20_000, 100_000))]
    return client.grammar("json", {"type": "object", "required": names})


def _slow_masks(client: Hostile) -> int:
    length = random.choice([50_000, 100_000, 200_000])
    return client.grammar("regex", f"a{{{length}}}", do_sample=True, best_of=64, max_new_tokens=100)


def _nested_repeats(client: Hostile) -> int:
    return client.grammar(
        "regex", random.choice(["((a{1,100}){1,100}){1,100}", "(a|aa|b?c)+" * 400, "(.{0,999}x){99}"])
    )


def _unknown_fields(client: Hostile) -> int:
    path = random.choice(["/training/jobs", "/evaluations", "/generate", "/v1/completions", "/tokenize"])
    fields = {f"f{i:06d}": 0 for i in range(random.randrange(1_000, 200_000))}
    return client.send(path, json.dumps({**fields, "task": client.task}).encode())


def _deep_body(client: Hostile) -> int:
    depth = random.randrange(100, MiB)
    return client.send(random.choice(["/generate", "/v1/chat/completions", "/evaluations"]), b'{"a":' * depth)


def _many_ids(client: Hostile) -> int:
    ids = b",".join([b"1"] * random.randrange(10_000, 1_900_000))
    return client.send("/v1/completions", b'{"model":"%s","echo":true,"prompt":[%s]}' % (client.task.encode(), ids))


def _huge_number(client: Hostile) -> int:
    return client.send("/generate", b'{"inputs":"x","parameters":{"seed":' + b"9" * MiB + b"}}")


def _large_references(client: Hostile) -> int:
    parts = {
        "task": client.task.encode(),
        "data": b'{"input":"a","target":"b"}\n' * 20,
        "references": b"[]\n" * (8 * MiB),
    }
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
        % (name.encode(), b"" if name == "task" else b'; filename="f.jsonl"', content)
        for name, content in parts.items()
    )
    return client.send("/evaluations", body + b"--b--\r\n", {"Content-Type": "multipart/form-data; boundary=b"})


def _endless_trailer(client: Hostile) -> int:
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nx: "
    client.open(head)
    with contextlib.suppress(OSError):
        for _ in range(256):
            client.held[-1].sendall(b"a" * 2**16)
    return 0


def _half_a_request(client: Hostile) -> int:
    for _ in range(20):
        client.open(
            random.choice([b"GET /hea", b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"])
        )
    return 0


def _unread_stream(client: Hostile) -> int:
    body = json.dumps(
        {
            "model": client.task,
            "prompt": "hello",
            "stream": True,
            "n": 20,
            "max_tokens": 100,
            "temperature": 1.0,
            "ignore_eos": True,
            "logprobs": 5,
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {client.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    client.open(head.encode() + body)
    return 0


def _gone_at_once(client: Hostile) -> int:
    body = json.dumps({"inputs": "word " * 300, "parameters": {"max_new_tokens": 100}}).encode()
    head = f"POST /generate?task={client.task} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {client.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", client.port), timeout=client.seconds) as connection:
            connection.sendall(head.encode() + body)
    return 0


def _control_tokens(client: Hostile) -> int:
    text = "".join(
        random.choices(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "system\n", "\x00", "\ud7ff", " "], k=99)
    )
    return client.send(f"/generate?task={client.task}", json.dumps({"inputs": text}).encode())


ATTACKS: dict[str, Callable[[Hostile], int]] = {
    "chain of references": _chain_of_references,
    "deep schema": _deep_schema,
    "endless product": _endless_product,
    "endless intersection": _endless_intersection,
    "many required names": _many_required,
    "slow masks": _slow_masks,
    "nested repeats": _nested_repeats,
    "unknown fields": _unknown_fields,
    "deep body": _deep_body,
    "many ids": _many_ids,
    "huge number": _huge_number,
    "large references": _large_references,
    "endless trailer": _endless_trailer,
    "half a request": _half_a_request,
    "unread stream": _unread_stream,
    "gone at once": _gone_at_once,
    "control tokens": _control_tokens,
}
"""What one request may try; each function does it once and answers the status, or 0 where there is none to read."""


def attack_for(port: int, key: str, task: str, seed: int, seconds: float) -> dict[str, list[int]]:
    """Attack with all of `ATTACKS` in random order until the time is over; the statuses by attack.

    What this process does to build its bodies would be done on another machine. It leaves the cores to the server, so
    that only what the server does for it counts.
    """
    os.nice(19)
    random.seed(seed)
    client = Hostile(port, key, task)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name in random.sample(sorted(ATTACKS), len(ATTACKS)):
            if time.monotonic() < end:
                client.attack(name)
    client.leave()
    return client.statuses
