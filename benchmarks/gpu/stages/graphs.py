"""Checks that captured graphs keep their tensors alive, and what happens after a failed capture.

All buckets are replayed in random order, and between replays freed memory is reallocated and filled with other numbers.
Results are compared with the same work without graphs, for fused model families with and without shared key heads, and
for families that are not fused.
"""

from __future__ import annotations

import gc
import inspect
import random
from typing import Any

import torch

from benchmarks.gpu.devices import device_of, wait
from benchmarks.gpu.stage import Run
from server.engine.attention.interface import ATTENTION_NAME
from server.engine.attention.varlen_rows import VarlenAttention
from server.engine.engine import Engine
from server.engine.fast.decode_graphs import CudaRecorder, DecodeGraphs, Forward, capture
from server.engine.fast.optimise import optimise
from server.engine.model.frozen import FrozenModel
from server.engine.out_of_memory import release_unused
from tests.engine.varlen_reference import reference_varlen_attn
from tests.support import TINY, byte_tokenizer, make_engine, tiny_module

SEQUENCES = 6
LARGEST_DIFFERENCE = 1e-2
"""Largest difference between a replay and the same work without a graph, relative to the largest logit."""
FAMILIES = {
    "llama, fused": ("llama", {"fused"}),
    "llama": ("llama", set()),
    "gpt2, as many key heads": ("gpt2", set()),
    "qwen3, fused": ("qwen3", {"fused"}),
    "phi3": ("phi3", set()),
    "gemma3, windows": ("gemma3_text", set()),
    "qwen3_moe": ("qwen3_moe", set()),
}
TINY["qwen3_moe"] = TINY["qwen3"] | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@torch.inference_mode()
def measure(run: Run) -> None:
    """Check all families, then a capture that fails on purpose."""
    device = device_of(run)
    if device.type == "cuda" and "check_input_liveness" in inspect.signature(torch.cuda.graph).parameters:
        torch.cuda.graph = _checking_liveness(torch.cuda.graph)
        run.note(liveness="checked by torch")
    else:
        run.skip("liveness as torch sees it", "needs CUDA and torch 2.13")
    if run.rehearse:
        run.skip("captures")
    differences = {}
    for name, (family, parts) in list(FAMILIES.items())[: 2 if run.rehearse else None]:
        engine = _engine(family, parts, device)
        if engine.runner.varlen is None:
            run.check(False, f"{name}: there is no fast path for it")
            continue
        differences[name] = _largest_difference(engine, device, 5 if run.rehearse else 50)
        run.note(replays_differ_by=differences)  # written at once, because the next family may crash the process
        run.check(differences[name] <= LARGEST_DIFFERENCE, f"{name}: replays differ by {differences[name]:.3g}")
    _failing_capture(run, device)


def _checking_liveness(graph: Any) -> Any:
    """Enable torch's own check for the same fault."""

    class Checking(graph):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, check_input_liveness=True, **options)

    return Checking


def _engine(family: str, parts: set[str], device: torch.device) -> Engine:
    module: Any = tiny_module(family, dtype=torch.float32, attention=ATTENTION_NAME)
    module.to(device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = FrozenModel(module, byte_tokenizer(), name=family, max_model_len=128)
    optimise(model, parts, None)
    engine = make_engine(model)
    engine.runner.varlen = reference_varlen_attn if device.type == "cpu" else engine.runner.varlen
    return engine


def _largest_difference(engine: Engine, device: torch.device, replays: int) -> float:
    """The largest difference between replays and eager steps over the same rows."""
    assert engine.runner.varlen is not None
    cache, dice = engine.kv_cache, random.Random(0)
    cache.states.normal_()
    graphs, eager = (
        DecodeGraphs(engine.model, cache, engine.runner.varlen, SEQUENCES, record)
        for record in (_recorder(device), _eagerly)
    )
    gc.collect()
    vocabulary, largest = engine.model.spec.vocab_size, 0.0
    for _ in range(replays):
        rows = dice.randint(1, SEQUENCES)
        ids, positions = ([dice.randrange(most) for _ in range(rows)] for most in (vocabulary, 31))
        starts = [32 * slot for slot in dice.sample(range(8), rows)]
        _churn(device, dice)
        got = graphs.run(ids, positions, starts).clone()
        _churn(device, dice)
        expected = eager.run(ids, positions, starts)
        difference = (got - expected).abs().max() / expected.abs().max()
        largest = max(largest, float(difference.nan_to_num(nan=float("inf"))))
    return largest


def _recorder(device: torch.device) -> Any:
    return CudaRecorder(device) if device.type == "cuda" else _eagerly


def _eagerly(forward: Forward) -> Forward:
    return forward


def _churn(device: torch.device, dice: random.Random) -> None:
    """Allocate free memory in blocks of the sizes that steps use, fill it with invalid indices, and free it."""
    sizes = [dice.choice((1, 2, 7, 16, 64, 1024, 2**16)) for _ in range(64)]
    taken = [torch.full((size,), -(2**30), dtype=torch.int32, device=device) for size in sizes]
    del taken


def _failing_capture(run: Run, device: torch.device) -> None:
    """A forward that waits for the device cannot be captured; the server then runs eager steps, which must be correct.

    It does not capture again or draw random numbers on the device, where torch's generator raises after a failed
    capture.
    """
    engine = _engine("llama", {"fused"}, device)
    assert engine.runner.varlen is not None
    engine.kv_cache.states.normal_()
    eager = DecodeGraphs(engine.model, engine.kv_cache, engine.runner.varlen, SEQUENCES, _eagerly)
    row = [1, 2, 3, 4], [4, 9, 0, 30], [64, 0, 32, 96]
    expected = eager.run(*row).clone()

    def waits(*args: Any, **others: Any) -> torch.Tensor:
        out: torch.Tensor = engine.runner.varlen(*args, **others)  # type: ignore[misc]
        return out * float(out.abs().max().item() > -1)

    attention: VarlenAttention = waits
    if device.type == "cuda":
        found = capture(engine.model, engine.kv_cache, attention, 2)
        run.check(found is None, "a forward that waits for the device was captured")
        wait(device)
        block = torch.ones(2**20, device=device)
        run.check(int(block.sum()) == 2**20, "memory is wrong after a capture that failed")
    else:
        run.skip("a capture that fails")
    release_unused()
    dice = random.Random(0)
    difference = 0.0
    for _ in range(5):
        _churn(device, dice)
        difference = max(difference, float((eager.run(*row) - expected).abs().max().nan_to_num(nan=float("inf"))))
    run.note(after_a_failed_capture_steps_differ_by=difference)
    run.check(difference <= LARGEST_DIFFERENCE, "eager steps differ after a capture that failed")
