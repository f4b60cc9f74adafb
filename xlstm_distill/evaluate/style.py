"""How figures look: colours from Okabe and Ito, told apart by marker, line or hatching as well as by hue."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def save(draw: Any, path: Path) -> bool:
    """Call `draw` under our style and write its figure, if it makes one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure = draw()
        if figure is None:
            return False
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
    return True


def new_axes(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure of one panel; sizes in inches."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height))


def line_look(index: int) -> dict[str, Any]:
    """Of the line number `index`; the first 32 differ."""
    return {"color": COLOURS[index % 8], "linestyle": LINES[(index + index // 8) % 4], "linewidth": 1.8}


def bar_look(index: int) -> dict[str, Any]:
    """Of the bars number `index`; the first 32 differ."""
    return {"color": COLOURS[index % 8], "hatch": ("", "///", "...", "xxx")[index // 8 % 4], "edgecolor": "white"}
