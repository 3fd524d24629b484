"""Prints tables for people (in a pipe: complete and without colours) and JSON for programs.

Text from a server or a file is shown literally: its brackets and control characters have no effect.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.cli.bars import in_words, standing
from server.cli.errors import printable
from server.cli.files import CONFIG_FILE, MANIFEST_FILE, TENSOR_FILE

if TYPE_CHECKING:  # each command loads only what it prints
    from server.cli.diff import Comparison, FieldChange, TensorChange
    from server.client import Job, PromptEntry, VersionList
    from server.keys.key import ApiKey

UNLIMITED = 1_000_000
"""Width of a table in a pipe, whose readers need complete lines."""
NONE = "–"
DIFFERENCE = "max |a-b|"

_STATE_COLORS = {"running": "yellow", "succeeded": "green", "failed": "red"}

_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")


def console(stream: TextIO | None = None) -> Console:
    """The console for stdout, or a stream, as wide as the terminal; elsewhere nothing is truncated or coloured."""
    stream = stream or sys.stdout
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=stream, width=UNLIMITED, force_terminal=False, color_system=None, highlight=False)


def print_json(document: Any) -> None:
    """Print a JSON document."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def print_tasks(entries: Sequence[PromptEntry], out: Console) -> None:
    """Print all tasks: the live version, its type, and errors."""
    if not entries:
        out.print("No tasks yet: publish one with `prelude prompts push`.")
        return
    table = columns(
        "task", "live", "type", "tokens", "description", right={"tokens"}, wrap={"task", "live", "description"}
    )
    for entry in entries:
        description = plain(entry.get("description", ""))
        if "error" in entry:
            description = plain(f"error: {entry['error']}", "red")
        elif "version" not in entry:
            description = plain("no version is live", "yellow")
        table.add_row(
            plain(entry["task"], "bold"),
            plain(shares(entry.get("traffic")) or entry.get("version", NONE)),
            plain(entry.get("peft_type", NONE).lower()),
            plain(entry.get("num_virtual_tokens", NONE)),
            description,
        )
    _print(table, out)


def print_versions(listed: VersionList, out: Console) -> None:
    """Print a task's versions, newest first, and the ETag for --if-match."""
    table = columns(
        "version", "live", "when", "who", "size", "metrics", right={"version", "size"}, wrap={"who", "metrics"}
    )
    traffic = listed.get("traffic", {})
    for version in listed["versions"]:
        share = traffic.get(str(version["version"]))
        marker = f"{share} %" if share is not None else "live" if version["live"] else ""
        table.add_row(
            plain(version["version"], "bold green" if version["live"] else "bold"),
            plain(marker, "green"),
            plain(_ago(version["created_at"])),
            plain(version.get("by") or version["source"]),
            plain(_size(version["bytes"])),
            plain(_metrics(version.get("metrics", {}))),
        )
    _print(table, out)
    if "etag" in listed and out.is_terminal:  # a pipe gets only the table; --json also has the state
        out.print(plain(f"state {listed['etag']}, for --if-match", "dim"))


def _metrics(metrics: Mapping[str, object]) -> str:
    """Format the figures among the metrics on one line; intervals and hashes are left out."""
    return ", ".join(f"{name} {_metric(value)}" for name, value in metrics.items() if isinstance(value, int | float))


def print_jobs(jobs: Sequence[Job], out: Console) -> None:
    """Print training jobs, newest first, with progress or result."""
    if not jobs:
        out.print("No training jobs yet: send one with `prelude train --url`.")
        return
    table = columns("job", "task", "state", "step", "when", "result", right={"step"}, wrap={"task", "result"})
    for job in jobs:
        table.add_row(
            plain(job["id"], "bold"),
            plain(job["task"]),
            plain(standing(job), _STATE_COLORS.get(job["state"], "")),
            plain(f"{job['step']:,} of {job['steps']:,}"),
            plain(_ago(job["created_at"])),
            plain(_result(job)),
        )
    _print(table, out)


def _result(job: Job) -> str:
    """The result of a job, or the newest measurement of a running job."""
    if "error" in job:
        return job["error"]["error"]
    score = job.get("validation")
    found = "" if score is None else in_words(score["exact_match"], score["loss"])
    if "version" not in job:
        return found
    return f"version {job['version']}, {'live' if job['live'] else 'staged'}; {_metrics(job.get('metrics', {}))}"


def print_keys(keys: Sequence[ApiKey], out: Console) -> None:
    """Print API keys, without their hashes."""
    table = columns("id", "name", "scopes", "tasks", "since", wrap={"name", "scopes", "tasks"})
    for key in keys:
        table.add_row(
            plain(key.id, "bold"),
            plain(key.name),
            plain(", ".join(key.scopes)),
            plain("all" if key.tasks is None else ", ".join(key.tasks)),
            plain(f"{key.created_at:%Y-%m-%d}"),
        )
    _print(table, out)


