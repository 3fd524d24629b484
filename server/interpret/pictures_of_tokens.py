"""Pictures of virtual tokens that are input embeddings: a table of nearest tokens, and a map of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from server.interpret.canvas import BLUE, GREY, ORANGE, WRITTEN_ORANGE, canvas
from server.interpret.results import Nearest, NearestOfToken, Neighbour, VocabularyMap

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.figure import Figure

SHOWN = 3
"""Tokens named in a row of the table."""
MOST_ROWS = 60
"""Rows of the table; the JSON form has all of them."""
SPACE = "\N{OPEN BOX}"
LATIN_END = "\u0250"
"""Characters before this one have a glyph in matplotlib's font."""


def token_table(found: Nearest) -> Figure:
    """For each virtual token, the nearest tokens of its value, of its start and of the change; bars are cosines."""
    rows = found.tokens[:MOST_ROWS]
    has_start = any(token.start for token in rows)
    titles = ["nearest to the learned value"]
    titles += ["nearest to its start", "nearest to what training added"] if has_start else []
    figure, axes = canvas(1.4 + 3.2 * len(titles), 1.3 + 0.3 * len(rows), columns=len(titles))
    for part, title, colour in zip(axes, titles, (BLUE, ORANGE, BLUE), strict=False):
        part.set_title(title, fontsize="medium", loc="left")
        part.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), xlabel="centred cosine")
        part.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        part.spines[["top", "right", "left"]].set_visible(False)
        column = titles.index(title)
        for row, token in enumerate(rows):
            _bar(part, row, _column(token, column), colour)
            part.plot([found.random_cosine.top] * 2, [row + 0.2, row + 0.5], color="0.2", linewidth=1.2)
            if column == 0 and token.is_nearest_to_start:
                part.annotate("= start", (0.99, row), ha="right", va="center", fontsize=7, color=WRITTEN_ORANGE)
            if column == 2 and token.is_word_like:
                part.annotate("word-like", (0.99, row), ha="right", va="center", fontsize=7, color=BLUE)
        part.set_yticks(range(len(rows)), map(str, range(len(rows))) if column == 0 else [""] * len(rows), fontsize=8)
        part.tick_params(axis="y", length=0)
    axes[0].set_ylabel("virtual token")
    figure.supxlabel(
        "upright marks: only 1 % of random directions lie closer to a token", fontsize="small", color="0.35"
    )
    return figure


def movement_map(found: VocabularyMap) -> Figure:
    """Arrows from the starts to the learned values, over a sample of the vocabulary."""
    figure, [axes] = canvas(6.4, 5.2)
    axes.scatter(*zip(*found.vocabulary, strict=True), s=5, color=GREY, linewidth=0, label="vocabulary, a sample")
    for begin, end in zip(found.start, found.learned, strict=False):
        arrow = {"arrowstyle": "-|>", "color": BLUE, "alpha": 0.5, "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", end, begin, arrowprops=arrow)
    if found.start:
        axes.scatter(*zip(*found.start, strict=True), s=22, color=ORANGE, marker="s", zorder=3, label="start")
    axes.scatter(*zip(*found.learned, strict=True), s=22, color=BLUE, zorder=3, label="learned")
    first, second = found.variance
    axes.set(xlabel=f"component 1 ({first:.1%} of the variance)", ylabel=f"component 2 ({second:.1%})")
    axes.annotate(
        f"This plane shows {first + second:.1%} of the vocabulary's variance.",
        (0.02, 0.02),
        xycoords="axes fraction",
        fontsize="small",
        color="0.35",
    )
    axes.legend(frameon=False, fontsize="small", loc="upper right")
    axes.set_title("Where virtual tokens began and where they are", fontsize="medium", loc="left")
    return figure


def written(text: str) -> str:
    """A token's text with visible spaces, in characters that the usual font has."""
    spaced = text.replace(" ", SPACE)
    return "".join(one if _has_glyph(one) else one.encode("unicode_escape").decode("ascii") for one in spaced)


def _has_glyph(character: str) -> bool:
    return character == SPACE or (character.isprintable() and character < LATIN_END)


def _column(token: NearestOfToken, column: int) -> Sequence[Neighbour]:
    return (token.learned, token.start, token.change)[column]


def _bar(axes: Any, row: int, neighbours: Sequence[Neighbour], colour: str) -> None:
    if not neighbours:
        return
    axes.barh(row + 0.35, max(0.0, neighbours[0].cosine), height=0.16, color=colour, linewidth=0)
    names = [written(one.text) for one in neighbours[:SHOWN]]
    axes.text(0.005, row, "   ".join(names), va="center", fontsize=8, parse_math=False, clip_on=True)
