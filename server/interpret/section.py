"""The part of a card that says what a soft prompt means: verdict, label test, ladder, leave one out, as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Sequence

from server.interpret.results import CausalInterpretation, Interpretation, Interval, Lens, Necessity, Sufficiency
from server.interpret.verdict import written_p

PICTURES = {
    "lens": "Labels through the value-change lens, layer by layer",
    "sufficiency": "What keeps the effect",
    "necessity": "Leave one out",
}

Row = tuple[str, ...]

NONE = "–"
WIDTH = 120
"""Columns of a line of prose."""


def card_section(static: Interpretation, causal: CausalInterpretation | None, pictures: Collection[str]) -> str:
    """Markdown of an interpretation, and of experiments if any were run.

    `pictures` are the names of the SVG files beside the card, without `.svg`; others are not shown.
    """
    parts = ["## What it means", static.verdict, *_labels(static, pictures)]
    if causal is not None:
        parts += [causal.verdict, *_experiments(causal, pictures)]
    if static.start_is_known:
        parts.append(" ".join(["The start is what the virtual tokens were before training.", *static.notes]))
    return "\n\n".join(part if part.startswith(("|", "!")) else textwrap.fill(part, WIDTH) for part in parts)


def _labels(static: Interpretation, pictures: Collection[str]) -> Iterable[str]:
    if static.lens is not None and (rows := label_rows(static.lens)):
        yield _table(("value-change lens", "mean z", "tokens of like frequency and shape", "p"), rows)
        yield from _picture("lens", pictures)


def _experiments(causal: CausalInterpretation, pictures: Collection[str]) -> Iterable[str]:
    yield f"On {causal.rows:,} rows of `{causal.data}`: {causal.metric}, with 95 % intervals."
    if causal.sufficiency is not None:
        titles = ("soft prompt", causal.metric, "share of the gain that it keeps")
        yield _table(titles, ladder_rows(causal.sufficiency))
        yield from _picture("sufficiency", pictures)
    if causal.necessity is not None:
        head = (f"virtual token, replaced by {causal.necessity.replaced_by}", "loss", "p", "effect")
        yield _table(head, removal_rows(causal.necessity))
        yield from _picture("necessity", pictures)


def label_rows(lens: Lens) -> list[Row]:
    """The tests of the labels as rows: name, mean z, the same of tokens of like frequency, p; empty without labels."""
    tests = {
        "labels": lens.labels,
        "labels, all layers": lens.all_layers,
        "labels in a form that is not answered": lens.control_form,
        "control: the start alone": lens.control_start,
    }
    return [
        (name, f"{test.z:.2f}", f"{test.null.mean:.2f} ± {test.null.sd:.2f}", written_p(test.p))
        for name, test in tests.items()
        if test is not None
    ]


def ladder_rows(found: Sufficiency) -> list[Row]:
    """The soft prompt, the frozen model and all variants as rows: name, quality, ratio."""
    ends = [
        (name, written_interval(quality), NONE) for name, quality in (("learned", found.learned), ("none", found.none))
    ]
    steps = [
        (one.name, written_interval(one.quality), written_interval(one.ratio) if one.ratio else NONE)
        for one in found.steps
    ]
    return [*ends, *steps]


def removal_rows(found: Necessity) -> list[Row]:
    """The virtual tokens as rows: number, loss without it, p, effect."""
    return [(str(one.token), written_interval(one.loss), written_p(one.p), one.effect) for one in found.tokens]


def _picture(name: str, pictures: Collection[str]) -> Iterable[str]:
    if name in pictures:
        yield f"![{PICTURES[name]}]({name}.svg)"


def written_interval(of: Interval) -> str:
    """A figure with its interval."""
    return f"{of.value:.3f} ({of.low:.3f} to {of.high:.3f})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