def live_sentence(listed: VersionList) -> str:
    """The live version or canary, as one line."""
    traffic = listed.get("traffic", {})
    if len(traffic) > 1:
        return f"{listed['task']}: versions {shares(traffic)} are live"
    if listed.get("live") is None:
        return f"{listed['task']}: no version is live"
    return f"{listed['task']}: version {listed['live']} is live"


def shares(traffic: Mapping[str, int] | None) -> str:
    """Format weights: 3 (90 %), 4 (10 %)."""
    weights = sorted((traffic or {}).items(), key=lambda item: int(item[0]))
    return ", ".join(f"{version} ({weight} %)" for version, weight in weights)


def print_comparison(comparison: Comparison, out: Console) -> None:
    """Print the fields that differ, side by side, and all tensors."""
    fields = {MANIFEST_FILE: comparison.manifest, CONFIG_FILE: comparison.config}
    tables = [_fields_table(title, comparison, changes) for title, changes in fields.items() if changes]
    tables.append(_tensors_table(comparison))
    tables += [_rows_table(tensor) for tensor in comparison.tensors if tensor.rows]
    for index, table in enumerate(tables):
        if index:
            out.print()
        _print(table, out)
    if comparison.identical:
        out.print(plain(f"{comparison.a} and {comparison.b} are identical.", "green"))


def _fields_table(title: str, comparison: Comparison, changes: Iterable[FieldChange]) -> Table:
    sides = (comparison.a, comparison.b)
    table = columns(title, *sides, wrap={title, *sides})
    for change in changes:
        table.add_row(plain(change.name, "bold"), _value(change.a), _value(change.b))
    return table


def _tensors_table(comparison: Comparison) -> Table:
    sides = (comparison.a, comparison.b)
    table = columns(TENSOR_FILE, *sides, "identical", DIFFERENCE, right={DIFFERENCE}, wrap={TENSOR_FILE, *sides})
    for tensor in comparison.tensors:
        table.add_row(
            plain(tensor.name, "bold"),
            _kind(tensor.dtype_a, tensor.shape_a),
            _kind(tensor.dtype_b, tensor.shape_b),
            plain("yes", "green") if tensor.identical else plain("no", "red"),
            _number("0" if tensor.identical else tensor.max_difference),
        )
    return table


def _rows_table(tensor: TensorChange) -> Table:
    titles = ("virtual token", "cosine", "norm a", "norm b", DIFFERENCE)
    table = columns(*titles, right=titles)
    for row in tensor.rows:
        table.add_row(
            plain(row.row, "bold"),
            _number(None if row.cosine is None else f"{row.cosine:.4f}"),
            *(_number(value) for value in (row.norm_a, row.norm_b, row.max_difference)),
        )
    return table


def columns(*titles: str, right: Collection[str] = (), wrap: Collection[str] = (), header: str = "dim") -> Table:
    """A table without lines, which cut and awk can parse; on a narrow terminal only the columns in `wrap` shrink."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=header)
    for title in titles:
        justify: Literal["right", "left"] = "right" if title in right else "left"
        table.add_column(plain(title), justify=justify, no_wrap=title not in wrap, overflow="fold")
    return table


def _print(table: Table, out: Console) -> None:
    """Print a table without rich's trailing spaces."""
    with out.capture() as capture:
        out.print(table)
    out.file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def plain(value: object, style: str = "") -> Text:
    """Text without markup or control characters."""
    return Text(printable(str(value)), style=style)


def _value(value: Any) -> Text:
    """A value as JSON, so that line ends are visible, but without quotes and with shortened hashes."""
    if value is None:
        return plain(NONE, "dim")
    written = json.dumps(value, ensure_ascii=False)
    return plain(_HASH.sub(r"\1…", written[1:-1] if isinstance(value, str) else written))


def _kind(dtype: str | None, shape: Sequence[int] | None) -> Text:
    return plain(NONE, "dim") if dtype is None or shape is None else plain(f"{dtype} {list(shape)}")


def _number(value: float | str | None) -> Text:
    if value is None:
        return plain(NONE, "dim")
    return plain(value if isinstance(value, str) else f"{value:.4g}")


def _metric(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ago(when: str) -> str:
    """The age of a time in its largest unit; an unreadable time is shown unchanged."""
    try:
        moment = datetime.fromisoformat(when)
    except ValueError:
        return when
    seconds = (datetime.now(UTC) - (moment if moment.tzinfo else moment.replace(tzinfo=UTC))).total_seconds()
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // length)
        if count >= 1:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
