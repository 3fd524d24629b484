"""The servers to compare, each in its strongest configuration for the workload.

    prelude          soft prompts, published before the clock starts
    prelude-bare     the frozen model alone: the text without any prefix
    vllm-bare        vLLM, the text without any prefix
    vllm-prefix      vLLM, after a text of as many tokens as the soft prompt, which its prefix cache contains
    vllm-embeds      vLLM, virtual tokens and text as raw prompt embeddings, which every request contains
    transformers     `transformers serve` with continuous batching, the text without any prefix
    peft             PEFT's own `generate` behind FastAPI, which switches adapters between requests (peft_app.py)

vLLM needs a separate virtual environment (CONTRIBUTING.md); VLLM_PYTHON names its interpreter.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save
from transformers import AutoTokenizer, PreTrainedTokenizerBase

TEXT = "the weather in a small town was never as bad people said it would be when rain came over hills"
WORDS = TEXT.split()
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Workload:
    """The clients' requests.

    Attributes:
        clients: number of clients; each sends one request after the other.
        output_tokens: output tokens of every request, regardless of the model's end token.
        num_virtual_tokens: length of every soft prompt, and of the text that replaces one.
        tasks: number of tasks among which the requests are divided.
        words: number of words in an input text.
        choices: texts of which the likeliest is the answer; empty for ordinary generation.
    """

    clients: int
    output_tokens: int
    num_virtual_tokens: int = 100
    tasks: int = 8
    words: int = 30
    choices: tuple[str, ...] = ()

    @property
    def figure(self) -> str:
        """The figure by which servers are compared."""
        return "requests_per_second" if self.output_tokens <= 4 else "tokens_per_second"

    def text(self, dice: random.Random) -> str:
        """A random text, most likely unique."""
        return " ".join(dice.choices(WORDS, k=self.words))


@dataclass
class Model:
    """The frozen model's files, for clients that tokenise and embed texts themselves."""

    path: str
    tokenizer: PreTrainedTokenizerBase = field(init=False)
    embeddings: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.embeddings = load_file(Path(self.path, "model.safetensors"))["model.embed_tokens.weight"]

    def prefix_ids(self, workload: Workload, task: int) -> list[int]:
        """Tokens of the text that replaces a soft prompt."""
        dice = random.Random(f"prefix {task}")
        ids: list[int] = self.tokenizer.encode(" ".join(dice.choices(WORDS, k=workload.num_virtual_tokens)))
        return ids[: workload.num_virtual_tokens]

    def soft_prompt(self, workload: Workload, task: int) -> torch.Tensor:
        """`[num_virtual_tokens, hidden_size]`: the embeddings of that text, so that outputs stay ordinary."""
        return self.embeddings[self.prefix_ids(workload, task)]


@dataclass(frozen=True)
class Call:
    """One request, ready to be sent."""

    path: str
    body: bytes
    params: dict[str, str] = field(default_factory=dict)


class Peer:
    """A server: how to start it, prepare it, and send it requests."""

    name = ""
    streams = True
    chooses = False  # whether it takes workloads with `choices`

    def __init__(self, model: Model) -> None:
        """Prepare to serve this model."""
        self.model = model

    def command(self, port: int, folder: Path, workload: Workload) -> list[str]:
        """The command that starts the server; `folder` is for its files."""
        raise NotImplementedError

    async def prepare(self, client: httpx.AsyncClient, workload: Workload) -> None:
        """Publish the soft prompts that the workload needs, before the measurement."""

    def call(self, workload: Workload, task: int, dice: random.Random) -> Call:
        """A request for one of the tasks."""
        raise NotImplementedError

    def is_token(self, line: str) -> bool:
        """Whether a line of a stream contains a token."""
        return line.startswith("data:") and not line.endswith("[DONE]")


class Prelude(Peer):
    """This server."""

    name = "prelude"
    chooses = True

    def command(self, port: int, folder: Path, workload: Workload) -> list[str]:
        """See `Peer`."""
        options = ["--port", str(port), "--prompts-dir", str(folder), "--max-sequences", "64"]
        return [sys.executable, "-m", "server", "serve", *options]

    async def prepare(self, client: httpx.AsyncClient, workload: Workload) -> None:
        """See `Peer`."""
        config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": workload.num_virtual_tokens}
        for task in range(workload.tasks):
            tensor = self.model.soft_prompt(workload, task).contiguous()
            files = [
                ("files", ("adapter_config.json", json.dumps(config).encode())),
                ("files", ("adapter_model.safetensors", save({"prompt_embeddings": tensor}))),
            ]
            (await client.put(f"/prompts/task-{task}", files=files)).raise_for_status()

    def call(self, workload: Workload, task: int, dice: random.Random) -> Call:
        """See `Peer`; `choices` are answered in one piece."""
        if workload.choices:
            body = {"inputs": workload.text(dice), "parameters": {"choices": workload.choices}}
            return Call("/generate", json.dumps(body).encode(), self._params(task))
        parameters = {"max_new_tokens": workload.output_tokens, "ignore_eos_token": True}
        body = {"inputs": workload.text(dice), "parameters": parameters}
        return Call("/generate_stream", json.dumps(body).encode(), self._params(task))

    def _params(self, task: int) -> dict[str, str]:
        return {"task": f"task-{task}"}


