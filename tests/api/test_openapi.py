"""The OpenAPI document tells the truth: schemathesis asks whatever it allows and forbids, and compares the answers.

It runs as the command that anybody can run, in a process of its own. The server has keys, so that it also sees whether
each of them is asked for.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.keys.file import add_key
from server.keys.key import Scope
from tests.api.live import LiveServer, as_form, live_server
from tests.api.openai.support import TEMPLATE
from tests.soak import Soak
from tests.support import EOS, random_soft_prompt, tiny_model

CONFIG = Path(__file__).with_name("schemathesis.toml")
MAX_MODEL_LEN = 64
"""So short that no answer takes long."""

SAME_BODIES = ["POST /", "POST /generate_stream", "POST /invocations"]
"""Routes that take the bodies of /generate and of /v1; in the short form, coverage sends these bodies only there."""


@dataclass(frozen=True)
class Documented:
    """A server and a key that may do everything there."""

    live: LiveServer
    key: str

    def publish(self, task: str, seed: int) -> None:
        """A version of a task."""
        files = self.live.files(random_soft_prompt(self.live.model.spec, 2, seed=seed))
        headers = {"Authorization": f"Bearer {self.key}"}
        response = self.live.client.put(f"/prompts/{task}", files=as_form(files), headers=headers)
        assert response.status_code == 201, response.text


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Documented]:
    """With the tasks that schemathesis.toml names."""
    directory = tmp_path_factory.mktemp("documented")
    path = directory / "keys.json"
    _, key = add_key(path, "schemathesis", [Scope.ADMIN], None)
    model = tiny_model(max_model_len=MAX_MODEL_LEN)
    model.tokenizer.chat_template = TEMPLATE
    model.eos_token_ids = frozenset({EOS, *range(0, 256, 4)})  # most answers have a few tokens, and not all the context
    with live_server(directory, model=model, api_keys_file=path) as live:
        server = Documented(live, key)
        for seed, task in enumerate(("sms_spam", "sms_spam", "spare", "doomed-1", "doomed-2", "doomed-2")):
            server.publish(task, seed)
        yield server


@pytest.mark.soak
def test_every_answer_is_as_documented(soak: Soak, documented: Documented, tmp_path: Path) -> None:
    config = CONFIG
    if not soak.full:
        config = tmp_path / CONFIG.name
        once = f"\n[[operations]]\ninclude-name = {SAME_BODIES}\nphases.coverage.enabled = false\n"
        config.write_text(CONFIG.read_text(encoding="utf-8") + once, encoding="utf-8")
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    options = {
        "--header": f"Authorization: Bearer {documented.key}",
        "--seed": str(soak.random.randrange(2**32)),
        "--max-examples": str(soak.count(4, 500)),
    }
    run = subprocess.run(
        [*command, *(part for option in options.items() for part in option), f"{documented.live.url}/openapi.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr
    assert documented.live.worker.num_in_flight == 0


def test_a_method_that_a_path_does_not_have_is_answered_by_those_that_it_has(server: LiveServer) -> None:
    for path, allowed in {
        "/prompts/mood": "GET, PUT, DELETE, HEAD",
        "/generate": "POST",
        "/prompts": "GET, HEAD",
    }.items():
        response = server.client.request("PATCH", path)
        assert (response.status_code, response.headers["allow"]) == (405, allowed)
