"""Clients that change and read tasks on several servers, and write down what they saw."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx

from tests.chaos import task_model
from tests.chaos.cluster import Node
from tests.chaos.linearisable import UNKNOWN, Call
from tests.chaos.task_model import UNKNOWN_TASK, Answer, Change, Task, Traffic

Files = list[tuple[str, tuple[str, bytes]]]

REFUSALS = {"unknown_task", "nothing_to_roll_back_to", "version_in_use"}
NO_EFFECT = {429, 507}
"""Statuses that promise that nothing has changed."""

DEADLINE = 700.0
"""Seconds after which a request hangs. A change may wait 90 s for the store; a machine may be suspended for minutes."""

CALLS_OF_A_TASK = 70
TASKS = 4


@dataclass
class Seen:
    """One call; `change` of a read is None, and `answer` None if the outcome is unknown."""

    task: str
    node: Node
    began: float
    ended: float
    change: Change | None
    fits: Callable[[Task, Answer], bool]
    answer: Answer | None
    text: str
    event: int | None
    strict: bool

    @property
    def is_change(self) -> bool:
        """Whether a change was acknowledged, and not refused."""
        return self.change is not None and self.answer is not None and self.answer[0] != "refused"

    def as_call(self, bound: float) -> Call[Task]:
        """For the checker; reads may be as old as the node's view of the store."""
        change, answer, fits = self.change, self.answer, self.fits

        def step(task: Task) -> Task | None:
            if change is None:
                return task if answer is not None and fits(task, answer) else None
            after, right = change(task)
            return after if answer in (None, right) else None

        is_exact = self.strict or change is not None
        began = self.began if is_exact else self.node.sees_since(self.began, bound)
        return Call(began, self.ended, step, change is not None, f"{self.task} {self.text} -> {answer}")


@dataclass
class History:
    """What all clients saw, by task."""

    calls: dict[str, list[Seen]] = field(default_factory=dict)
    hangs: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    newest: dict[str, int] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, seen: Seen) -> None:
        with self._lock:
            self.calls.setdefault(seen.task, []).append(seen)


