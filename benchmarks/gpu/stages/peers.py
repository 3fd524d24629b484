"""Measures transformers' continuous batching with the same weights, and the speed of registering soft prompts."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from random_llama import peer_tokens_per_second

from benchmarks.gpu.devices import device_of
from benchmarks.gpu.engines import NUM_VIRTUAL_TOKENS, load
from benchmarks.gpu.stage import Run
from server.engine.engine import Engine
from server.engine.out_of_memory import release_unused
from server.engine.worker import EngineWorker
from server.registry.objects import LocalObjects
from server.registry.registry import Registry
from server.registry.store import Store
from server.soft_prompts.soft_prompt import SoftPrompt

PUBLISHERS = 32


def measure(run: Run) -> None:
    """Measure the peer, then registering; if time runs out, the figures so far count."""
    device = device_of(run)
    if hasattr(transformers, "ContinuousBatchingConfig"):
        batch = 4 if run.rehearse else 256
        options = argparse.Namespace(device=device, tiny=run.rehearse, batch=batch)
        speed = peer_tokens_per_second(options)
        run.check(speed is not None, "transformers did not finish the batch")
        run.note(transformers_tokens_s=speed or 0.0)
        release_unused()
    else:
        run.skip("transformers' continuous batching", f"transformers {transformers.__version__} has none")
    engine = load(run, max_sequences=256, max_model_len=512, max_batch_tokens=8192).engine()
    count = 20 if run.rehearse else 2000
    run.note(registered=count, register_s=asyncio.run(_register(engine, count)))


async def _register(engine: Engine, count: int) -> float:
    """Seconds in which several concurrent publishers publish soft prompts, durably and with computed prefixes."""
    worker = EngineWorker(engine)
    hidden = engine.model.spec.hidden_size
    with tempfile.TemporaryDirectory(prefix="prelude-gpu-") as folder, ThreadPoolExecutor(PUBLISHERS) as threads:
        registry = Registry(Store(LocalObjects(Path(folder))), engine.model.spec, 512)
        worker.start()
        registry.connect(worker)

        def publish(number: int) -> None:
            tensor = torch.randn(NUM_VIRTUAL_TOKENS, hidden, generator=torch.Generator().manual_seed(number)) * 0.02
            registry.publish(f"task-{number}", [SoftPrompt("PROMPT_TUNING", tensor)], "api")

        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(threads, publish, number) for number in range(count)))
        seconds = time.perf_counter() - began
        assert len(registry.tasks()) == count
        await worker.stop()
    return seconds
