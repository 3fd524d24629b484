"""Servers on one bucket that are killed, paused and cut off from it lose nothing and never contradict each other."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from server.registry.events import Delete, Event, Publish, tasks_of
from server.registry.objects import open_objects
from server.registry.store import Store
from tests.chaos.clients import DEADLINE, Client, Files, History
from tests.chaos.cluster import STORE_FAULTS, Node, in_threads, watch_the_machine
from tests.chaos.faulty_store import FaultyStore
from tests.chaos.linearisable import linearise
from tests.chaos.task_model import Answer, Task
from tests.peft_files import peft_directory
from tests.registry.s3 import S3
from tests.soak import Soak

SYNC_SECONDS = 0.2
BOUND = SYNC_SECONDS + 5.0
"""Seconds after which an answer may not be outdated: the next look at the store, and one call, which may be waiting to
be sent again (up to 3.2 s), on a busy machine."""

FAULTS = ("kill", "pause", "clock 3600", "clock -3600", "clock 30000", *STORE_FAULTS)
CONTENTS = 6


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> list[Files]:
    """Soft prompts as forms."""
    directories = [peft_directory(tmp_path_factory.mktemp("peft") / "task", seed=seed) for seed in range(CONTENTS)]
    return [[("files", (path.name, path.read_bytes())) for path in sorted(place.iterdir())] for place in directories]


@pytest.mark.soak
@pytest.mark.parametrize("count", [2, 4])
def test_every_acknowledged_change_survives_all_that_can_happen(
    count: int,
    soak: Soak,
    s3: S3,
    s3_store_url: str,
    served_tiny: dict[str, str],
    forms: list[Files],
    tmp_path: Path,
) -> None:
    if count > 2:
        soak.only_in_full()
    settings = served_tiny | {"PRELUDE_STORE": s3_store_url, "PRELUDE_SYNC_SECONDS": str(SYNC_SECONDS)}
    settings |= {"PRELUDE_DTYPE": "float32", "PRELUDE_MAX_SEQUENCES": "4"}
    with ExitStack() as stack:
        nodes = []
        for number in range(count):
            store = stack.enter_context(FaultyStore(s3.url).running())
            nodes.append(Node(tmp_path / f"server-{number}", settings, store))
            stack.callback(nodes[-1].kill)
        in_threads([threading.Thread(target=node.start) for node in nodes])
        history = History()
        contents = {_digest(nodes[0], form): form for form in forms}
        assert len(contents) == CONTENTS
        seconds = float(soak.count(2, 120))
        _storm(nodes, history, contents, seconds, soak)
        _settle(nodes, history, contents)
        logs = [path.read_text() for path in sorted(tmp_path.glob("server-*/log-*.txt"))]
        assert not any("Traceback" in log for log in logs), logs
    changes = _changes_in_the_log(history, s3_store_url)
    for calls in history.calls.values():
        linearise([seen.as_call(BOUND) for seen in calls], Task())
    if soak.full:
        faults = sum((node.faults for node in nodes), Counter[str]())
        figures = {
            "changes": changes,
            "calls": dict(history.outcomes),
            "faults": dict(faults),
            "lost": 0,
            "longest_s": history.longest,
        }
        soak.screen.write(f"{json.dumps({'servers': count, 'seconds': seconds, **figures})}\n")


def _digest(node: Node, form: Files) -> str:
    reply = httpx.put(f"{node.url}/prompts/any?dry_run=true", files=form, timeout=60, trust_env=False)
    digest: str = reply.json()["digest"]
    return digest


def _storm(nodes: list[Node], history: History, contents: dict[str, Files], seconds: float, soak: Soak) -> None:
    """Clients and faults at once, until the time is over."""
    end = time.monotonic() + seconds
    seeds = [soak.random.random() for _ in range(3 * len(nodes))]
    clients = [Client(history, nodes, contents, f"client {seed}") for seed in seeds[: 2 * len(nodes)]]

    deck, one_at_a_time = _deck(soak.random), threading.Lock()

    def harm(node: Node, seed: float) -> None:
        dice, longest = random.Random(f"faults {seed}"), 4.0 if soak.full else 0.5
        while time.monotonic() < end:
            time.sleep(dice.uniform(0, longest))
            with one_at_a_time:
                kind = next(deck)
            node.suffer(kind, dice.uniform(longest / 4, longest))

    in_threads(
        [threading.Thread(target=client.run, args=(end,)) for client in clients]
        + [threading.Thread(target=watch_the_machine, args=(nodes, end))]
        + [threading.Thread(target=harm, args=pair) for pair in zip(nodes, seeds[2 * len(nodes) :], strict=True)]
    )
    assert not history.hangs, history.hangs


def _deck(dice: random.Random) -> Iterator[str]:
    """Faults without end; each kind is as frequent as the others."""
    yield from ("kill", "partitioned")
    while True:
        yield from dice.sample(FAULTS, len(FAULTS))


def _settle(nodes: list[Node], history: History, contents: dict[str, Files]) -> None:
    """Wait until all servers show the same, then read every task on each of them: this may not be outdated."""
    tasks, before = list(history.calls), list[list[Answer | None]]()
    looking, last = Client(History(), nodes, contents, 0), Client(history, nodes, contents, 0, strict=True)
    end = time.monotonic() + DEADLINE
    with looking.http, last.http:
        while True:
            seen = [[looking.show(node, task) for task in tasks] for node in nodes]
            if seen == before and all(shown == seen[0] for shown in seen):
                break
            assert time.monotonic() < end, f"the servers do not agree: {seen}"
            before = seen
            time.sleep(3 * SYNC_SECONDS)
        assert None not in [last.show(node, task) for node in nodes for task in tasks]


def _changes_in_the_log(history: History, store_url: str) -> int:
    """How many changes were acknowledged; each must be an event of the store."""
    entries = Store(open_objects(store_url)).events()
    events = {event.number: event for event in entries if isinstance(event, Event)}
    assert len(events) == len(entries)
    deletes = Counter(event.change.task for event in events.values() if isinstance(event.change, Delete))
    published = Counter(
        (item.task, item.version)
        for event in events.values()
        if isinstance(event.change, Publish)
        for item in event.change.published
    )
    assert set(published.values()) <= {1}, "a number is given once"
    acknowledged = [
        seen for calls in history.calls.values() for seen in calls if seen.change and seen.answer and seen.is_change
    ]
    for seen in acknowledged:
        assert seen.event is None or seen.task in tasks_of(events[seen.event].change), seen.text
        if seen.answer and seen.answer[0] == "published":
            assert published[seen.task, int(str(seen.answer[1]))] == 1, seen.text
    gone = Counter(seen.task for seen in acknowledged if seen.text == "delete")
    assert all(deletes[task] >= number for task, number in gone.items())
    return len(acknowledged)
