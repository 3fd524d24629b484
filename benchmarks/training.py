"""Measures which share of the machine's matrix rate a training step reaches: prompt tuning, 16 rows of 128 tokens.

The rate is that of torch's own products of the model's sizes, in the training dtype. A step's work is that of its
matrix products, forward and backward: the frozen weights have no gradients, so it is 4 floating-point operations for
each weight and token, and 4 for each weight of the output layer and target token. Attention, norms and the optimiser do
not count as work.

    python benchmarks/training.py
    python benchmarks/training.py --method prefix_tuning --rounds 10

Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from server.engine.model.frozen import FrozenModel
from server.settings import Settings
from server.train.config import TrainingConfig
from server.train.data import Example
from server.train.forward import target_logits
from server.train.initial import initial_values
from server.train.methods import build_prefix
from server.train.objectives import Lesson, Targets

ROWS, TOKENS, TARGETS = 16, 128, 5


def seconds(action: Callable[[], object]) -> float:
    """Time one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def matrix_rate(model: FrozenModel, rounds: int) -> float:
    """Floating-point operations per second of one layer's products, each timed alone, medians."""
    layer = model.module.get_decoder().layers[0]
    sizes = [(module.in_features, module.out_features) for module in layer.modules() if isinstance(module, nn.Linear)]
    work = spent = 0.0
    for fed, made in sizes:
        states = torch.randn(ROWS * TOKENS, fed, dtype=model.dtype)
        weight = torch.randn(made, fed, dtype=model.dtype)
        times = [seconds(lambda s=states, w=weight: F.linear(s, w)) for _ in range(rounds)]
        work += 2 * ROWS * TOKENS * fed * made
        spent += statistics.median(times)
    return work / spent


def step_work(model: FrozenModel, fed: int, targets: int) -> float:
    """Floating-point operations of the matrix products of a step, forward and backward."""
    layers = sum(
        module.weight.numel() for module in model.module.get_decoder().modules() if isinstance(module, nn.Linear)
    )
    output = model.module.get_output_embeddings().weight.numel()
    return 4.0 * (layers * fed + output * targets)


def main() -> None:
    """Measure the rate and the step, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="prompt_tuning")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    model = FrozenModel.load(Settings.load())
    config = TrainingConfig(method=options.method, num_virtual_tokens=20)
    prefix = build_prefix(config, initial_values(model, config, None), 1)
    dice = random.Random(0)
    ids = [tuple(dice.randrange(model.spec.vocab_size) for _ in range(TOKENS + 1)) for _ in range(ROWS)]
    lessons = [Lesson((Example(row[:-TARGETS], row[-TARGETS:]),)) for row in ids]
    examples = [lesson.examples[0] for lesson in lessons]

    def step() -> None:
        logits, targets = target_logits(model, prefix, examples)
        Targets().losses(logits, targets, lessons).mean().backward()

    rate = matrix_rate(model, 3 * options.rounds)
    step()
    times = [seconds(step) for _ in range(options.rounds)]
    median = statistics.median(times)
    computed = ROWS * TOKENS + (0 if config.method == "prefix_tuning" else config.num_virtual_tokens)
    work = step_work(model, computed, ROWS * TARGETS)
    share = work / median / rate
    figures = {
        "dtype": model.spec.dtype,
        "method": config.method,
        "matrix_gflops": round(rate / 1e9),
        "step_gflops": round(work / median / 1e9),
        "share": round(share, 3),
        "step_seconds": round(median, 3),
        "tokens_per_second": round(ROWS * TOKENS / median),
    }
    for name, value in figures.items():
        print(f"{name:20} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
