"""One look for all figures. Matplotlib is loaded on first use; pyplot and its state never are."""

from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's colours, which colour-blind readers can tell apart; black last.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def figure(rows: int = 1, columns: int = 1, *, width: float = 4.5, height: float = 3.0):
    """A matplotlib figure and its axes, an array (rows, columns); sizes in inches per panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(fig)
    axes = fig.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_prop_cycle(color=COLORS)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=9)
    return fig, axes


def line_with_band(ax: Any, x: Any, values_SX: Any, label: str | None = None, color: str | None = None) -> None:
    """The median over S seeds as a line, the quartiles as a band (none for one seed).

    `x` has shape (X,). `color` is the next one of the figure's if left out.
    """
    x, values_SX = np.asarray(x), np.asarray(values_SX)
    if values_SX.ndim != 2 or values_SX.shape[1:] != x.shape or not len(values_SX):
        raise ValueError(
            f"line_with_band: values have shape {values_SX.shape} and x {x.shape}, expected (S, X) with S >= 1 and (X,)"
        )
    low, middle, high = np.quantile(values_SX, [0.25, 0.5, 0.75], axis=0)
    (line,) = ax.plot(x, middle, label=label, color=color, linewidth=1.8)
    if len(values_SX) > 1:
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def save(fig: Any, path: str | Path) -> Path:
    """Writes a figure, with a legend in every panel that has labels; returns the path."""
    for ax in fig.axes:
        if ax.get_legend_handles_labels()[0] and ax.get_legend() is None:
            ax.legend(frameon=False, fontsize=9)
    # Without the version of matplotlib inside, equal figures are equal files.
    metadata = {"Software": None} if Path(path).suffix == ".png" else None
    fig.savefig(path, dpi=150, metadata=metadata)
    return Path(path)
