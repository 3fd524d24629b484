"""The style of plots: plain, and legible on both white and black pages.

The background is transparent, and the same figures give the same file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK = "#747c87"
"""Colour of text and axes: a contrast of more than 4 to 1 both on white and on GitHub's dark page."""
BLUE, GREEN, AMBER, RED, VIOLET = "#2f81f7", "#1a9e7a", "#d98a00", "#e5534b", "#8957e5"


@contextmanager
def style() -> Iterator[None]:
    """Context manager: matplotlib's settings for this style."""
    import matplotlib as mpl

    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "svg.hashsalt": "prelude",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    with mpl.rc_context(settings):
        yield


def prepare_panel(panel: Any) -> None:
    """Give a panel horizontal grid lines, and remove all other decoration."""
    panel.set_facecolor("none")
    panel.set_xscale("log")
    panel.grid(axis="y", color=INK, alpha=0.25, linewidth=0.7)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(length=0)


def save(figure: Any, path: Path) -> None:
    """Write a figure, in the format of the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