class PreludeBare(Prelude):
    """This server without soft prompts."""

    name = "prelude-bare"

    def _params(self, task: int) -> dict[str, str]:
        return {}


class Vllm(Peer):
    """vLLM's OpenAI server."""

    name = "vllm-bare"
    chooses = True
    options: Sequence[str] = ()

    def command(self, port: int, folder: Path, workload: Workload) -> list[str]:
        """See `Peer`."""
        python = os.environ.get("VLLM_PYTHON", sys.executable)
        server = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model.path]
        limits = ["--max-model-len", "2048", "--max-num-seqs", "64", "--dtype", "bfloat16"]
        return [*server, "--served-model-name", "model", "--port", str(port), *limits, *self.options]

    def call(self, workload: Workload, task: int, dice: random.Random) -> Call:
        """See `Peer`."""
        ids = self.model.tokenizer.encode(workload.text(dice))
        return self._completion(workload, prompt=self._prefix(workload, task) + ids)

    def _prefix(self, workload: Workload, task: int) -> list[int]:
        return []

    @staticmethod
    def _completion(workload: Workload, **what: Any) -> Call:
        body = {"model": "model", "max_tokens": workload.output_tokens, "temperature": 0, **what}
        if workload.choices:
            body |= {"structured_outputs": {"choice": workload.choices}}
        else:
            body |= {"ignore_eos": True, "stream": True}
        return Call("/v1/completions", json.dumps(body).encode())


class VllmPrefix(Vllm):
    """vLLM after a cached text, with blocks so short that nearly all of the text is cached."""

    name = "vllm-prefix"
    options = ("--block-size", "32")

    def _prefix(self, workload: Workload, task: int) -> list[int]:
        return self.model.prefix_ids(workload, task)


class VllmEmbeds(Vllm):
    """vLLM with raw embeddings."""

    name = "vllm-embeds"
    options = ("--enable-prompt-embeds",)

    def call(self, workload: Workload, task: int, dice: random.Random) -> Call:
        """See `Peer`."""
        ids = self.model.tokenizer.encode(workload.text(dice))
        rows = torch.cat([self.model.soft_prompt(workload, task), self.model.embeddings[ids]]).to(torch.bfloat16)
        buffer = io.BytesIO()
        torch.save(rows.clone(), buffer)
        return self._completion(workload, prompt_embeds=base64.b64encode(buffer.getvalue()).decode())


class Transformers(Peer):
    """`transformers serve`."""

    name = "transformers"

    def command(self, port: int, folder: Path, workload: Workload) -> list[str]:
        """See `Peer`."""
        script = Path(sys.executable).with_name("transformers")
        for file in Path(self.model.path).iterdir():
            (folder / file.name).symlink_to(file)
        _change(folder / "config.json", architectures=["LlamaForCausalLM"])  # this server requires it
        _change(folder / "generation_config.json", eos_token_id=None)  # so that no answer ends early
        self._served = str(folder)
        options = ["--continuous-batching", "--dtype", "bfloat16", "--device", "cpu", "--host", "127.0.0.1"]
        return [str(script), "serve", self._served, "--port", str(port), *options]

    def call(self, workload: Workload, task: int, dice: random.Random) -> Call:
        """See `Peer`."""
        body = {"model": self._served, "prompt": workload.text(dice), "max_tokens": workload.output_tokens}
        return Call("/v1/completions", json.dumps({**body, "temperature": 0, "stream": True}).encode())

    def is_token(self, line: str) -> bool:
        """See `Peer`; the last line only marks the end."""
        return super().is_token(line) and '"finish_reason":"length"' not in line


def _change(linked: Path, **fields: object) -> None:
    """Replace a link to a JSON object by a copy with other fields."""
    content = json.loads(linked.read_text())
    linked.unlink()
    linked.write_text(json.dumps({**content, **fields}))


class Peft(Peer):
    """PEFT behind FastAPI."""

    name = "peft"
    streams = False

    def command(self, port: int, folder: Path, workload: Workload) -> list[str]:
        """See `Peer`."""
        sizes = [str(workload.tasks), str(workload.num_virtual_tokens)]
        return [sys.executable, str(HERE / "peft_app.py"), self.model.path, str(port), *sizes]

    def call(self, workload: Workload, task: int, dice: random.Random) -> Call:
        """See `Peer`."""
        body = {"task": f"task-{task}", "text": workload.text(dice), "max_new_tokens": workload.output_tokens}
        return Call("/generate", json.dumps(body).encode())


PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Prelude, PreludeBare, Vllm, VllmPrefix, VllmEmbeds, Transformers, Peft)
}
