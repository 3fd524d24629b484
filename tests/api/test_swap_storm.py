"""Swaps under load: whatever is published, activated and deleted meanwhile, no answer is stale, torn or lost.

Exactness is a property of float32, wherever the two most likely tokens are further apart than rounding: texts are
chosen by that margin, so that every answer can be compared, letter for letter, with what its version answers alone.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.engine.attention.interface import Layout
from server.engine.model.frozen import FrozenModel
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.api.live import LiveServer, live_server, wait_until
from tests.soak import Soak
from tests.support import make_engine, request, run_engine

CLIENTS = 32
TASKS = ("spam", "emotion", "topic")
MARGIN = 2e-3
NEW_TOKENS = 6
WORDS = ["now", "then", "free", "red", "the", "water", "win", "paper", "is", "call", "hill", "of", "ten", "my", "glass"]

Answers = dict[tuple[str, str], str]
"""(digest, text) -> what the version answers alone."""


class MarginModel:
    """A frozen model that remembers how close the two most likely tokens came."""

    def __init__(self, model: FrozenModel) -> None:
        self._model = model
        self.closest = float("inf")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, layout: Layout, keep: torch.Tensor
    ) -> torch.Tensor:
        logits = self._model.forward(inputs_embeds, position_ids, layout, keep)
        if len(logits):
            best = logits.float().topk(2, dim=-1).values
            self.closest = min(self.closest, float((best[:, 0] - best[:, 1]).min()))
        return logits


def vocabulary_prompt(model: FrozenModel, seed: int) -> SoftPrompt:
    """A soft prompt of the model's own embedding rows, which leads it nowhere strange."""
    ids = torch.randint(model.spec.vocab_size, (8,), generator=torch.Generator().manual_seed(seed))
    tensor = model.embed(ids.to(model.device)).detach().float().cpu().clone()
    return SoftPrompt("PROMPT_TUNING", tensor, Manifest(input_template="{input}\n"))


def decided_answers(
    model: FrozenModel, soft_prompts: Sequence[SoftPrompt], texts: Iterable[str], wanted: int
) -> Answers:
    """Answers of every soft prompt alone, to the first so many texts on which each of them is decided."""
    margins = MarginModel(model)
    engine = make_engine(margins, max_sequences=2)  # type: ignore[arg-type]
    answers: Answers = {}
    found = 0
    for text in texts:
        mine: Answers = {}
        margins.closest = float("inf")
        for soft_prompt in soft_prompts:
            ids = model.text.encode(soft_prompt.manifest.render(text))
            outcome = run_engine(engine, [(request("alone", ids, max_new_tokens=NEW_TOKENS), soft_prompt)])["alone"]
            mine[soft_prompt.digest, text] = outcome.text
            if margins.closest <= MARGIN:
                break
        else:
            answers |= mine
            found += 1
            if found == wanted:
                return answers
    raise AssertionError("too few texts are decided")


