"""Figures: one look for all of them, and PNG files that are whole.

matplotlib is the extra `report`. It is imported only if something is drawn.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from lit_gpt.files import whole_file
from lit_gpt.packages import is_installed, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = "pip install -e '.[report]'"  # for those who go on without a figure


def can_draw() -> bool:
    return is_installed("matplotlib")


def require_drawing() -> None:
    """Raises InputError if there is no matplotlib: for runs whose figure is the point of them, before they begin."""
    require("matplotlib", "report", "The plot")


def new_figure(width: float = 9, height: float = 4.5, frame: bool = False) -> "tuple[Figure, Axes]":
    """A figure of `width` x `height` hundred pixels with one pair of axes; `frame` draws its top and right, too."""
    figure, (axes,) = new_row(width, height, n_plots=1, frame=frame)
    return figure, axes


def new_row(width: float, height: float, n_plots: int, frame: bool = False) -> "tuple[Figure, list[Axes]]":
    """A figure of `width` x `height` hundred pixels with plots side by side, which share the vertical axis."""
    from matplotlib.figure import Figure

    # not by pyplot, which keeps every figure that it makes, and looks for a display
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    (plots,) = figure.subplots(nrows=1, ncols=n_plots, sharey=True, squeeze=False)
    for axes in plots:
        axes.spines[["top", "right"]].set_visible(frame)
    return figure, list(plots)


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a PNG file that is either whole or not there."""
    # the format would else be taken from the name, which ends in .tmp
    with whole_file(path) as file:
        figure.savefig(file, format="png")
