"""Prints interpretations: the verdict first, then a table for each measure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console

from server.cli.tables import columns, plain
from server.interpret.pruning import Pruning, pruning_verdict
from server.interpret.results import (
    CausalInterpretation,
    Geometry,
    Interpretation,
    Lens,
    Nearest,
    Neighbour,
    Similarity,
)
from server.interpret.section import NONE, label_rows, ladder_rows, removal_rows, written_interval
from server.interpret.verdict import written_p


def print_static(found: Interpretation, out: Console) -> None:
    """Print what can be said without data."""
    out.print(plain(found.verdict, "bold"))
    kind = found.peft_type.lower().replace("_", " ")
    out.print(plain(f"{found.task}: {found.num_virtual_tokens} virtual tokens ({kind}) for {found.model}", "dim"))
    out.print(plain(f"Start: {found.start}.", "dim"))
    if found.nearest is not None:
        _print_nearest(found.nearest, out)
    if found.lens is not None:
        _print_lens(found.lens, out)
    if found.geometry is not None:
        _print_geometry(found.geometry, out)
    for note in found.notes:
        out.print(plain(note, "dim"))


def print_causal(found: CausalInterpretation, out: Console) -> None:
    """Print what experiments show."""
    out.print()
    out.print(plain(found.verdict, "bold"))
    out.print(plain(f"{found.metric} on {found.rows:,} rows of {found.data}; in brackets: 95 % intervals", "dim"))
    if found.sufficiency is not None:
        _print(("soft prompt", found.metric, "R, share of the gain"), ladder_rows(found.sufficiency), out)
    if found.necessity is not None:
        titles = (f"replaced by {found.necessity.replaced_by}", "loss", "p, adjusted", "effect")
        _print(titles, removal_rows(found.necessity), out)


def print_pruning(name: str, found: Pruning, data: str, out: Console) -> None:
    """Print which virtual tokens remain, and what the others were worth."""
    out.print(plain(pruning_verdict(found), "bold"))
    rows = f"{found.choosing_rows:,} rows chose, {found.judging_rows:,} other rows judged; {data}"
    out.print(plain(f"{name}: {len(found.kept)} of {found.num_virtual_tokens} virtual tokens remain; {rows}", "dim"))
    tried = {step.token: step for step in found.steps}
    cells = [
        (
            str(one.token),
            written_interval(one.loss),
            one.effect,
            f"{tried[one.token].loss:.3f}" if one.token in tried else NONE,
            "removed" if one.token in found.removed else "",
        )
        for one in found.alone.tokens
    ]
    _print(("virtual token", "loss without it alone", "effect", "with all removed so far", ""), cells, out)
    if found.whole is not None and found.shortened is not None and found.loss is not None:
        judged = [("whole", found.whole), ("shortened", found.shortened), ("loss", found.loss)]
        _print(("on the judging rows", "quality"), [(kind, written_interval(of)) for kind, of in judged], out)


def print_similarity(found: Similarity, out: Console) -> None:
    """Print how alike tasks are."""
    cells = [
        (
            f"{pair.one} – {pair.other}",
            _number(pair.change),
            written_p(pair.p_change) if pair.p_change is not None else NONE,
            _number(pair.function),
            _number(pair.raw),
            "shared" if pair.shares_start else "",
        )
        for pair in found.pairs
    ]
    _print(("tasks", "by change", "p", "by function", "raw values", "start"), cells, out)
    for task, value in zip(found.tasks, found.reliability, strict=False):
        out.print(plain(f"{task}: two halves of the probes agree by {value:.2f}", "dim"))
    for note in found.notes:
        out.print(plain(note, "dim"))


def _print_nearest(found: Nearest, out: Console) -> None:
    cells = [
        (
            str(index),
            _tokens(token.learned),
            f"{_tokens(token.start)}{' =' if token.is_nearest_to_start else ''}",
            _tokens(token.change),
            NONE if token.p_change_adjusted is None else written_p(token.p_change_adjusted),
            {True: "word-like and learned", False: ""}.get(bool(token.is_word_like), ""),
        )
        for index, token in enumerate(found.tokens)
    ]
    titles = ("", "nearest to the value", "to the start (= the same)", "to the change", "p, adjusted", "")
    _print(titles, cells, out)
    out.print(
        plain(
            f"Cosine to the nearest token: random directions {found.random_cosine.mean:.3f} "
            f"(99 %: {found.random_cosine.top:.3f}), real tokens {found.row_cosine.mean:.3f}. Coherence of the "
            f"{found.neighbours} nearest: {found.random_coherence.mean:.3f} and {found.row_coherence.mean:.3f}.",
            "dim",
        )
    )


def _print_lens(found: Lens, out: Console) -> None:
    layers = f"layers {found.first_layer} to {found.num_layers - 1}"
    cells = [(repr(token.text), f"{token.z:.1f}", written_p(token.p)) for token in found.tokens]
    _print((f"raised through {layers}", "z", "p"), cells or [("none", NONE, NONE)], out)
    if rows := label_rows(found):
        _print(("label test", "mean z", "tokens of like frequency and shape", "p"), rows, out)


def _print_geometry(found: Geometry, out: Console) -> None:
    ranks = f"Effective rank {found.effective_rank:.1f}"
    if found.effective_rank_of_change is not None:
        ranks += f", of the change {found.effective_rank_of_change:.1f}"
    out.print()
    out.print(plain(f"{ranks}."))
    if found.tokens:
        rows = [
            (
                str(i),
                f"{one.norm:.2f}",
                f"{one.norm_percentile:.0f}",
                _number(one.cosine_to_start),
                _number(one.relative_change),
            )
            for i, one in enumerate(found.tokens)
        ]
        _print(("", "norm", "percentile", "cosine to start", "relative change"), rows, out)
        return
    rows = [
        (
            str(one.layer),
            _number(one.key_cosine_to_start),
            _number(one.key_relative_change),
            _number(one.value_cosine_to_start),
            _number(one.value_relative_change),
        )
        for one in found.layers
    ]
    titles = ("layer", "keys: cosine to start", "relative change", "values: cosine to start", "relative change")
    _print(titles, rows, out)


def _tokens(neighbours: Iterable[Neighbour]) -> str:
    return "  ".join(f"{one.text!r} {one.cosine:.2f}" for one in list(neighbours)[:3]) or NONE


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _print(titles: Sequence[str], rows: Iterable[Sequence[str]], out: Console) -> None:
    table = columns(*titles, wrap=titles, header="bold")
    for row in rows:
        table.add_row(*map(plain, row))
    out.print()
    out.print(table)
