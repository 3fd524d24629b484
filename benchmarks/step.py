"""Measures the time of engine steps without HTTP, and compares it with lower bounds.

Loads the model once for each set of optimisations (`PRELUDE_OPTIMISE`). In interleaved rounds, times steps in which
every sequence decodes at about 170 positions, and prefills of whole inputs. The same rounds measure two lower bounds
for this machine and these weights:

    products    only the matrix products of such a step, run as the step runs them; logits included
    roofline    the bytes that such a step must read, all matrices once and the keys and values of its positions, at
                the bandwidth with which all cores read, or copy, a gigabyte in the same run

Weights that stay in the processor's cache from one step to the next can beat the roofline.

    python benchmarks/step.py                      # some minutes
    python benchmarks/step.py --rounds 1 --configurations all

Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from server.huge_pages import restart_with_huge_pages
from server.openmp import share_cores

if __name__ == "__main__":
    restart_with_huge_pages()
share_cores()  # before torch

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from server.contracts import GenerationRequest, SamplingParams  # noqa: E402
from server.engine.build_engine import load_engine  # noqa: E402
from server.engine.engine import Engine  # noqa: E402
from server.engine.fast.chained import ChainedLayers  # noqa: E402
from server.engine.fast.linear import FrozenLinear, can_pack  # noqa: E402
from server.engine.fast.row_buckets import bucket  # noqa: E402
from server.engine.fast.tiled import TiledLinear, frozen_linear  # noqa: E402
from server.engine.kernels.units import CHUNK, COLUMNS, SHARES, TILE_ROWS, LinkColumns, ProductArguments  # noqa: E402
from server.engine.memory.kv_cache import bytes_per_position  # noqa: E402
from server.settings import Settings  # noqa: E402

CONFIGURATIONS = ("none", "packed", "fused,packed", "all")
FLOORS = ("products", "roofline")
INPUT_TOKENS = 155
STEPS = 10
"""Number of timed steps in a round, after three untimed ones; the sequences are then about 170 positions long."""
POSITIONS = 170
PREFILLS = (37, 101, 256)
PREFILLS_PER_ROUND = 6


Work = list[tuple[FrozenLinear | TiledLinear, int]]
"""Products with their numbers of rows."""

BUFFER_BYTES = 2**30
"""Far larger than a processor's cache."""


