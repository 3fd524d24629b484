"""Measures an 8B model with random weights: its memory, the memory plan, and the speed of decoding.

The share of the bandwidth is the time in which the device copies the bytes that a step must read (all weights except
the input embeddings, and the keys and values so far), divided by the step's time.
"""

from __future__ import annotations

import statistics
import time

import torch
from random_llama import inputs

from benchmarks.gpu.devices import GB, copied_per_second, memory, wait
from benchmarks.gpu.engines import Work, batch_of, end_all, load, soft_prompts, tokens_per_second, until_all_decode
from benchmarks.gpu.stage import Run
from server.contracts import GenerationRequest, SamplingParams
from server.engine.build_engine import longest_prefix
from server.engine.engine import Engine
from server.engine.memory.kv_cache import bytes_per_position
from server.engine.memory.largest_step import measure_steps
from server.engine.memory.plan import Steps
from server.engine.model.preflight import free_memory

LEAST_SHARE = 0.6
LEAST_MIXED = 0.97
TASKS = 8
STEPS, ROUNDS = 30, 3


def measure(run: Run) -> None:
    """Load the model, plan memory, run the worst step, decode, mix tasks."""
    loaded = load(run, max_sequences=256, max_model_len=1024, max_batch_tokens=8192)
    free = free_memory(loaded.model.device)
    settings, model = loaded.settings, loaded.model
    prefix = longest_prefix(settings, model.spec)
    steps = measure_steps(model, settings.max_sequences, settings.max_batch_tokens, prefix) or Steps()
    run.note(planned_step_gb=steps.largest / GB, planned_graphs_gb=steps.graphs / GB)
    began = time.perf_counter()
    engine = loaded.engine()
    run.note(
        engine_s=time.perf_counter() - began,
        graphs=engine.runner.graphs is not None,
        varlen=engine.runner.varlen is not None,
        free_before_plan_gb=free / GB,
        kv_gb=engine.kv_cache.states.nbytes / GB,
        prefixes_gb=engine.prefixes.budget_bytes / GB,
    )
    if engine.runner.varlen is None:
        run.skip("graphs and flash attention")
        run.check(run.rehearse, "there is no fast path; the log says why")
    _worst_step(run, engine, steps.largest / GB)
    device = engine.model.device
    bandwidth = copied_per_second(device, 2**24 if run.rehearse else 2**30)
    run.note(copy_gb_s=bandwidth / GB)
    for batch in (1, 4) if run.rehearse else (1, 16, 64, 256):
        _decode(run, engine, batch, loaded.weight_bytes / bandwidth, bytes_per_position(engine.model.spec) / bandwidth)
    _mixed(run, engine, 4 if run.rehearse else 256)


def _worst_step(run: Run, engine: Engine, planned: float) -> None:
    """Compare the worst step's memory with the plan: all possible input tokens, scored, beside sampled decodes."""
    device, length = engine.model.device, engine.model.spec.max_model_len - 8
    budget, most = (8192, 256) if not run.rehearse else (64, 8)
    rules = SamplingParams(max_new_tokens=1, ignore_eos=True)
    scored: Work = [
        (GenerationRequest(f"s{i}", inputs(i, length), rules, input_logprobs=True), None)
        for i in range(-(-budget // length))
    ]
    decodes = batch_of(most - len(scored), [None], 64, 8, temperature=0.7, top_p=0.9)
    until_all_decode(engine, decodes)
    before = memory(device)["allocated_gb"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for request, _ in scored:
        engine.add(request, None)
    began = time.perf_counter()
    engine.step()
    engine.step()
    wait(device)
    peak = memory(device)["peak_gb"]
    run.note(worst_step_s=(time.perf_counter() - began) / 2, worst_step_takes_gb=peak - before)
    run.check(
        run.rehearse or peak - before <= planned, f"the worst step takes {peak - before:.2f} GB, not {planned:.2f}"
    )
    left = free_memory(device, with_cache=True) / GB
    run.note(free_after_worst_step_gb=left)
    reserved_for_later = (engine.prefixes.budget_bytes - engine.prefixes.num_bytes) / GB
    run.check(
        run.rehearse or left >= reserved_for_later,
        f"{left:.1f} GB are left, and prefixes may still take {reserved_for_later:.1f} GB",
    )
    end_all(engine, [*decodes, *scored])


def _decode(run: Run, engine: Engine, batch: int, weights_s: float, position_s: float) -> None:
    """Time steps in which `batch` sequences decode, and compare them with the time of reading their data."""
    work = batch_of(batch, [None], 3 + 2 * STEPS)
    until_all_decode(engine, work)
    running = engine.scheduler.running
    times, shares, host = [], [], []
    for _ in range(3 + STEPS):
        positions = sum(sequence.num_known for sequence in running)
        began, thread = time.perf_counter(), time.thread_time()
        engine.step()  # ends when the tokens are on the host
        times.append(time.perf_counter() - began)
        host.append(time.thread_time() - thread)
        shares.append((weights_s + positions * position_s) / times[-1])
    seconds = statistics.median(times[3:])
    figures = {"step_ms": 1000 * seconds, "host_ms": 1000 * statistics.median(host[3:]), "tokens_s": batch / seconds}
    run.note(**{f"decode_{batch}_{name}": value for name, value in figures.items()})
    run.note(**{f"decode_{batch}_busy_ms": _busy_ms(engine)})
    share = statistics.median(shares[3:])
    if batch in (1, 256):
        run.bar(f"decode_{batch}_share_of_bandwidth", share, LEAST_SHARE)
    else:
        run.note(**{f"decode_{batch}_share_of_bandwidth": share})
    end_all(engine, work)


def _busy_ms(engine: Engine, steps: int = 5) -> float:
    """Milliseconds of a step in which the device is busy, from the profiler's kernel times; on a CPU, operators."""
    cuda = engine.model.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(steps):
            engine.step()
        wait(engine.model.device)
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    return float(sum(getattr(event, name) for event in profiler.key_averages()) / 1000 / steps)


def _mixed(run: Run, engine: Engine, batch: int) -> None:
    """Run the same batch with no task, one task and eight tasks, in turn."""
    prompts = soft_prompts(engine.model, TASKS)
    kinds = {"no_task": [None], "one_task": prompts[:1], "eight_tasks": prompts}
    speeds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(ROUNDS + 1):  # the first round only warms up and computes the prefixes
        for name, chosen in kinds.items():
            found = tokens_per_second(engine, batch_of(batch, chosen, 8 if run.rehearse else 64))
            speeds[name] += [found] if number else []
    run.note(**{f"{name}_tokens_s": statistics.median(found) for name, found in speeds.items()})
    ratios = [eight / one for eight, one in zip(speeds["eight_tasks"], speeds["one_task"], strict=True)]
    run.bar("eight_tasks_to_one", statistics.median(ratios), LEAST_MIXED)
