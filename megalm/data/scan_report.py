"""A scan as pictures: a PNG, and an HTML page that holds the picture and the stretches, in one file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalm.data.files import write_atomically
from megalm.data.scan import MEASURES, Scan, Stretch

MOST_POINTS = 2000
LABELS = {
    "entropy": "entropy in the window, nats",
    "repetition": "share of repeated runs",
    "unknown": "share without a piece",
    "unigram_loss": "unigram loss, nats a token",
}


def draw_scan(scanned: Scan, stretches: Sequence[Stretch]) -> bytes:
    """PNG: each measure along the tokens as the range of what lies under a point, strange stretches marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(MEASURES), 1, sharex=True)
    count = len(scanned.scores)
    edges = np.linspace(0, count, min(count, MOST_POINTS) + 1).astype(int)[:-1]
    for axis, name in zip(axes, MEASURES, strict=True):
        values = scanned.measures[name]
        low, high = np.minimum.reduceat(values, edges), np.maximum.reduceat(values, edges)
        axis.fill_between(edges * scanned.window_tokens, low, high, step="post", linewidth=0.8, edgecolor="C0")
        axis.set_ylabel(LABELS[name], fontsize=8)
        for stretch in stretches:
            axis.axvspan(stretch.first, stretch.end, color="C3", alpha=0.35 if stretch.reason == name else 0.12)
    axes[-1].set_xlabel("token")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def write_scan(scanned: Scan, stretches: Sequence[Stretch], prefix: str, output: Path) -> list[Path]:
    """Write OUTPUT.png and OUTPUT.html.

    Raises:
        DataError: a folder that cannot be written.
    """
    picture = draw_scan(scanned, stretches)
    paths = [output.with_name(f"{output.name}{suffix}") for suffix in (".png", ".html")]
    write_atomically(paths[0], picture)
    write_atomically(paths[1], _page(picture, stretches, prefix).encode())
    return paths


def _page(picture: bytes, stretches: Sequence[Stretch], prefix: str) -> str:
    cells = [
        (
            f"{stretch.first:,} to {stretch.end:,}",
            f"{stretch.score:.1f}",
            f"{LABELS[stretch.reason]}: {stretch.value:.3f} (median {stretch.median:.3f})",
            stretch.source,
        )
        for stretch in stretches
    ]
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in cells)
    title = f"Scan of {html.escape(prefix)}"
    return (
        f"<!doctype html><meta charset='utf-8'><title>{title}</title>\n"
        "<style>body{font:14px sans-serif;margin:2em}td,th{padding:2px 12px;text-align:left}img{max-width:100%}</style>"
        f"\n<h1>{title}</h1>\n<img alt='measures along the tokens' "
        f"src='data:image/png;base64,{base64.b64encode(picture).decode()}'>\n"
        f"<table><tr><th>tokens</th><th>score</th><th>why</th><th>first document</th></tr>\n{rows}</table>\n"
    )
