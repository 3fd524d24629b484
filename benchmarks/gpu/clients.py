"""Streaming clients that are cheap enough not to affect the measurement: plain sockets in separate processes.

    python benchmarks/gpu/clients.py PORT STREAMS WARM_UP SECONDS TOKENS

Prints one line of JSON: received tokens, seconds to each first token, and the number of replies that were not streams.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

INPUT = "Which of these is the right answer, and why? " * 3


class Counts:
    """The counts of all clients of a process between two times."""

    def __init__(self, begin: float, end: float) -> None:
        self.begin, self.end = begin, end
        self.tokens = 0
        self.first: list[float] = []
        self.refused: list[str] = []


async def client(port: int, number: int, tokens: int, counts: Counts) -> None:
    """Send requests repeatedly, with one connection for each stream."""
    turn = 0
    while time.monotonic() < counts.end:
        turn += 1
        # So that clients do not stay in step.
        new = 1 + (tokens * (number + turn) // 7) % tokens if turn == 1 else tokens
        asked = {"inputs": f"{number} {turn} {INPUT}", "parameters": {"max_new_tokens": new, "ignore_eos_token": True}}
        content = json.dumps(asked).encode()
        head = f"POST /generate_stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        await _read(reader, time.monotonic(), counts)
        writer.close()


async def _read(reader: asyncio.StreamReader, began: float, counts: Counts) -> None:
    status = await reader.readline()
    if b" 200 " not in status:
        counts.refused.append(status.decode(errors="replace").strip())
        await asyncio.sleep(0.2)
        return
    is_first = True
    while chunk := await reader.read(2**16):
        now, tokens = time.monotonic(), chunk.count(b"data:")
        if counts.begin <= now <= counts.end:
            counts.tokens += tokens
            if is_first and tokens:
                counts.first.append(now - began)
        is_first = is_first and not tokens


async def run(port: int, streams: int, warm_up: float, seconds: float, tokens: int) -> Counts:
    """Run all clients of this process."""
    begin = time.monotonic() + warm_up
    counts = Counts(begin, begin + seconds)
    tasks = [asyncio.create_task(client(port, number, tokens, counts)) for number in range(streams)]
    await asyncio.sleep(warm_up + seconds)
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            counts.refused.append(repr(ended))
    return counts


if __name__ == "__main__":
    port, streams, warm_up, seconds, tokens = map(float, sys.argv[1:])
    found = asyncio.run(run(int(port), int(streams), warm_up, seconds, int(tokens)))
    print(json.dumps({"tokens": found.tokens, "first": found.first, "refused": found.refused[:5]}))