class Client:
    """One client, which waits for each answer."""

    def __init__(
        self,
        history: History,
        nodes: list[Node],
        contents: Mapping[str, Files],
        seed: int | str,
        *,
        strict: bool = False,
    ) -> None:
        """With `strict`, its reads may not be outdated."""
        self.dice, self._strict = random.Random(seed), strict
        self._history, self._nodes, self._contents = history, nodes, contents
        self.http = httpx.Client(timeout=DEADLINE, trust_env=False, limits=httpx.Limits(keepalive_expiry=1.0))

    def run(self, until: float, pause: float = 0.1) -> None:
        """Make calls until a time."""
        with self.http:
            while time.monotonic() < until:
                number = next(self._history.numbers)
                task = f"t{number // (CALLS_OF_A_TASK * TASKS)}-{self.dice.randrange(TASKS)}"
                self._any_call(self.dice.choice(self._nodes), task)
                time.sleep(self.dice.uniform(0, pause))

    def show(self, node: Node, task: str) -> Answer | None:
        """GET /prompts/TASK."""
        return self._call(node, task, None, task_model.may_show, "show", "GET", f"/prompts/{task}")

    def generate(self, node: Node, task: str, version: int | None) -> None:
        """POST /generate for the task, or for one of its versions."""
        reference = task if version is None else f"{task}@{version}"

        def fits(state: Task, answer: Answer) -> bool:
            return task_model.may_generate(state, version, answer)

        body = {"inputs": "hi", "parameters": {"max_new_tokens": 1}}
        self._call(node, task, None, fits, f"generate {reference}", "POST", f"/generate?task={reference}", json=body)

    def _any_call(self, node: Node, task: str) -> None:
        dice, newest = self.dice, self._history.newest.get(task, 0)
        version, other = dice.randint(1, newest + 1), dice.randint(1, newest + 1)
        change = partial(self._call, node, task, fits=_never)
        path = f"/prompts/{task}"
        match dice.choices(range(8), (26, 9, 8, 6, 3, 4, 16, 28))[0]:
            case 0:
                digest, activate = dice.choice(list(self._contents)), dice.random() < 0.8
                wish = task_model.publish(digest, activate)
                target = f"{path}?activate={str(activate).lower()}"
                change(wish, text=f"publish {digest[:6]}", method="PUT", path=target, files=self._contents[digest])
            case 1:
                wish = task_model.set_traffic(((version, 100),))
                change(
                    wish, text=f"activate {version}", method="POST", path=f"{path}/activate", json={"version": version}
                )
            case 2:
                change(task_model.roll_back, text="roll back", method="POST", path=f"{path}/rollback")
            case 3:
                shares: Traffic = ((version, 100),) if version == other else ((version, 70), (other, 30))
                wish = task_model.set_traffic(shares)
                change(wish, text=f"traffic {shares}", method="PUT", path=f"{path}/traffic", json=dict(shares))
            case 4:
                change(task_model.delete, text="delete", method="DELETE", path=path)
            case 5:
                wish = task_model.delete_version(version)
                change(wish, text=f"delete {version}", method="DELETE", path=f"{path}/versions/{version}")
            case 6:
                self.show(node, task)
            case _:
                self.generate(node, task, version if dice.random() < 0.3 else None)

    def _call(
        self,
        node: Node,
        task: str,
        change: Change | None,
        fits: Callable[[Task, Answer], bool],
        text: str,
        method: str,
        path: str,
        **options: Any,
    ) -> Answer | None:
        began, answer, event, outcome = time.monotonic(), None, None, "no connection"
        has_effect = True
        try:
            reply = self.http.request(method, node.url + path, **options)
            outcome = str(reply.status_code)
            answer = _answer(reply, change is None and method == "GET")
            has_effect = reply.status_code not in NO_EFFECT
            event = int(reply.headers["etag"].strip('"')) if answer and "etag" in reply.headers else None
        except httpx.ConnectError:
            has_effect = False
        except httpx.TimeoutException:
            outcome = "hangs"
            self._history.hangs.append(f"{text} on {node.url}")
        except httpx.TransportError:
            outcome = "cut off"
        self._history.longest = max(self._history.longest, time.monotonic() - began)
        kind = "read" if change is None else "change"
        self._history.outcomes[f"{kind} {outcome}"] += 1
        if answer is not None and answer[0] == "published":
            self._history.newest[task] = max(self._history.newest.get(task, 0), int(str(answer[1])))
        if answer is not None or (change is not None and has_effect):
            ended = time.monotonic() if answer is not None else UNKNOWN
            self._history.add(Seen(task, node, began, ended, change, fits, answer, text, event, self._strict))
        return answer


def _never(task: Task, answer: Answer) -> bool:
    raise AssertionError("a change is compared by its answer")


def _answer(reply: httpx.Response, is_shown: bool) -> Answer | None:
    """What a reply says in the model's words; None if it says nothing of the task."""
    if reply.status_code in (404, 409) and reply.json()["code"] in REFUSALS:
        code = reply.json()["code"]
        return UNKNOWN_TASK if code == "unknown_task" else ("refused", code)
    if reply.status_code not in (200, 201, 204):
        assert reply.status_code in (429, 500, 503, 507), reply.text
        return None
    if reply.status_code == 204:
        return ("gone",)
    body = reply.json()
    if "generated_text" in body:
        return ("answers", int(reply.headers["prelude-version"]))
    if "live" in body and isinstance(body["live"], bool):
        return ("published", body["version"], reply.status_code == 201)
    live = body.get("version" if is_shown else "live")
    shares = body.get("traffic") or ({} if live is None else {str(live): 100})
    traffic = tuple(sorted((int(number), share) for number, share in shares.items()))
    versions = body["versions"] if is_shown else [item["version"] for item in body["versions"]]
    shown: Answer = ("shows", live, traffic, tuple(sorted(versions)))
    return (*shown, body.get("digest")) if is_shown else shown
