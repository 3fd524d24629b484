"""Prints the result of `prelude eval`: one line for each system, with intervals, and the differences."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.cli.errors import printable
from server.evaluation.report import Report, written_difference, written_estimate
from server.evaluation.systems import TEACHER

MOST_LABELS = 32
COLOURS = {"better": "green", "worse": "red"}


def print_report(report: Report, out: Console) -> None:
    """Print the whole result."""
    about = report.about
    out.print(_text(f"{about.name} on {about.rows:,} rows of {about.data}, {about.model} in {about.dtype}"))
    if report.warning:
        out.print(_text(report.warning, "yellow"))
    out.print(_text("Below each figure: its 95 % interval, by bootstrap over the rows.", "dim"))
    out.print()
    out.print(_scores(report))
    if report.by_label and len(report.by_label) <= MOST_LABELS:
        out.print()
        out.print(_labels(report))
    if report.differences:
        out.print()
    for other in report.differences:
        out.print(_text(report.sentence(other), COLOURS.get(report.verdict(other), "")))
        for metric, difference in report.differences[other].items():
            if metric != report.main and "@" in other:
                verdict = report.verdict(other, metric)
                out.print(_text(f"  {metric.title}: {verdict}, {written_difference(metric, difference)}", "dim"))
    if TEACHER in report.agreement:
        out.print(_text(report.agreement_sentence(TEACHER)))


def _scores(report: Report) -> Table:
    table = _table("", *(metric.title for metric in report.metrics), "rows/s")
    for name, score in report.scores.items():
        cells, intervals = zip(
            *(written_estimate(metric, score.figures[metric]) for metric in report.metrics), strict=True
        )
        speed = f"{report.about.rows / score.seconds:.1f}" if score.seconds else ""
        table.add_row(_text(name, "bold"), *map(_text, cells), _text(speed))
        table.add_row("", *(_text(interval, "dim") for interval in intervals), "")
    return table


def _labels(report: Report) -> Table:
    table = _table("label", "right", "rows")
    for label, (right, rows) in report.by_label.items():
        table.add_row(_text(label), _text(str(right)), _text(str(rows)))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(_text(first), no_wrap=True)
    for title in others:
        table.add_column(_text(title), justify="right", no_wrap=True)
    return table


def _text(text: str, style: str = "") -> Text:
    """Text without markup or control characters, which labels may contain."""
    return Text(printable(text), style=style)
