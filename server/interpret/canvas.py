"""Colours of pictures, and empty figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from server.errors import ConfigurationError

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2166ac", "#d95f02", "#bbbbbb"
"""Blue and orange differ for all kinds of colour blindness; shapes and places repeat what colours say."""
WRITTEN_ORANGE = "#a84300"
"""Orange for text, with a contrast of 6 to white."""


def canvas(width: float, height: float, *, columns: int = 1) -> tuple[Figure, list[Any]]:
    """A figure of some inches, and its axes from left to right.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ConfigurationError(
            f"Pictures are drawn by matplotlib, which cannot be imported: {exc}.",
            remedy='Install it with `pip install "prelude-server[train]"`.',
        ) from exc
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def legend_below(figure: Figure) -> None:
    """Explain the marks of a figure below its axes, where no mark lies."""
    [axes] = figure.axes
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(loc="outside lower center", ncols=len(handles), frameon=False, fontsize="small")


def signed() -> Colormap:
    """Colours from −1, orange, over 0, white, to 1, blue."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("signed", [ORANGE, "white", BLUE])
