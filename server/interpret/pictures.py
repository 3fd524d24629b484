"""Pictures of an interpretation as SVG: blue for what raises or is kept, orange for the opposite and for starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from server.interpret.canvas import BLUE, GREY, ORANGE, canvas, legend_below, signed
from server.interpret.pictures_of_tokens import movement_map, token_table
from server.interpret.results import (
    CausalInterpretation,
    Geometry,
    Interpretation,
    Lens,
    Necessity,
    Similarity,
    Sufficiency,
)

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.figure import Figure


EFFECTS = {
    "needed": {"color": BLUE, "marker": "o"},
    "harmful": {"color": ORANGE, "marker": "^"},
    "none shown": {"color": "0.5", "marker": "o", "markerfacecolor": "white"},
}
"""How a removal is drawn, by its effect."""
DARK = 0.85
"""Cosines above it have a blue on which only white is readable."""


def draw(
    folder: Path,
    *,
    static: Interpretation | None = None,
    causal: CausalInterpretation | None = None,
    similarity: Similarity | None = None,
) -> list[Path]:
    """Write the pictures of what was measured into a folder; returns their paths.

    Raises:
        ConfigurationError: matplotlib is not installed.
        OSError: a picture cannot be written.
    """
    drawn: dict[str, Figure] = {}
    if static is not None and static.nearest is not None:
        drawn["tokens"] = token_table(static.nearest)
    if static is not None and static.vocabulary_map is not None:
        drawn["map"] = movement_map(static.vocabulary_map)
    if static is not None and static.lens is not None and static.lens.curve:
        drawn["lens"] = lens_curve(static.lens)
    if static is not None and static.geometry is not None and static.geometry.value_change:
        drawn["change"] = change_map(static.geometry)
    if causal is not None and causal.sufficiency is not None:
        drawn["sufficiency"] = ladder(causal.sufficiency)
    if causal is not None and causal.necessity is not None:
        drawn["necessity"] = removals(causal.necessity)
    if similarity is not None:
        drawn["similarity"] = matrix(similarity)
    paths = []
    for name, figure in drawn.items():
        paths.append(folder / f"{name}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def lens_curve(found: Lens) -> Figure:
    """The labels' mean z through each layer, with the band of tokens of like frequency and shape."""
    figure, [axes] = canvas(6.4, 3.6)
    layers = [one.layer for one in found.curve]
    low, high = [one.low for one in found.curve], [one.high for one in found.curve]
    axes.fill_between(layers, low, high, color=GREY, alpha=0.6, label="tokens of like frequency and shape", linewidth=0)
    axes.plot(layers, [one.z for one in found.curve], color=BLUE, marker="o", markersize=3, label="labels")
    axes.axvline(found.first_layer - 0.5, color=ORANGE, linestyle=":", label="the lens sums the layers from here")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="layer", ylabel="mean z over the vocabulary", title="Value-change lens: labels, layer by layer")
    legend_below(figure)
    return figure


def change_map(found: Geometry) -> Figure:
    """‖Δv‖/‖v⁰‖ of each layer and virtual token."""
    figure, [axes] = canvas(6.4, 4.2)
    image = axes.imshow(found.value_change, aspect="auto", cmap="Blues", origin="lower")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="virtual token", ylabel="layer", title="How far the values moved, ‖Δv‖ / ‖v⁰‖")
    figure.colorbar(image, ax=axes)
    return figure


def ladder(found: Sufficiency) -> Figure:
    """R of each variant with its interval; the quality itself where R is undefined."""
    steps = found.steps[::-1]
    has_ratio = all(step.ratio is not None for step in steps)
    values = [(step.ratio if has_ratio else None) or step.quality for step in steps]
    figure, [axes] = canvas(6.4, 1.2 + 0.28 * len(steps))
    for row, (step, of) in enumerate(zip(steps, values, strict=True)):
        colour = ORANGE if step.name in ("start", "random tokens") else BLUE
        axes.plot([of.low, of.high], [row, row], color=colour, linewidth=2)
        axes.plot([of.value], [row], color=colour, marker="o")
    ends = (0.0, 1.0) if has_ratio else (found.none.value, found.learned.value)
    for end in ends:
        axes.axvline(end, color=GREY, linestyle="--", zorder=0)
    above = axes.secondary_xaxis("top")  # outside of the frame, where nothing crosses the names
    above.set_xticks(ends, ["none", "learned"], fontsize="small")
    above.tick_params(length=0)
    axes.set_yticks(range(len(steps)), [step.name for step in steps])
    axes.set_ylim(-0.6, len(steps) - 0.4)
    axes.locator_params(axis="x", nbins=6)
    axes.set(xlabel="R, share of the gain that is kept" if has_ratio else "quality")
    return figure


def removals(found: Necessity) -> Figure:
    """The loss by each removal with its interval; marks say in colour and shape what is shown."""
    figure, [axes] = canvas(6.4, 3.6)
    for effect, style in EFFECTS.items():
        some = [one for one in found.tokens if one.effect == effect]
        if not some:
            continue
        places = [one.token for one in some]
        axes.vlines(
            places, [one.loss.low for one in some], [one.loss.high for one in some], style["color"], linewidth=2
        )
        axes.plot(places, [one.loss.value for one in some], linestyle="", markersize=5, label=effect, **style)
    axes.axhline(0, color=GREY, zorder=0)
    axes.set(xlabel="virtual token", ylabel="loss of quality", title=f"Leave one out (replaced by {found.replaced_by})")
    axes.set_xticks(range(0, len(found.tokens), max(1, len(found.tokens) // 10)))
    axes.margins(x=0.03)
    legend_below(figure)
    return figure


def matrix(found: Similarity) -> Figure:
    """Upper triangle: cosines of changes; lower: of functions; diagonal: split halves of the probes."""
    count = len(found.tasks)
    values: list[list[float]] = [[float("nan")] * count for _ in range(count)]
    place = {task: index for index, task in enumerate(found.tasks)}
    for index, value in enumerate(found.reliability):
        values[index][index] = value
    for pair in found.pairs:
        one, other = place[pair.one], place[pair.other]
        values[one][other] = float("nan") if pair.change is None else pair.change
        values[other][one] = float("nan") if pair.function is None else pair.function
    size = 2.2 + 0.62 * count
    figure, [axes] = canvas(size, size * 0.9)
    image = axes.imshow(values, cmap=signed(), vmin=-1, vmax=1)
    axes.set_xticks(range(count), found.tasks, rotation=40, ha="right")
    axes.set_yticks(range(count), found.tasks)
    for row in range(count):
        for column in range(count):
            value = values[row][column]
            colour = "white" if value > DARK else "black"
            text = "–" if math.isnan(value) else f"{value:z.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_title("Above: by change. Below: by function", fontsize="medium")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure
