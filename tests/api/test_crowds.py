"""Clients that vanish leave nothing behind, two thousand that stay are all answered, slow ones hold up nobody."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from urllib.parse import urlsplit

import psutil
import pytest

from server.serve import allow_many_connections
from tests.api.live import LiveServer, wait_until
from tests.soak import Soak

ALLOWED_GROWTH = 48 * 2**20
"""Of a process that also holds the clients; a leak of slots or of queues would be more."""


def stream_request(server: LiveServer, new_tokens: int) -> bytes:
    """A request for a stream, as bytes."""
    parameters = {"max_new_tokens": new_tokens, "ignore_eos_token": True}
    body = json.dumps({"inputs": "hello", "parameters": parameters}).encode()
    head = f"POST /generate_stream HTTP/1.1\r\nhost: {urlsplit(server.url).netloc}\r\nconnection: close\r\n"
    return head.encode() + f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def ask(server: LiveServer, new_tokens: int, *, leave: bool) -> bytes:
    """One client: reads its stream to the end, or leaves with its first event."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(stream_request(server, new_tokens))
        if leave:
            return await reader.readuntil(b"data:")
        return await reader.read()
    finally:
        writer.transport.abort()


async def ask_all(server: LiveServer, clients: int, new_tokens: int, *, leave: bool) -> Sequence[bytes]:
    """So many clients at once."""
    return await asyncio.gather(*(ask(server, new_tokens, leave=leave) for _ in range(clients)))


def test_a_thousand_clients_that_vanish_in_mid_stream_leave_nothing(own_server: LiveServer) -> None:
    process = psutil.Process()
    before = 0
    for round_number in range(4):
        asyncio.run(ask_all(own_server, 250, 150, leave=True))
        wait_until(lambda: own_server.is_idle, 20)
        if round_number == 0:
            before = process.memory_info().rss
    assert process.memory_info().rss - before < ALLOWED_GROWTH
    own_server.engine.check_integrity()
    assert not len(own_server.engine.scheduler.waiting)
    assert own_server.generate(max_new_tokens=2).status_code == 200


def test_clients_that_vanish_while_they_wait_are_never_run(own_server: LiveServer) -> None:
    own_server.model.allow(0)

    async def wait_and_vanish() -> None:
        waiting = [asyncio.create_task(ask(own_server, 150, leave=False)) for _ in range(200)]
        await asyncio.to_thread(wait_until, lambda: own_server.worker.num_in_flight == 200, 20)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(wait_and_vanish())
    wait_until(lambda: own_server.worker.num_in_flight == 0, 20)
    own_server.model.allow(None)
    wait_until(lambda: own_server.is_idle, 20)
    assert own_server.engine.steps < 50, "those who had left were computed for"


@pytest.mark.soak
def test_two_thousand_open_streams_are_all_answered(soak: Soak, own_server: LiveServer) -> None:
    """In short, as many as need more descriptors, of both ends in one process, than a process usually gets (1,024)."""
    allow_many_connections()
    streams = soak.count(600, 2000)
    answers = asyncio.run(ask_all(own_server, streams, 3, leave=False))
    assert len(answers) == streams
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
    assert all(answer.count(b"data:") == 3 for answer in answers)
    wait_until(lambda: own_server.is_idle, 20)


def test_readers_that_read_nothing_hold_up_nobody(own_server: LiveServer) -> None:
    async def scene() -> None:
        slow = [await asyncio.open_connection("127.0.0.1", own_server.port) for _ in range(20)]
        for _, writer in slow:
            writer.write(stream_request(own_server, 180))
        async with asyncio.timeout(20):
            answers = await ask_all(own_server, 20, 10, leave=False)
        assert all(answer.count(b"data:") == 10 for answer in answers)
        for _, writer in slow:
            writer.transport.abort()

    asyncio.run(scene())
    wait_until(lambda: own_server.is_idle, 20)
