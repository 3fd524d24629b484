"""Colours of pictures, and empty figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from server.errors import ConfigurationError

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2166ac", "#d95f02", "#bbbbbb"


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


def signed() -> Colormap:
    """Colours from −1, orange, over 0, white, to 1, blue."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("signed", [ORANGE, "white", BLUE])
