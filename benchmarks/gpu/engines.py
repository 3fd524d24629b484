"""Engines with random weights, built as in a server: with Llama-3.1-8B's shape, or tiny in a rehearsal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from random_llama import inputs, make_module, model_with_bytes

from benchmarks.gpu.devices import device_of, memory
from benchmarks.gpu.stage import Run
from server.contracts import GenerationRequest, SamplingParams
from server.engine.attention.interface import ATTENTION_NAME, register_attention
from server.engine.build_engine import build_engine
from server.engine.engine import Engine
from server.engine.fast.optimise import load_kernels, optimise
from server.engine.model.frozen import FrozenModel
from server.engine.out_of_memory import release_unused
from server.settings import Settings
from server.soft_prompts.soft_prompt import SoftPrompt

NUM_VIRTUAL_TOKENS = 20

Work = list[tuple[GenerationRequest, SoftPrompt | None]]


@dataclass(frozen=True)
class Loaded:
    """A model, its engine's settings, and the bytes of weights that a step reads (all except input embeddings)."""

    model: FrozenModel
    settings: Settings
    weight_bytes: int

    def engine(self) -> Engine:
        """Build the engine as a server does."""
        return build_engine(self.settings, self.model)


def load(run: Run, *, optimised: bool = True, **options: Any) -> Loaded:
    """Create the model on the device, record the time and memory, and optimise it."""
    device = device_of(run)
    small = {"max_sequences": 8, "max_model_len": 256, "max_batch_tokens": 64, "kv_memory": "16MiB"}
    settings = Settings.load(**(options | small if run.rehearse else options))
    began = time.perf_counter()
    register_attention()
    module = make_module(ATTENTION_NAME, device, tiny=run.rehearse)
    read = sum(parameter.nbytes for parameter in module.parameters()) - module.get_input_embeddings().weight.nbytes
    model = model_with_bytes(module, settings.max_model_len)
    run.note(made_s=time.perf_counter() - began, **{f"made_{name}": size for name, size in memory(device).items()})
    if optimised:
        began = time.perf_counter()
        optimise(model, settings.optimisations, load_kernels(model, settings.optimisations, None))
        run.note(fused_s=time.perf_counter() - began, keeps_early=model.keeps_early)
        run.note(**{f"fused_{name}": size for name, size in memory(device).items()})
        release_unused()
        run.note(released_reserved_gb=memory(device)["reserved_gb"])
    return Loaded(model, settings, read)


def soft_prompts(model: FrozenModel, count: int) -> list[SoftPrompt | None]:
    """Random soft prompts of `NUM_VIRTUAL_TOKENS`."""
    dice = torch.Generator().manual_seed(0)
    shape = (NUM_VIRTUAL_TOKENS, model.spec.hidden_size)
    return [SoftPrompt("PROMPT_TUNING", torch.randn(shape, generator=dice) * 0.02) for _ in range(count)]


def batch_of(size: int, prompts: list[SoftPrompt | None], new: int, tokens: int = 128, **rules: Any) -> Work:
    """Requests, divided among soft prompts; all inputs begin differently."""
    return [
        (
            GenerationRequest(
                f"r{i}",
                inputs(i, tokens),
                SamplingParams(max_new_tokens=new, ignore_eos=True, seed=i, **rules),
                f"task {i % len(prompts)}",
            ),
            prompts[i % len(prompts)],
        )
        for i in range(size)
    ]


def until_all_decode(engine: Engine, work: Work) -> None:
    """Add requests and run steps until every input is computed."""
    for request, prompt in work:
        engine.add(request, prompt)
    while len(engine.scheduler.waiting) or any(sequence.num_pending > 1 for sequence in engine.scheduler.running):
        engine.step()


def end_all(engine: Engine, work: Work) -> None:
    """Abort requests that are still running."""
    for request, _ in work:
        engine.abort(request.request_id)
    while engine.has_work:
        engine.step()


def tokens_per_second(engine: Engine, work: Work) -> float:
    """Output tokens per second of a batch, prefills included."""
    for request, prompt in work:
        engine.add(request, prompt)
    began, tokens = time.perf_counter(), 0
    while engine.has_work:
        tokens += sum(delta.token is not None for delta in engine.step())
    return tokens / (time.perf_counter() - began)
