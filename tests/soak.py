"""Storms, kills and fuzzing in two sizes: short in every run of the tests, full under `--soak`, with a progress bar.

A test that takes the fixture `soak` and is marked `soak` asks it how much to do and where to take its dice from:

    @pytest.mark.soak
    def test_nothing_is_lost(soak: Soak) -> None:
        for i in soak.rounds(short=20, full=5000, desc="kills"):
            point = soak.random.randrange(100)

The seed is fixed in the short form, so that a run of the tests repeats itself. In full it is drawn, told in the
header and beside each failure, and `--soak-seed` sets it again.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO

import pytest
from tqdm import tqdm

SHORT_SEED = 20_261_124


@dataclass
class Soak:
    """How much a test does, and its dice.

    Attributes:
        full: whether this is `--soak`.
        seed: of the run.
        name: of the test; its dice do not depend on which others run.
        screen: where the bar goes; nothing of it may be caught by pytest.
    """

    full: bool
    seed: int
    name: str
    screen: TextIO
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.seed} {self.name}")

    def count(self, short: int, full: int) -> int:
        """A number for this size."""
        return full if self.full else short

    def only_in_full(self) -> None:
        """Skip the rest without `--soak`: a short form would show nothing, or another test shows the same in less."""
        if not self.full:
            pytest.skip("takes a minute or more; --soak runs it")

    def rounds(self, short: int, full: int, desc: str) -> Iterator[int]:
        """So many rounds, numbered from 0, behind a bar if they are many."""
        count = self.count(short, full)
        if not self.full:
            yield from range(count)
            return
        interval = 0.5 if self.screen.isatty() else 30.0  # a log needs no more than signs of life
        self.screen.write("\n")  # pytest's own line is not finished
        yield from tqdm(range(count), desc, file=self.screen, mininterval=interval, dynamic_ncols=True)

    def until(self, short: float, full: float, desc: str) -> Iterator[int]:
        """Rounds, numbered from 0, that begin within so many seconds; at least one."""
        seconds = full if self.full else short
        bar = tqdm(
            desc=desc,
            total=round(seconds),
            unit="s",
            file=self.screen,
            mininterval=0.5 if self.screen.isatty() else 30.0,
            disable=not self.full,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} s{postfix}",
        )
        start = time.monotonic()
        number, passed = 0, 0.0
        with bar:
            while number == 0 or passed < seconds:
                yield number
                number += 1
                now = time.monotonic() - start
                bar.set_postfix(rounds=number, refresh=False)
                bar.update(min(now, seconds) - min(passed, seconds))
                passed = now


def add_options(parser: pytest.Parser) -> None:
    """`--soak` and `--soak-seed`."""
    group = parser.getgroup("soak")
    group.addoption("--soak", action="store_true", help="storms, kills and fuzzing in full; with -m soak, only these")
    group.addoption("--soak-seed", type=int, help="dice of the storms (fixed without --soak, else drawn)")


def configure(config: pytest.Config) -> None:
    """Choose the seed."""
    config.addinivalue_line("markers", "soak: has a short and a full size; --soak runs it in full")
    if config.option.soak_seed is None:
        config.option.soak_seed = secrets.randbelow(2**32) if config.option.soak else SHORT_SEED


def lift_timeouts(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In full, a soak test may take as long as it takes."""
    for item in items:
        if config.option.soak and item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(0), append=False)
