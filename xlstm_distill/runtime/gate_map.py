"""The mean output gate of each layer and head as a heat map: in TensorBoard during training, in the report after it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xlstm_distill.contract.gates import heads_shut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

Gates = Sequence[Sequence[float]]
"""Mean output gate of each head, layer by layer."""
TICKS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
LABEL = "mean of o (1: mLSTM only)"


def draw_gate_map(axes: "Axes", gates: Gates) -> "AxesImage":
    """Draw heads over layers, a cross on each shut head.

    The colours go from 0 to 1 whatever the gates are, so that maps can be compared; by the square root, because gates
    start near 0.02 and most stay low.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    columns = np.array(gates, dtype=float).T
    image = axes.imshow(columns, aspect="auto", cmap="viridis", norm=PowerNorm(0.5, 0, 1), origin="lower")
    if shut := heads_shut(gates):
        for colour, width in (("black", 2.5), ("white", 1.0)):  # to be seen at both ends of the scale
            axes.plot(*zip(*shut, strict=True), "x", color=colour, markersize=5, markeredgewidth=width)
    axes.set(xlabel="layer", ylabel="head")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False)
    return image


def gate_image(gates: Gates) -> NDArray[np.uint8] | None:
    """The heat map as an image [height, width, 3]; None where matplotlib cannot be imported.

    Training goes on without pictures: a broken plotting library must not cost a run.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 3.6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    image = draw_gate_map(figure.add_subplot(), gates)
    figure.colorbar(image, label=LABEL, ticks=TICKS)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
