"""The actions of the clients of `soak.py`, and the replies that each allows."""

from __future__ import annotations

import asyncio
import io
import json
import random
import zipfile
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch
from safetensors.torch import save

TASKS = [f"soak-{i}" for i in range(8)]
WORDS = ["the", "weather", "in", "a", "small", "town", "was", "never", "as", "bad", "people", "said", "it", "would"]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
GONE = 404
"""Always allowed, because a task or version may be deleted between any two requests."""


@dataclass
class Soak:
    """A server under test and the results.

    Attributes:
        done: number of replies by action and status.
        unexpected: unexpected results.
        memory: the server's resident bytes over time, as (seconds, bytes).
    """

    client: httpx.AsyncClient
    hidden_size: int
    done: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    async def ask(self, name: str, allowed: set[int], method: str, path: str, **options: Any) -> httpx.Response | None:
        """Send one request; records a status that is not allowed."""
        try:
            reply = await self.client.request(method, path, **options)
        except httpx.HTTPError as exc:
            self.unexpected.append(f"{name}: {exc!r}")
            return None
        self.done[f"{name} {reply.status_code}"] += 1
        if reply.status_code not in allowed:
            self.unexpected.append(f"{name}: {reply.status_code} {reply.text[:300]}")
            return None
        return reply

    def check(self, name: str, is_so: bool, reply: object) -> None:
        """Record a reply that does not match its request."""
        if not is_so:
            self.unexpected.append(f"{name}: {str(reply)[:300]}")

    def upload(self, dice: random.Random) -> list[tuple[str, tuple[str, bytes]]]:
        """The files of a new random soft prompt."""
        generator = torch.Generator().manual_seed(dice.getrandbits(40))
        tensor = torch.randn(dice.choice([5, 20, 100]), self.hidden_size, generator=generator) * 0.05
        return [
            ("files", ("adapter_config.json", json.dumps({"peft_type": "PROMPT_TUNING"}).encode())),
            ("files", ("adapter_model.safetensors", save({"prompt_embeddings": tensor}))),
        ]


def text(dice: random.Random) -> str:
    """A user's text, short or long."""
    return " ".join(dice.choices(WORDS, k=dice.choice([1, 10, 30, 200])))


async def generate(soak: Soak, dice: random.Random) -> None:
    """Generate text with a random choice of parameters."""
    parameters: dict[str, Any] = {"max_new_tokens": dice.randint(1, 24), "details": dice.random() < 0.3}
    some = (
        ("temperature", 0.8),
        ("top_k", 20),
        ("top_p", 0.9),
        ("min_p", 0.05),
        ("typical_p", 0.9),
        ("repetition_penalty", 1.2),
        ("frequency_penalty", 0.5),
        ("seed", 7),
        ("stop", [" the"]),
        ("top_n_tokens", 3),
        ("best_of", 3),
        ("decoder_input_details", True),
    )
    parameters |= {name: value for name, value in some if dice.random() < 0.15}
    inputs: Any = text(dice) if dice.random() < 0.9 else [text(dice) for _ in range(3)]
    query = {} if dice.random() < 0.1 else {"task": dice.choice(TASKS)}
    body = {"inputs": inputs, "parameters": parameters}
    reply = await soak.ask("generate", {200, GONE}, "POST", "/generate", params=query, json=body)
    if reply is not None and reply.status_code == 200:
        found = reply.json()
        soak.check(
            "generate", all("generated_text" in one for one in (found if isinstance(found, list) else [found])), found
        )


async def classify(soak: Soak, dice: random.Random) -> None:
    """Score labels."""
    body = {"inputs": text(dice), "parameters": {"choices": ["good", "bad", "neither of them", "goodness"]}}
    reply = await soak.ask("classify", {200, GONE}, "POST", "/generate", params={"task": dice.choice(TASKS)}, json=body)
    if reply is not None and reply.status_code == 200:
        total = sum(choice["probability"] for choice in reply.json()["choices"])
        soak.check("classify", abs(total - 1) < 1e-6, reply.text)


async def structured(soak: Soak, dice: random.Random) -> None:
    """Generate a text that must match a grammar."""
    grammar: Any = dice.choice([{"type": "regex", "value": "[0-9]{2}:[0-9]{2}"}, {"type": "json", "value": SCHEMA}])
    body = {"inputs": text(dice), "parameters": {"grammar": grammar, "max_new_tokens": 40, "temperature": 1.0}}
    reply = await soak.ask("structured", {200}, "POST", "/generate", json=body)
    if reply is not None and grammar["type"] == "regex":
        said = reply.json()["generated_text"]
        soak.check("structured", len(said) == 5 and said[2] == ":", said)


async def stream(soak: Soak, dice: random.Random) -> None:
    """Open a stream and read it to its end, read it slowly, or disconnect."""
    leave = dice.randint(1, 10) if dice.random() < 0.4 else None
    body = {"inputs": text(dice), "parameters": {"max_new_tokens": 30, "ignore_eos_token": True}}
    query, events = {"task": dice.choice(TASKS)}, 0
    try:
        async with soak.client.stream("POST", "/generate_stream", params=query, json=body) as reply:
            soak.done[f"stream {reply.status_code}"] += 1
            async for line in reply.aiter_lines():
                events += line.startswith("data:")
                if leave is not None and events >= leave:
                    return
                if dice.random() < 0.02:
                    await asyncio.sleep(0.5)
            soak.check("stream", reply.status_code == GONE or events == 30, f"{reply.status_code}, {events} events")
    except httpx.HTTPError as exc:
        soak.unexpected.append(f"stream: {exc!r}")


