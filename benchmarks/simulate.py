"""Simulates a thousand replicas and a million tasks: prefix hits by routing, store requests, and age of what is served.

    python benchmarks/simulate.py                          # 1,000 replicas, 1,000,000 tasks
    python benchmarks/simulate.py --validate               # beside what `replicas.py` measured

Hit rates are those of an LRU cache under independent requests (Che's approximation): a task with r requests per second
is cached with probability 1 - exp(-r t), and t is such that the expected number of cached tasks is the cache's size.
Routing by chance divides each task's requests among all replicas. By task, a hash chooses the replica. With overflow, a
replica takes up to LOAD times the mean, and the rest goes to the next replica of the task, as a fluid would.

Changes are announced to all replicas. Some announcements are lost; then the next look at the store finds the change.
`docs/replicas.md` has the formulas. Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LOAD = 1.25
"""Load of the busiest replica to the mean, at which requests overflow."""
EXPONENT = 1.1
ANNOUNCE_SECONDS = 0.03
"""Median of the time until a replica has read an announced change, as measured; its spread is log-normal."""
MEASURED = ((2, "by task", 59, 0.82), (2, "by chance", 73, 0.63), (4, "by task", 74, 0.90))
"""Replicas, routing, requests/s and hit rate of `replicas.py --seconds 4`: 64 tasks, room for 16 prefixes a replica."""


class Streams(NamedTuple):
    """Requests per second of a task that a replica gets, one entry for each pair that has any."""

    replica: Ints
    rate: Floats


def popularity(tasks: int) -> Floats:
    """Shares of all requests, by Zipf's law."""
    shares = 1.0 / np.arange(1, tasks + 1) ** EXPONENT
    return shares / shares.sum()


def by_task(shares: Floats, replicas: int, dice: np.random.Generator) -> Streams:
    """Each task on the replica that its hash chooses."""
    return Streams(dice.integers(0, replicas, len(shares)), shares)


def with_overflow(shares: Floats, replicas: int, dice: np.random.Generator) -> Streams:
    """Each task on the first of its replicas that has room; what does not fit goes to the next."""
    room = np.full(replicas, LOAD / replicas)
    rest, found = shares.copy(), list[Streams]()
    while len(rest):
        replica = dice.integers(0, replicas, len(rest))
        wanted = np.bincount(replica, rest, replicas)
        share = np.minimum(1.0, room / np.maximum(wanted, 1e-300))
        taken = rest * share[replica]
        room -= np.bincount(replica, taken, replicas)
        found.append(Streams(replica[taken > 0], taken[taken > 0]))
        rest -= taken
        rest = rest[rest > 1e-12]
    return Streams(*(np.concatenate(columns) for columns in zip(*found, strict=True)))


def hit_rate(streams: Streams, replicas: int, room: int) -> float:
    """Share of requests that find their prefix in an LRU cache of `room` prefixes on each replica."""
    replica, rate = streams
    few = np.bincount(replica, minlength=replicas) <= room  # everything fits
    low, high = np.full(replicas, -30.0), np.full(replicas, 60.0)  # logarithms of t
    for _ in range(45):
        middle = (low + high) / 2
        cached = np.bincount(replica, -np.expm1(-rate * np.exp(middle)[replica]), replicas)
        low, high = np.where(cached < room, middle, low), np.where(cached < room, high, middle)
    hits = np.where(few[replica], 1.0, -np.expm1(-rate * np.exp(low)[replica]))
    return float((rate * hits).sum() / rate.sum())


def by_chance(shares: Floats, room: int) -> float:
    """The hit rate if any replica gets any request: each cache sees the same mixture."""
    return hit_rate(Streams(np.zeros(len(shares), np.int64), shares), 1, room)


def routing(replicas: int, tasks: int, room: int, dice: np.random.Generator) -> list[dict[str, Any]]:
    """Hit rate and load by routing."""
    shares = popularity(tasks)
    rows = [{"routing": "by chance", "hits": by_chance(shares, room), "busiest": 1.0}]
    for name, route in (("by task", by_task), ("by task, with overflow", with_overflow)):
        streams = route(shares, replicas, dice)
        busiest = np.bincount(streams.replica, streams.rate, replicas).max() * replicas
        rows.append({"routing": name, "hits": hit_rate(streams, replicas, room), "busiest": float(busiest)})
    return rows


