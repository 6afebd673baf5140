"""Draw plots into files with matplotlib, without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.errors import ConfigError
from megalm.utils.atomic_files import write_atomically, writing_to

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_plot(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Return an empty figure and its axes."""
    figure, (axes,) = new_plots(xlabel, [ylabel])
    return figure, axes


def new_plots(xlabel: str, ylabels: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Return an empty figure with axes below each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes half a second, so imported only here
    from matplotlib.figure import Figure

    count = len(ylabels)
    figure = Figure(figsize=(9, 3.5 + 2 * count), layout="constrained")
    FigureCanvasAgg(figure)
    found = []
    for place, ylabel in enumerate(ylabels, start=1):
        axes = figure.add_subplot(count, 1, place, xlabel=xlabel if place == count else "", ylabel=ylabel)
        axes.grid(alpha=0.3)
        found.append(axes)
    return figure, found


def save_plot(figure: Figure, path: Path) -> None:
    """Save the figure atomically, in the format of the path's suffix; creates missing folders.

    Raises:
        ConfigError: the suffix is not a supported format, or the file cannot be written.
    """
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in figure.canvas.get_supported_filetypes():
        named = suffix or "a name without a suffix"
        raise ConfigError(f"{path}: {named} is not a picture format; choose .png, .svg or .pdf")
    with writing_to(path, "name another file", ConfigError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: figure.savefig(file, format=suffix, dpi=150), durable=False)