async def openai(soak: Soak, dice: random.Random) -> None:
    """Call OpenAI's two routes."""
    model = dice.choice(TASKS)
    if dice.random() < 0.5:
        body: dict[str, Any] = {
            "model": model,
            "prompt": [text(dice), text(dice)],
            "max_tokens": 8,
            "logprobs": 2,
            "n": 2,
        }
        reply = await soak.ask("completions", {200, GONE}, "POST", "/v1/completions", json=body)
        if reply is not None and reply.status_code == 200:
            soak.check("completions", len(reply.json()["choices"]) == 4, reply.text)
        return
    body = {"model": model, "messages": [{"role": "user", "content": text(dice)}], "max_tokens": 8, "stream": True}
    reply = await soak.ask("chat", {200, GONE}, "POST", "/v1/chat/completions", json=body)
    if reply is not None and reply.status_code == 200:
        soak.check("chat", reply.text.rstrip().endswith("data: [DONE]"), reply.text[-300:])


async def swap(soak: Soak, dice: random.Random) -> None:
    """Change a task."""
    task = dice.choice(TASKS)
    kind = dice.random()
    if kind < 0.4:
        query = {"activate": dice.choice(["true", "false"])}
        await soak.ask("publish", {200, 201}, "PUT", f"/prompts/{task}", params=query, files=soak.upload(dice))
    elif kind < 0.5:
        await soak.ask("dry run", {200}, "PUT", f"/prompts/{task}", params={"dry_run": "true"}, files=soak.upload(dice))
    elif kind < 0.7:
        await soak.ask("roll back", {200, 404, 409}, "POST", f"/prompts/{task}/rollback")
    elif kind < 0.75:
        await soak.ask("delete", {204, 404}, "DELETE", f"/prompts/{task}")
    else:
        found = await soak.ask("versions", {200, 404}, "GET", f"/prompts/{task}/versions")
        if found is None or found.status_code == GONE:
            return
        numbers = [version["version"] for version in found.json()["versions"]]
        if len(numbers) > 5:
            await soak.ask("delete version", {204, 404, 409}, "DELETE", f"/prompts/{task}/versions/{numbers[-1]}")
        await soak.ask(
            "activate", {200, 404}, "POST", f"/prompts/{task}/activate", json={"version": dice.choice(numbers)}
        )


async def bad(soak: Soak, dice: random.Random) -> None:
    """Send a request that must be refused."""
    broken = io.BytesIO()
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("../adapter_config.json", "{}")
    headers = {"content-type": "application/json"}
    requests: list[tuple[set[int], str, str, dict[str, Any]]] = [
        ({422}, "POST", "/generate", {"json": {"inputs": ""}}),
        ({422}, "POST", "/generate", {"json": {"inputs": "x" * 100_000}}),
        ({413}, "POST", "/generate", {"json": {"inputs": "x" * 5_000_000}}),
        ({422}, "POST", "/generate", {"json": {"inputs": "x", "parameters": {"max_new_tokens": 10**6}}}),
        ({422}, "POST", "/generate", {"json": {"inputs": "x", "parameters": {"no_such": 1}}}),
        ({400, 422}, "POST", "/generate", {"content": b'{"inputs": "\xff"}', "headers": headers}),
        ({400, 422}, "POST", "/generate", {"content": b"[" * 50_000, "headers": headers}),
        ({422}, "POST", "/generate", {"content": b'{"inputs": "\\ud800"}', "headers": headers}),
        (
            {422},
            "POST",
            "/generate",
            {"json": {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "("}}}},
        ),
        ({404}, "POST", "/generate", {"params": {"task": "nobody"}, "json": {"inputs": "x"}}),
        ({400}, "POST", "/v1/chat/completions", {"json": {"model": "x", "messages": []}}),
        ({404}, "POST", "/v1/completions", {"json": {"model": "nobody", "prompt": "x"}}),
        ({400}, "POST", "/v1/completions", {"json": {"model": "nobody", "prompt": "x", "tools": []}}),
        ({422}, "PUT", f"/prompts/{dice.choice(TASKS)}", {"files": [("files", ("a.zip", broken.getvalue()))]}),
        ({422}, "PUT", f"/prompts/{dice.choice(TASKS)}", {"files": soak.upload(dice)[:1]}),
        ({404}, "GET", "/no/such/route", {}),
    ]
    allowed, method, path, options = dice.choice(requests)
    await soak.ask("bad", allowed, method, path, **options)


async def look(soak: Soak, dice: random.Random) -> None:
    """Read the status routes."""
    path = dice.choice(["/prompts", "/v1/models", "/info", "/health", "/ready", "/metrics", "/openapi.json"])
    await soak.ask("look", {200}, "GET", path)


Action = Callable[[Soak, random.Random], Awaitable[None]]
ACTIONS: dict[Action, int] = {
    generate: 30,
    classify: 10,
    structured: 5,
    stream: 20,
    openai: 20,
    swap: 6,
    bad: 15,
    look: 5,
}
