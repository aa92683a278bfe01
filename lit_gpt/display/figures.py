"""Figures: one look for all of them, and files that are whole.

matplotlib is the extra `report`. It is imported only here and only when something is drawn.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from lit_gpt.packages import is_installed, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def can_draw() -> bool:
    return is_installed("matplotlib")


def require_drawing() -> None:
    """Raises InputError where there is no matplotlib: before the runs whose figure is the point of them."""
    require("matplotlib", "report", "The plot")


def new_figure(width: float = 9, height: float = 4.5) -> "tuple[Figure, Axes]":
    """A figure of `width` x `height` hundred pixels with one pair of axes, without a frame at the top and right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a PNG file that is either whole or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