def bandwidth() -> float:
    """Bytes per second of all cores: reading, or reading and writing in a copy, whichever is higher."""
    source = torch.ones(BUFFER_BYTES // 4)
    target = torch.empty_like(source)
    read = min(timed(source.sum) for _ in range(4))
    copy = min(timed(lambda: target.copy_(source)) for _ in range(4))
    return max(BUFFER_BYTES / read, 2 * BUFFER_BYTES / copy)


class Products:
    """Only the matrix products of a step, in random weights: as one chain where a step has one, else call by call."""

    def __init__(self, engine: Engine) -> None:
        config, self._kernels = engine.model.module.config, engine.model.kernels
        hidden, inner = config.hidden_size, config.intermediate_size
        attended = config.num_attention_heads * engine.model.spec.head_dim
        qkv = attended + 2 * config.num_key_value_heads * engine.model.spec.head_dim
        shapes = [(qkv, hidden), (hidden, attended), (2 * inner, hidden), (hidden, inner)]
        layers = engine.model.module.get_decoder().layers
        self._is_chained = isinstance(layers[0], ChainedLayers)
        gates = [False, False, self._is_chained, False]
        self._layers = [
            [self._linear(shape, engine, is_gated) for shape, is_gated in zip(shapes, gates, strict=True)]
            for _ in range(config.num_hidden_layers)
        ]
        self._head = self._linear((config.vocab_size, hidden), engine)
        self._dtype = engine.model.dtype
        linears = [self._head, *itertools.chain.from_iterable(self._layers)]
        self.num_bytes = sum(linear.out_features * linear.in_features for linear in linears) * self._dtype.itemsize

    @staticmethod
    def _linear(shape: tuple[int, int], engine: Engine, is_gated: bool = False) -> FrozenLinear | TiledLinear:
        weight = torch.randn(shape, dtype=engine.model.dtype) * 0.02
        return frozen_linear(weight, None, engine.model.kernels, pack=can_pack(weight), is_gated=is_gated)

    @torch.inference_mode()
    def seconds(self, rows: int, kept: int) -> float:
        """Time of one pass over `rows` tokens, `kept` of which have logits; both padded as a step pads them."""
        rows, kept = bucket(rows), bucket(kept)
        # Each product with its rows: the last layer computes only what is kept, after its attention.
        work = [(linear, rows) for layer in self._layers for linear in layer]
        work[-3:] = [(linear, kept) for linear, _ in work[-3:]]
        whole_tiles = -(-rows // TILE_ROWS) * TILE_ROWS
        layer_inputs = [torch.randn(whole_tiles, linear.in_features, dtype=self._dtype) for linear in self._layers[0]]
        inputs = layer_inputs * len(self._layers)
        last = torch.randn(kept, self._head.in_features, dtype=self._dtype)
        run = self._chain(work, inputs) if self._is_chained else self._calls(work, inputs)
        began = time.perf_counter()
        run()
        self._head(last)
        return time.perf_counter() - began

    @staticmethod
    def _calls(work: Work, inputs: list[torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for (linear, rows), x in zip(work, inputs, strict=True):
                linear(x[:rows])

        return run

    def _chain(self, work: Work, inputs: list[torch.Tensor]) -> Callable[[], None]:
        """The products in the loop that runs a step's layers; see `ChainedLayers`."""
        assert self._kernels is not None, "a chain is compiled"
        threads = torch.get_num_threads()
        most = max(len(x) for x in inputs)
        outs = {linear.out_features: torch.empty(linear.out_features * most, dtype=self._dtype) for linear, _ in work}
        table = np.zeros((len(work), 2 + len(ProductArguments._fields) + SHARES), np.int64)
        links = np.zeros((len(work), len(LinkColumns._fields)), np.int64)
        for i, ((linear, rows), x) in enumerate(zip(work, inputs, strict=True)):
            assert isinstance(linear, TiledLinear), "see `can_chain`"
            units = linear.out_features // COLUMNS * -(-rows // CHUNK)
            # Rows lie in tiles as in a step: all but those of attention.
            tiles = {"x_in_tiles": i % 4 != 1, "out_in_tiles": linear.is_gated}
            arguments = linear.arguments(rows, x.data_ptr(), None, outs[linear.out_features].data_ptr(), **tiles)
            table[i, :-SHARES] = 0, units, *arguments
            links[i, :2] = linear.loop(adds=False).address, table[i].ctypes.data
        chain = self._kernels.chain()
        sched_yield = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
        kept = outs, table, links  # the table holds their addresses

        def run() -> None:
            table[:, -SHARES:] = 0
            chain(threads, threads, len(work), kept[-1].ctypes.data, sched_yield)

        return run


def request(name: str, tokens: int, new: int) -> GenerationRequest:
    """A request without a soft prompt, because copying a cached prefix takes no time in steps."""
    return GenerationRequest(name, tuple(range(5, 5 + tokens)), SamplingParams(max_new_tokens=new, ignore_eos=True))


def decode_seconds(engine: Engine, batch: int) -> list[float]:
    """Times of steps in which `batch` sequences decode."""
    for i in range(batch):
        engine.add(request(f"decode-{i}", INPUT_TOKENS, 200), None)
    while len(engine.scheduler.waiting) or any(sequence.num_pending > 1 for sequence in engine.scheduler.running):
        engine.step()
    times = [timed(engine.step) for _ in range(3 + STEPS)][3:]
    for i in range(batch):
        engine.abort(f"decode-{i}")
    return times


def prefill_seconds(engine: Engine, tokens: int) -> list[float]:
    """Times of prefills of `tokens` tokens, including the choice of the first new token."""
    times = []
    for _ in range(PREFILLS_PER_ROUND):
        engine.add(request("prefill", tokens, 1), None)
        times.append(timed(engine.step))
    return times


def timed(work: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(configurations: list[str], batches: list[int], rounds: int) -> tuple[dict[str, dict[str, float]], float]:
    """Median milliseconds by kind of step and configuration with both lower bounds, and the memory bandwidth."""
    engines = {
        name: load_engine(Settings.load(optimise=name, max_sequences=max(batches)))
        for name in tqdm(configurations, "loading")
    }
    products, per_position = Products(engines["all"]), bytes_per_position(engines["all"].model.spec)
    fastest = 0.0
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in tqdm(range(rounds + 1), "rounds"):  # the first round only warms up
        for name, engine in engines.items():
            for batch in batches:
                found = decode_seconds(engine, batch)
                times[f"decode {batch}", name] += found if number else []
            for tokens in PREFILLS:
                found = prefill_seconds(engine, tokens)
                times[f"prefill {tokens}", name] += found if number else []
        for kind, rows, kept in [("decode", n, n) for n in batches] + [("prefill", n, 1) for n in PREFILLS]:
            found = [products.seconds(rows, kept) for _ in range(PREFILLS_PER_ROUND)]
            times[f"{kind} {rows}", "products"] += found if number else []
        fastest = max(fastest, bandwidth())
    result: dict[str, dict[str, float]] = defaultdict(dict)
    for (kind, name), values in times.items():
        result[kind][name] = 1000 * statistics.median(values)
    for batch in batches:
        result[f"decode {batch}"]["roofline"] = 1000 * (products.num_bytes + batch * POSITIONS * per_position) / fastest
    for tokens in PREFILLS:
        result[f"prefill {tokens}"]["roofline"] = 1000 * (products.num_bytes + tokens * per_position) / fastest
    return dict(result), fastest


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    configurations = [name for name in CONFIGURATIONS if name in (*options.configurations, "all")]
    result, fastest = measure(configurations, options.batches, options.rounds)
    names = [*configurations, *FLOORS]
    machine = f"{os.cpu_count()} cores {platform.machine()}, {fastest / 1e9:.1f} GB/s"
    print(f"\nmilliseconds, medians of {options.rounds} rounds; {machine}")
    print(f"{'':<14}" + "".join(f"{name:>14}" for name in [*names, *(f"{floor}/all" for floor in FLOORS)]))
    for kind, row in result.items():
        shares = "".join(f"{row[floor] / row['all']:>14.2f}" for floor in FLOORS)
        print(f"{kind:<14}" + "".join(f"{row[name]:>14.1f}" for name in names) + shares)
    about = {"spin": os.environ.get("GOMP_SPINCOUNT"), "bytes_per_second": fastest}
    print(json.dumps({**about, "milliseconds": result}))


if __name__ == "__main__":
    main()