def store_traffic(
    replicas: int, changes: float, sync_seconds: float, lost: float, seconds: float, dice: np.random.Generator
) -> dict[str, float]:
    """Requests to the store per second, and how long replicas serve what a change has replaced.

    A look costs one request, and one more for each event that it finds. Each replica reads a version that goes live.
    """
    at = np.sort(dice.uniform(0, seconds, dice.poisson(changes * seconds)))
    looks = dice.uniform(0, sync_seconds, replicas)
    next_look = (looks - at[:, None]) % sync_seconds
    announced = ANNOUNCE_SECONDS * np.exp(0.5 * dice.standard_normal((len(at), replicas)))
    announced[dice.random(announced.shape) < lost] = np.inf
    age = np.minimum(next_look, announced)
    reads = replicas * seconds / sync_seconds + np.isfinite(announced).sum() + 2 * age.size
    return {
        "changes_per_second": changes,
        "store_requests_per_second": float(reads / seconds),
        "formula": replicas / sync_seconds + changes * replicas * (3 - lost),
        "age_p50_ms": 1000 * float(np.median(age)),
        "age_p99_ms": 1000 * float(np.percentile(age, 99)),
        "age_max_ms": 1000 * float(age.max()),
    }


def short_run(
    shares: Floats, replicas: int, room: int, is_by_task: bool, rate: int, dice: np.random.Generator
) -> float:
    """The hit rate of real LRU caches in as few requests as the measured run had: a second of them before, then five.

    Each cache begins with the tasks that were published last, which are the least popular ones.
    """
    tasks = dice.choice(len(shares), 6 * rate, p=shares)
    homes = dice.integers(0, replicas, len(shares))
    places = homes[tasks] if is_by_task else dice.integers(0, replicas, len(tasks))
    caches = [dict.fromkeys(range(len(shares) - room, len(shares))) for _ in range(replicas)]
    hits = 0
    for number, (task, place) in enumerate(zip(tasks.tolist(), places.tolist(), strict=True)):
        cache = caches[place]
        hits += task in cache and number >= rate
        cache.pop(task, None)
        cache[task] = None
        if len(cache) > room:
            del cache[next(iter(cache))]
    return hits / (5 * rate)


def validation(dice: np.random.Generator) -> list[dict[str, Any]]:
    """Hit rates in the long run, and in a run as short as the measured one; means of many placements of 64 tasks."""
    shares, rows = popularity(64), list[dict[str, Any]]()
    for replicas, name, rate, measured in MEASURED:
        if name == "by chance":
            simulated = [by_chance(shares, 16)]
        else:
            simulated = [hit_rate(by_task(shares, replicas, dice), replicas, 16) for _ in range(300)]
        short = [short_run(shares, replicas, 16, name == "by task", rate, dice) for _ in range(300)]
        low, high = map(float, np.percentile(short, [5, 95]))
        about = {"replicas": replicas, "routing": name, "measured": measured, "long run": float(np.mean(simulated))}
        rows.append({**about, "short run": float(np.mean(short)), "5 %": low, "95 %": high})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    print("".join(f"{name:>26}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:>26}" if isinstance(value, str) else f"{value:>26,.3f}" for value in row.values()))


def main() -> None:
    """Parse the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--room", type=int, default=500, help="prefixes that a replica's cache holds")
    parser.add_argument("--sync-seconds", type=float, default=2.0)
    parser.add_argument("--lost", type=float, default=0.01, help="share of announcements that are lost")
    parser.add_argument("--validate", action="store_true", help="only the comparison with what was measured")
    options = parser.parse_args()
    began, dice = time.perf_counter(), np.random.default_rng(1)
    found: dict[str, Any] = {"validation": validation(dice)}
    if not options.validate:
        found["routing"] = routing(options.replicas, options.tasks, options.room, dice)
        found["store"] = [
            store_traffic(options.replicas, changes, options.sync_seconds, options.lost, 60.0, dice)
            for changes in (0.1, 1.0, 10.0)
        ]
    for rows in found.values():
        show(rows)
        print()
    print(json.dumps({"replicas": options.replicas, "tasks": options.tasks, **found, "s": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
