"""The summary of a run: as text, and as a table for RESULTS.md."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu.driver import Result


def in_words(results: Sequence[Result]) -> str:
    """A text with the successful stages, the problems of other stages, and the missed bars."""
    well = [result for result in results if result.status == "ok"]
    lines = [f"{len(well)} of {len(results)} stages went well."]
    for result in results:
        if result.status != "ok":
            lines.append(f"- {result.stage}: {result.status}: {result.reason}")
        lines += [f"- {result.stage}: left out: {part}" for part in result.skipped]
        lines += [
            f"- {result.stage}: {bar['figure']} is {bar['value']:g}, the bar is {bar['at_least']:g}"
            for bar in result.bars
            if bar["value"] < bar["at_least"]
        ]
    return "\n".join(lines)


def as_table(results: Sequence[Result], command: str) -> str:
    """A section of RESULTS.md: all figures by stage, with their bars."""
    machine = next((result.figures for result in results if result.stage == "machine"), {})
    title = f"## {time.strftime('%Y-%m-%d')}: {machine.get('device', 'a machine without CUDA')}"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "driver") if name in machine)
    lines = [title, "", f"`{command}`; {versions or 'versions unknown'}.", ""]
    lines += ["| stage | figure | measured | bar |", "|---|---|---|---|"]
    for result in results:
        bars = {bar["figure"]: bar["at_least"] for bar in result.bars}
        status = result.status if result.went_well else f"**{result.status}**"
        lines.append(f"| {result.stage} | | {status}, {result.seconds:g} s | |")
        for name, value in _flat(result.figures):
            bar = f" ≥ {bars[name]:g}" if name in bars else ""
            lines.append(f"| | {name.replace('_', ' ')} | {_shown(value)} |{bar} |")
    return "\n".join(lines)


def _flat(figures: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name} ")
        else:
            yield before + name, value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
    return str(value).replace("|", "\\|").replace("\n", " ")[:200]
