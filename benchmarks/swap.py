"""Measures how fast a published soft prompt answers, and how much swaps slow down other requests.

Starts `prelude serve` on loopback with a new store, and measures over HTTP:

    idle        from the PUT of a soft prompt to the first token of a request of thirty words for it, without other load
    idle, one   the same with a request of one word: nearly the swap alone
    load        like idle, while clients generate with other versions of the same tasks
    throughput  output tokens per second of those clients, in interleaved rounds: without swaps, with one publish a
                second (of a prefix that was never computed), with one activation (of a version whose prefix is known)

    python benchmarks/swap.py                      # all of it, some minutes
    python benchmarks/swap.py --publishes 20 --rounds 1 --seconds 5

Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from load import varied
from safetensors.torch import save
from tqdm import tqdm

WORDS = [
    "the",
    "weather",
    "in",
    "a",
    "small",
    "town",
    "was",
    "never",
    "as",
    "bad",
    "people",
    "said",
    "it",
    "would",
    "be",
]
INPUT_WORDS = 30
OUTPUT_TOKENS = 32
NUM_VIRTUAL_TOKENS = 100
TASKS = ("one", "two", "three")
SWAPS = ("none", "publish", "activate")
START_SECONDS = 120
KEPT = ("PRELUDE_DTYPE", "PRELUDE_MODEL", "PRELUDE_OPTIMISE")
"""Settings that are taken from the shell's environment."""


Form = list[tuple[str, tuple[str, bytes]]]


@dataclass
class Server:
    """The measured server."""

    client: httpx.AsyncClient
    hidden_size: int
    published: int = 0

    def form(self) -> Form:
        """A new random soft prompt, as an upload."""
        self.published += 1
        generator = torch.Generator().manual_seed(self.published)
        tensor = torch.randn(NUM_VIRTUAL_TOKENS, self.hidden_size, generator=generator) * 0.05
        config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": NUM_VIRTUAL_TOKENS, "task_type": "CAUSAL_LM"}
        return [
            ("files", ("adapter_config.json", json.dumps(config).encode())),
            ("files", ("adapter_model.safetensors", save({"prompt_embeddings": tensor}))),
        ]

    async def publish(self, task: str, form: Form | None = None) -> int:
        """Upload a new version; returns its number."""
        reply = await self.client.put(f"/prompts/{task}", files=form or self.form())
        assert reply.status_code == 201, reply.text
        version: int = reply.json()["version"]
        return version

    async def activate(self, task: str, version: int) -> None:
        """Make an existing version live."""
        reply = await self.client.post(f"/prompts/{task}/activate", json={"version": version})
        assert reply.status_code == 200, reply.text

    async def publish_to_first_token(self, task: str, words: int = INPUT_WORDS) -> tuple[float, float]:
        """Seconds from the upload's first byte to the reply, and to the first token of the new version."""
        form = self.form()
        started = time.perf_counter()
        version = await self.publish(task, form)
        replied = time.perf_counter()
        async with self.client.stream(
            "POST", "/generate_stream", params={"task": task}, json=body(1, words=words)
        ) as response:
            async for _ in response.aiter_lines():
                first_token = time.perf_counter()
                break
        assert response.headers["prelude-version"] == str(version), "an older version answered"
        return replied - started, first_token - started

    async def generate(self, dice: random.Random) -> int:
        """Send one request of the load; returns its output tokens."""
        tokens = varied(OUTPUT_TOKENS, dice)
        reply = await self.client.post("/generate", params={"task": dice.choice(TASKS)}, json=body(tokens, dice))
        assert reply.status_code == 200, reply.text
        return tokens


def body(max_new_tokens: int, dice: random.Random | None = None, words: int = INPUT_WORDS) -> dict[str, Any]:
    """The body of a request."""
    dice = dice or random.Random(0)
    text = " ".join(dice.choices(WORDS, k=words))
    return {"inputs": text, "parameters": {"max_new_tokens": max_new_tokens, "ignore_eos_token": True}}


