"""Draw plots into files with matplotlib, without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megalm.errors import ConfigError
from megalm.utils.atomic_files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_plot(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Return an empty figure and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes half a second, so imported only here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def save_plot(figure: Figure, path: Path) -> None:
    """Save the figure atomically, in the format of the path's suffix; creates missing folders.

    Raises:
        ConfigError: the suffix is not a supported format, or the file cannot be written.
    """
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in figure.canvas.get_supported_filetypes():
        named = suffix or "a name without a suffix"
        raise ConfigError(f"{path}: {named} is not a picture format; choose .png, .svg or .pdf")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: figure.savefig(file, format=suffix, dpi=150), durable=False)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another file") from None