@dataclass
class Storm:
    """Clients that ask, and operators that swap, until enough swaps were made.

    Attributes:
        published: (task, version) -> digest, as the server acknowledged it.
        answers: what clients got: task, version of the header, text sent, text received.
        problems: whatever must not happen.
    """

    server: LiveServer
    contents: dict[str, list[SoftPrompt]]
    texts: dict[str, list[str]]
    seed: int
    published: dict[tuple[str, int], str] = field(default_factory=dict)
    answers: list[tuple[str, int, str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    swaps: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def run(self, swaps: Iterable[int]) -> None:
        """One operator per task swaps; every swap of one of them takes a number of `swaps`."""
        for task in TASKS:
            with httpx.Client(base_url=self.server.url, timeout=120) as client:
                self.publish(client, task, self.contents[task][0])
        numbers, lock = iter(swaps), threading.Lock()

        def next_swap() -> bool:
            with lock:
                return next(numbers, None) is not None

        with ThreadPoolExecutor(CLIENTS + len(TASKS)) as pool:
            clients = [pool.submit(self.ask, i) for i in range(CLIENTS)]
            operators = [pool.submit(self.operate, task, next_swap) for task in TASKS]
            for operator in operators:
                operator.result()
            self.over.set()
            for asking in clients:
                asking.result()

    def ask(self, number: int) -> None:
        """One client: one request after the other."""
        dice = random.Random(f"{self.seed} client {number}")
        with httpx.Client(base_url=self.server.url, timeout=120) as client:
            while not self.over.is_set():
                task = dice.choice(TASKS)
                text = dice.choice(self.texts[task])
                body = {"inputs": text, "parameters": {"max_new_tokens": NEW_TOKENS}}
                reply = client.post("/generate", params={"task": task}, json=body)
                if reply.status_code != 200:
                    self.problems.append(f"a request failed: {reply.status_code} {reply.text}")
                    return
                version = int(reply.headers["Prelude-Version"])
                self.answers.append((task, version, text, reply.json()["generated_text"]))

    def operate(self, task: str, next_swap: Any) -> None:
        """One operator: publishes, stages, activates, rolls back and deletes as fast as the server takes it."""
        dice = random.Random(f"{self.seed} operator {task}")
        with httpx.Client(base_url=self.server.url, timeout=120) as client:
            while not self.problems and next_swap():
                before = client.get(f"/prompts/{task}/versions").json()
                versions = [entry["version"] for entry in before["versions"]]
                match dice.choice(["publish", "publish", "stage", "activate", "rollback", "traffic", "delete"]):
                    case "publish":
                        self.publish(client, task, dice.choice(self.contents[task]))
                    case "stage":
                        number = self.publish(client, task, dice.choice(self.contents[task]), activate="false")
                        self.check(client.post(f"/prompts/{task}/activate", json={"version": number}), 200)
                    case "activate":
                        self.check(
                            client.post(f"/prompts/{task}/activate", json={"version": dice.choice(versions)}), 200
                        )
                    case "rollback":
                        self.check(client.post(f"/prompts/{task}/rollback"), 200, 409)
                    case "traffic" if len(versions) > 1:
                        one, other = dice.sample(versions, 2)
                        self.check(client.put(f"/prompts/{task}/traffic", json={str(one): 60, str(other): 40}), 200)
                    case "delete":
                        idle = [entry["version"] for entry in before["versions"] if not entry["live"]]
                        if idle:
                            self.check(client.delete(f"/prompts/{task}/versions/{dice.choice(idle)}"), 204)

    def publish(self, client: httpx.Client, task: str, soft_prompt: SoftPrompt, **query: str) -> int:
        """Upload; remember which number the server gave it."""
        files = [("files", item) for item in self.server.files(soft_prompt).items()]
        reply = client.put(f"/prompts/{task}", params=query, files=files)
        self.check(reply, 200, 201)
        version: int = reply.json()["version"]
        self.published[task, version] = soft_prompt.digest
        return version

    def check(self, reply: httpx.Response, *expected: int) -> None:
        """An operator's change must be taken."""
        if reply.status_code not in expected:
            self.problems.append(f"{reply.request.method} {reply.request.url.path}: {reply.status_code} {reply.text}")


@pytest.mark.soak
def test_every_answer_is_exactly_that_of_the_version_in_its_header(
    soak: Soak, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: FrozenModel = request.getfixturevalue("served_smollm2" if soak.full else "tiny32")
    texts = (" ".join(words) for words in itertools.permutations(WORDS, 3))
    contents = {task: [vocabulary_prompt(model, 100 * t + i) for i in range(6)] for t, task in enumerate(TASKS)}
    expected = {task: decided_answers(model, contents[task], texts, wanted=4) for task in TASKS}
    with live_server(tmp_path, max_sequences=16, model=model) as server:
        storm = Storm(
            server,
            contents,
            {task: sorted({text for _, text in answers}) for task, answers in expected.items()},
            soak.seed,
        )
        storm.run(soak.rounds(short=60, full=600, desc="swaps"))
        assert storm.problems == []
        wait_until(lambda: server.is_idle)
        server.engine.scheduler.check_integrity()
        held = {v.content.prefix_hash for task in server.registry.tasks() for v in task.versions.values()}
        assert set(server.engine.prefixes) <= held, "a deleted version left its prefix behind"
    assert len(storm.answers) > CLIENTS
    wrong = [
        (task, version, text, got)
        for task, version, text, got in storm.answers
        if got != expected[task][storm.published[task, version], text]
    ]
    assert wrong == []
    assert len({version for _, version, _, _ in storm.answers}) > 3, "the storm did not swap under load"
