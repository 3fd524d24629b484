"""Compares Prelude with alternative servers over HTTP, one server after the other on the same machine.

Every server gets the same model, dtype and kind of texts. Each client sends one request after the other for a fixed
time. Rounds are interleaved: in each round, every server is started, prepared, measured under one load after the other
with a warm-up before each, and stopped.

    python benchmarks/serve.py                                        # all that can be started here; long
    python benchmarks/serve.py --peers prelude vllm-prefix --workloads classify --rounds 1 --seconds 10

Prints a table with ratios and, last, one line of JSON. See peers.py for the servers.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import httpx
import psutil
from load import Load, Measured, peak_resident, started
from peers import PEERS, Model, Peer, Workload
from tqdm import tqdm

from server.engine.model.weights import resolve_checkpoint
from server.settings import Settings

WORKLOADS = {  # few clients first, because a server's remaining work for earlier clients would slow down later ones
    "single": Workload(clients=1, output_tokens=32),
    "classify": Workload(clients=32, output_tokens=4),
    "generate": Workload(clients=64, output_tokens=32),
}


async def measure(peer: Peer, workload: Workload, url: str, process: psutil.Process, seconds: float) -> Measured:
    """Measure one round of one server."""
    limits = httpx.Limits(max_connections=workload.clients + 4)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        await peer.prepare(client, workload)
        measured = await Load(peer, workload, client).run(seconds)
    measured.rss = peak_resident(process)
    return measured


def run(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Workload -> server -> figures, medians of the rounds."""
    settings = Settings.load()
    model = Model(resolve_checkpoint(settings.model, None, settings.cache_dir).location)
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    turns = list(itertools.product(range(options.rounds), options.peers))
    with tqdm(total=len(turns) * len(options.workloads), desc="measuring") as bar:
        for _, peer_name in turns:
            peer, workloads = PEERS[peer_name](model), [WORKLOADS[name] for name in options.workloads]
            bar.set_postfix_str(f"starting {peer_name}")
            with (
                tempfile.TemporaryDirectory(prefix="prelude-serve-") as folder,
                started(peer, workloads[0], Path(folder)) as (url, process),
            ):
                for name, workload in zip(options.workloads, workloads, strict=True):
                    bar.set_postfix_str(f"{peer_name} {name}")
                    measured = asyncio.run(measure(peer, workload, url, process, options.seconds))
                    found[name, peer_name].append(measured.figures())
                    bar.write(json.dumps({"workload": name, "peer": peer_name, **found[name, peer_name][-1]}))
                    bar.update()
    result: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (name, peer_name), rows in found.items():
        keys = rows[0].keys()
        result[name][peer_name] = {key: statistics.median(row[key] for row in rows if key in row) for key in keys}
    return dict(result)


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one server in one round")
    options = parser.parse_args()
    result = run(options)
    for name, rows in result.items():
        print(f"\n{name}: {WORKLOADS[name]}; {os.cpu_count()} cores {platform.machine()}")
        print(f"{'':<14}" + "".join(f"{title:>10}" for title in COLUMNS.values()) + f"{'prelude/it':>12}")
        ours = rows.get("prelude", {}).get("tokens_per_second", float("nan"))
        for peer_name, row in rows.items():
            cells = "".join(f"{row.get(key, float('nan')):>10.1f}" for key in COLUMNS)
            theirs = row["tokens_per_second"]
            print(f"{peer_name:<14}{cells}{ours / theirs if theirs else float('inf'):>12.2f}")
    print(json.dumps(result))


COLUMNS = {
    "requests_per_second": "req/s",
    "tokens_per_second": "tok/s",
    "first_token_p50_ms": "TTFT p50",
    "first_token_p99_ms": "p99 ms",
    "between_tokens_p50_ms": "ITL p50",
    "between_tokens_p99_ms": "p99 ms",
    "rss_mb": "peak MB",
}

if __name__ == "__main__":
    main()
