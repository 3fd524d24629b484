"""The engine on one GPU with a model of 8 billion parameters: shares of the memory's bandwidth, tasks, registering.

The model has Llama-3.1-8B's shape and random weights in bfloat16, made on the device: speed does not depend on what the
numbers are, and nothing is downloaded. Measured:

    decode      steps in which every sequence decodes, as a share of the time in which the device copies as many bytes
                as such a step must read: all weights but the input embeddings, and the keys and values so far
    tasks       output tokens per second of a batch on eight soft prompts to the same batch on one
    peer        the same batch without soft prompts, to transformers' continuous batching (`generate_batch`)
    register    publishing soft prompts of 20 virtual tokens, each durable and with its prefix computed

    python benchmarks/gpu.py                       # under 8 minutes
    python benchmarks/gpu.py --tiny --device cpu   # does the script run? a toy model, figures of no meaning

Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from random_llama import OUTPUT_TOKENS, inputs, make_module
from tqdm import tqdm
from transformers import AutoTokenizer

from server.core import GenerationRequest, SamplingParams
from server.engine.attention import ATTENTION_NAME, register_attention
from server.engine.build import build_engine
from server.engine.checkpoint import resolve_checkpoint
from server.engine.engine import Engine
from server.engine.kv_cache import bytes_per_position
from server.engine.model import FrozenModel, choose_device
from server.engine.optimise import load_kernels, optimise
from server.engine.worker import EngineWorker
from server.errors import ConfigurationError
from server.registry.objects import LocalObjects
from server.registry.registry import Registry
from server.registry.store import Store
from server.settings import EMBEDDED_MODEL, Settings
from server.soft_prompts.soft_prompt import SoftPrompt

NUM_VIRTUAL_TOKENS = 20
TASKS = 8
STEPS = 30
"""Timed steps of decoding, after three that are not."""
ROUNDS = 3
PUBLISHERS = 32
PEER_SECONDS = 180

Work = list[tuple[GenerationRequest, SoftPrompt | None]]


def make_engine(options: argparse.Namespace) -> tuple[Engine, int]:
    """The engine as a server has it, and the bytes of weights that a step reads."""
    settings = Settings.load(max_sequences=options.batch, max_model_len=512, max_batch_tokens=max(4096, options.batch))
    register_attention()
    module = make_module(ATTENTION_NAME, options.device, tiny=options.tiny)
    read = sum(parameter.nbytes for parameter in module.parameters()) - module.get_input_embeddings().weight.nbytes
    tokenizer = AutoTokenizer.from_pretrained(resolve_checkpoint(EMBEDDED_MODEL, None, settings.cache_dir).location)
    model = FrozenModel(module, tokenizer, name="random", max_model_len=settings.max_model_len)
    optimise(model, settings.optimisations, load_kernels(model, settings.optimisations, settings.cache_dir / "kernels"))
    return build_engine(settings, model), read


def batch_of(size: int, prompts: list[SoftPrompt | None], new: int) -> Work:
    """So many requests, spread over soft prompts."""
    sampling = SamplingParams(max_new_tokens=new, ignore_eos=True)
    return [
        (GenerationRequest(f"r{i}", inputs(i), sampling, f"task {i % len(prompts)}"), prompts[i % len(prompts)])
        for i in range(size)
    ]


def tokens_per_second(engine: Engine, work: Work) -> float:
    """Output tokens per second of a batch, prefills included."""
    for request, prompt in work:
        engine.add(request, prompt)
    began, tokens = time.perf_counter(), 0
    while engine.has_work:
        tokens += sum(delta.token is not None for delta in engine.step())
    return tokens / (time.perf_counter() - began)


def decode(engine: Engine, batch: int, weight_bytes: int, bytes_per_second: float) -> dict[str, float]:
    """Steps in which so many sequences decode."""
    for request, prompt in batch_of(batch, [None], 100):
        engine.add(request, prompt)
    running = engine.scheduler.running
    while len(engine.scheduler.waiting) or any(sequence.num_pending > 1 for sequence in running):
        engine.step()
    times, shares = [], []
    for _ in range(3 + STEPS):
        positions = sum(sequence.num_known for sequence in running)
        began = time.perf_counter()
        engine.step()  # ends when the tokens are on the host
        times.append(time.perf_counter() - began)
        read = weight_bytes + positions * bytes_per_position(engine.model.spec)
        shares.append(read / bytes_per_second / times[-1])
    for i in range(batch):
        engine.abort(f"r{i}")
    seconds = statistics.median(times[3:])
    return {"step_ms": 1000 * seconds, "tokens_s": batch / seconds, "share": statistics.median(shares[3:])}


def copied_per_second(options: argparse.Namespace) -> float:
    """Bytes that the device reads and writes per second while it copies."""
    source = torch.ones(2**26 if options.tiny else 2**30, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        wait(options)
        began = time.perf_counter()
        target.copy_(source)
        wait(options)
        times.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(times)


def wait(options: argparse.Namespace) -> None:
    """Until the device has done everything."""
    if options.device.type == "cuda":
        torch.cuda.synchronize(options.device)


def peer_in_a_process(options: argparse.Namespace) -> float | None:
    """transformers' tokens per second, from a process whose memory is free again afterwards, whatever happens in it."""
    script = str(Path(__file__).with_name("random_llama.py"))
    command = [sys.executable, script, "--device", str(options.device), "--batch", str(options.batch)]
    try:
        done = subprocess.run(
            command + ["--tiny"] * options.tiny, stdout=subprocess.PIPE, check=True, text=True, timeout=PEER_SECONDS
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
        print(f"transformers did not finish: {exc}", file=sys.stderr)
        return None
    speed: float | None = json.loads(done.stdout.splitlines()[-1])
    return speed


async def register(engine: Engine, count: int) -> float:
    """Seconds to publish so many soft prompts, by some publishers at once."""
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
        with tqdm(total=count, desc="publishing", unit="task", leave=False) as bar:
            loop = asyncio.get_running_loop()
            for done in asyncio.as_completed([loop.run_in_executor(threads, publish, i) for i in range(count)]):
                await done
                bar.update()
        seconds = time.perf_counter() - began
        assert len(registry.tasks()) == count
        await worker.stop()
    return seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything; the peer first, while the device is empty."""
    with tqdm(total=5, desc="transformers") as bar:
        peer = peer_in_a_process(options)
        bar.update()
        bar.set_description("loading")
        bandwidth = copied_per_second(options)
        engine, weight_bytes = make_engine(options)
        bar.update()
        bar.set_description("decoding")
        steps = {n: decode(engine, n, weight_bytes, bandwidth) for n in (1, options.batch)}
        bar.update()
        bar.set_description("tasks")
        hidden = engine.model.spec.hidden_size
        prompts: list[SoftPrompt | None] = [
            SoftPrompt("PROMPT_TUNING", torch.randn(NUM_VIRTUAL_TOKENS, hidden) * 0.02) for _ in range(TASKS)
        ]
        kinds: dict[str, list[SoftPrompt | None]] = {"none": [None], "one": prompts[:1], "eight": prompts}
        speeds: dict[str, list[float]] = {name: [] for name in kinds}
        for number in range(ROUNDS + 1):  # the first only warms up, and computes the prefixes
            for name, chosen in kinds.items():
                found = tokens_per_second(engine, batch_of(options.batch, chosen, OUTPUT_TOKENS))
                speeds[name] += [found] if number else []
        bar.update()
        bar.set_description("registering")
        seconds = asyncio.run(register(engine, options.prompts))
        bar.update()
    ours = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "device": torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "tiny": options.tiny,
        "graphs": engine.graphs is not None,
        "varlen": engine.varlen is not None,
        "copy_gb_s": bandwidth / 1e9,
        "decode": steps,
        "tokens_s": ours,
        "mixed_to_one": statistics.median(e / o for e, o in zip(speeds["eight"], speeds["one"], strict=True)),
        "transformers_tokens_s": peer,
        "to_transformers": None if peer is None else ours["none"] / peer,
        "registered": options.prompts,
        "register_s": seconds,
    }


def show(result: dict[str, Any], options: argparse.Namespace) -> None:
    """The table, then the line."""
    print(f"\n{result['device']}, torch {result['torch']}, copies {result['copy_gb_s']:,.0f} GB/s")
    print(f"graphs: {result['graphs']}, varlen_attn: {result['varlen']}")
    print(f"{'':<44}{'measured':>16}{'target':>10}")
    for batch, found in result["decode"].items():
        print(f"{f'decode {batch}: ms a step':<44}{found['step_ms']:>16.2f}")
        print(f"{f'decode {batch}: tokens/s':<44}{found['tokens_s']:>16,.0f}")
        print(f"{f'decode {batch}: share of bandwidth':<44}{found['share']:>16.2f}{'≥ 0.6':>10}")
    for name, found in result["tokens_s"].items():
        print(f"{f'{options.batch} requests on {name} task(s): tokens/s':<44}{found:>16,.0f}")
    print(f"{'eight tasks to one':<44}{result['mixed_to_one']:>16.3f}{'≥ 0.97':>10}")
    peer, ratio = result["transformers_tokens_s"], result["to_transformers"]
    print(f"{'transformers, the same batch: tokens/s':<44}" + ("did not finish" if peer is None else f"{peer:>16,.0f}"))
    if ratio is not None:
        print(f"{'no task to transformers':<44}{ratio:>16.2f}{'≥ 1.2':>10}")
    print(f"{f'seconds to register {options.prompts:,} soft prompts':<44}{result['register_s']:>16.1f}")
    print(json.dumps(result))


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy model and a toy load, to see that the script runs")
    parser.add_argument("--batch", type=int, help="sequences at once; default 256, tiny 6")
    parser.add_argument("--prompts", type=int, help="soft prompts to register; default 10,000, tiny 40")
    options = parser.parse_args()
    try:
        options.device = choose_device(options.device)
    except ConfigurationError as exc:
        sys.exit(f"This benchmark needs a GPU: {exc.message.replace('PRELUDE_DEVICE', '--device')}")
    options.batch = options.batch or (6 if options.tiny else 256)
    options.prompts = options.prompts or (40 if options.tiny else 10_000)
    show(measure(options), options)


if __name__ == "__main__":
    main()
