"""Measures prompt tuning of an 8B model: 16 rows of 128 tokens, with and without recomputing activations."""

from __future__ import annotations

import itertools
import random
import statistics
import time

import torch
import transformers

from benchmarks.gpu.devices import memory, wait
from benchmarks.gpu.engines import NUM_VIRTUAL_TOKENS, load
from benchmarks.gpu.stage import Run
from server.train.config import TrainingConfig
from server.train.data import Example
from server.train.initial import initial_values
from server.train.methods import build_prefix
from server.train.objectives import Lesson, Targets
from server.train.trainer import TrainingProblem, train

ROWS, TOKENS, TARGETS = 16, 128, 5
STEPS = 6


def measure(run: Run) -> None:
    """Time the same steps with stored and with recomputed activations."""
    model = load(run, optimised=False).model
    device, dice = model.device, random.Random(0)
    rows = [tuple(dice.randrange(model.spec.vocab_size) for _ in range(TOKENS + 1)) for _ in range(ROWS)]
    lessons = [Lesson((Example(row[:-TARGETS], row[-TARGETS:]),)) for row in rows]
    for recompute in (False, True):
        if recompute and not hasattr(model.module, "activation_checkpointing_enable"):
            run.skip("recomputing", f"transformers {transformers.__version__} calls it otherwise")
            continue
        config = TrainingConfig(
            num_virtual_tokens=NUM_VIRTUAL_TOKENS,
            steps=2 if run.rehearse else STEPS,
            batch_size=ROWS,
            evaluations=1,
            recompute=recompute,
        )
        prefix = build_prefix(config, initial_values(model, config, None), 1)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        ends = [time.perf_counter()]
        losses = []

        def on_step(progress: object, ends: list[float] = ends, losses: list[object] = losses) -> None:
            wait(device)
            ends.append(time.perf_counter())
            losses.append(progress)

        result = train(TrainingProblem(model, prefix, Targets(), lessons, lessons[:2]), config, 0.01, on_step)
        times = [later - sooner for sooner, later in itertools.pairwise(ends)]
        name = "recomputing" if recompute else "keeping"
        seconds = statistics.median(times[1:] or times)
        run.note(
            **{
                f"{name}_tokens_s": ROWS * TOKENS / seconds,
                f"{name}_peak_gb": memory(device)["peak_gb"],
                f"{name}_loss": result.validation.loss,
            }
        )
        run.check(len(losses) == config.steps, f"{len(losses)} steps of {config.steps}")