class Load:
    """Clients that send one request after the other until the block ends, and count output tokens."""

    def __init__(self, server: Server, clients: int) -> None:
        self._server = server
        self._clients = clients
        self.tokens = 0

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(self._clients)]
        await asyncio.sleep(2)  # until all clients have started
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            assert isinstance(result, asyncio.CancelledError), result

    async def _ask(self, number: int) -> None:
        dice = random.Random(number)
        while True:
            # Not inline below: `+=` would use the old value from before the await.
            tokens = await self._server.generate(dice)
            self.tokens += tokens

    async def throughput(self, seconds: float, swap: str) -> float:
        """Output tokens per second over `seconds`, with one swap per second or none."""
        before, started = self.tokens, time.perf_counter()
        while (now := time.perf_counter() - started) < seconds:
            task, number = TASKS[int(now) % len(TASKS)], int(now)
            if swap == "publish":
                await self._server.publish(task)
            elif swap == "activate":  # the version that is not live, of the task's first two
                await self._server.activate(task, 1 + (number // len(TASKS) + 1) % 2)
            await asyncio.sleep(max(0.0, min(number + 1, seconds) - (time.perf_counter() - started)))
        return (self.tokens - before) / (time.perf_counter() - started)


async def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements."""
    for task in (*TASKS, *TASKS):
        await server.publish(task)
    result: dict[str, Any] = {}
    for name, words in (("idle", INPUT_WORDS), ("idle, one", 1)):
        times = [await server.publish_to_first_token("one", words) for _ in tqdm(range(options.publishes), name)]
        result[name] = summary(times)
    async with Load(server, options.clients) as load:
        loaded = []
        for i in tqdm(range(options.publishes), "load"):
            loaded.append(await server.publish_to_first_token(TASKS[i % len(TASKS)]))
            await asyncio.sleep(random.uniform(0, 0.3))
        result["load"] = summary(loaded)
        rates: dict[str, list[float]] = {swap: [] for swap in SWAPS}
        for swap in tqdm(SWAPS * options.rounds, "throughput"):
            rates[swap].append(await load.throughput(options.seconds, swap))
    result["throughput"] = {
        swap: {
            "tokens_per_second": statistics.median(rates[swap]),
            "ratios": [rate / without for rate, without in zip(rates[swap], rates["none"], strict=True)],
        }
        for swap in SWAPS
    }
    return result


def summary(times: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Medians and tails in milliseconds."""
    replies, tokens = (sorted(column) for column in zip(*times, strict=True))
    return {
        "publishes": len(times),
        "reply_p50_ms": 1000 * statistics.median(replies),
        "first_token_p50_ms": 1000 * statistics.median(tokens),
        "first_token_p99_ms": 1000 * float(np.percentile(tokens, 99)),
        "first_token_max_ms": 1000 * tokens[-1],
    }


@contextmanager
def prelude_serve(folder: Path) -> Iterator[str]:
    """Context manager: start a server; yields its address."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRELUDE_")}
    environment |= {name: os.environ[name] for name in KEPT if name in os.environ}
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--prompts-dir", str(folder / "prompts")]
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stderr=output)
    try:
        end = time.monotonic() + START_SECONDS
        while "ready on " not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield log.read_text().split("ready on ")[1].split()[0]
    finally:
        process.terminate()
        process.wait(60)


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start the server, measure, stop it."""
    with tempfile.TemporaryDirectory(prefix="prelude-swap-") as folder, prelude_serve(Path(folder)) as url:
        limits = httpx.Limits(max_connections=options.clients + 8)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            info = (await client.get("/info")).json()
            result = await measure(Server(client, info["hidden_size"]), options)
    machine = f"{os.cpu_count()} cores {platform.machine()}"
    return {"model": info["model"], "dtype": info["dtype"], "machine": machine, **result}


def main() -> None:
    """Parse the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publishes", type=int, default=200, help="of each latency")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of rounds of the throughput")
    parser.add_argument("--seconds", type=float, default=15.0, help="of a round of the throughput")
    result = asyncio.run(run(parser.parse_args()))
    print(f"\n{result['model']}, {result['dtype']}, {NUM_VIRTUAL_TOKENS} virtual tokens, {result['machine']}")
    print(f"{'publish to first token':<28}{'p50':>8}{'p99':>8}{'max':>8}   (reply p50)")
    for name in ("idle", "idle, one", "load"):
        row = result[name]
        print(
            f"{name:<28}{row['first_token_p50_ms']:>5.0f} ms{row['first_token_p99_ms']:>5.0f} ms"
            f"{row['first_token_max_ms']:>5.0f} ms   ({row['reply_p50_ms']:.0f} ms)"
        )
    for swap, row in result["throughput"].items():
        ratios = ", ".join(f"{ratio:.2f}" for ratio in row["ratios"])
        ratio = statistics.median(row["ratios"])
        print(f"{swap:<12}{row['tokens_per_second']:>6.0f} output tokens/s, {ratio:.3f} of none (rounds: {ratios})")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
