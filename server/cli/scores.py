"""Prints the result of `prelude eval`: one line for each system, with intervals, and the differences."""

from rich.console import Console
from rich.table import Table

from server.cli.tables import columns, plain
from server.evaluation.report import Report, written_difference, written_estimate
from server.evaluation.systems import TEACHER

MOST_LABELS = 32
COLOURS = {"better": "green", "worse": "red"}


def print_report(report: Report, out: Console) -> None:
    """Print the whole result."""
    about = report.about
    out.print(plain(f"{about.name} on {about.rows:,} rows of {about.data}, {about.model} in {about.dtype}"))
    if report.warning:
        out.print(plain(report.warning, "yellow"))
    out.print(plain("Below each figure: its 95 % interval, by bootstrap over the rows.", "dim"))
    out.print()
    out.print(_scores(report))
    if report.by_label and len(report.by_label) <= MOST_LABELS:
        out.print()
        out.print(_labels(report))
    if report.differences:
        out.print()
    for other in report.differences:
        out.print(plain(report.sentence(other), COLOURS.get(report.verdict(other), "")))
        for metric, difference in report.differences[other].items():
            if metric != report.main and "@" in other:
                verdict = report.verdict(other, metric)
                out.print(plain(f"  {metric.title}: {verdict}, {written_difference(metric, difference)}", "dim"))
    if TEACHER in report.agreement:
        out.print(plain(report.agreement_sentence(TEACHER)))


def _scores(report: Report) -> Table:
    table = _columns("", *(metric.title for metric in report.metrics), "rows/s")
    for name, score in report.scores.items():
        cells, intervals = zip(
            *(written_estimate(metric, score.figures[metric]) for metric in report.metrics), strict=True
        )
        speed = f"{report.about.rows / score.seconds:.1f}" if score.seconds else ""
        table.add_row(plain(name, "bold"), *map(plain, cells), plain(speed))
        table.add_row("", *(plain(interval, "dim") for interval in intervals), "")
    return table


def _labels(report: Report) -> Table:
    table = _columns("label", "right", "rows")
    for label, (right, rows) in report.by_label.items():
        table.add_row(plain(label), plain(str(right)), plain(str(rows)))
    return table


def _columns(*titles: str) -> Table:
    return columns(*titles, right=titles[1:], header="bold")
