"""Find unusual parts of a dataset: measure its tokens in windows, rank the outliers, and draw a report.

W: tokens per window, n: windows, V: vocabulary size.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalm.data.builder.disk_hash_table import hash_runs
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.metadata import DocumentSources
from megalm.data.indexed.token_counts import Tell, count_tokens, no_tell
from megalm.utils.atomic_files import write_bytes_atomically
from megalm.utils.plotting import new_plots

WINDOW_TOKENS = 512
BATCH_WINDOWS = 512
GRAM = 4  # length in tokens of the runs whose repetition is counted
# A window is an outlier from this multiple of the usual distance from the median.
STRANGE = 6.0
MOST_POINTS = 2000
LABELS = {
    "entropy": "entropy in the window, nats",
    "repetition": "share of repeated runs",
    "unknown": "share of fallback tokens",
    "unigram_loss": "unigram loss, nats per token",
}
MEASURES = tuple(LABELS)
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scan:
    """Measures of the windows, [n] each; window i starts at token i * `window_tokens`.

    Attributes:
        measures: entropy of the window's own tokens in nats; repetition, the share of runs of four tokens that
            occurred before in the window; unknown, the share of tokens that encode characters without a piece;
            unigram_loss, nats per token of a model that knows the token frequencies of the complete dataset.
        scores: the largest distance of a measure from its median, in units of the usual distance.
        reasons: index of that measure.
    """

    window_tokens: int
    measures: dict[str, Floats]
    scores: Floats
    reasons: npt.NDArray[np.int8]


@dataclass(frozen=True)
class Stretch:
    """Adjacent outlier windows: tokens [first, end), the most unusual measure and its value there."""

    first: int
    end: int
    score: float
    reason: str
    value: float
    median: float
    document: int
    source: str


def scan(
    dataset: IndexedDataset,
    fallback: npt.NDArray[np.bool_] | None = None,
    window_tokens: int = WINDOW_TOKENS,
    tell: Tell = no_tell,
) -> Scan:
    """Measure every window, including the shorter last one; takes 20 bytes of memory per window.

    Args:
        fallback: [V] whether an id encodes a character without a piece (`Tokenizer.fallback_ids`); None: no id does.
    """
    shares = count_tokens(dataset, tell=tell).counts / max(1, len(dataset.tokens))
    losses = np.zeros(len(shares))
    losses[shares > 0] = -np.log(shares[shares > 0])
    unknown = np.zeros(len(shares), dtype=np.bool_)
    if fallback is not None:
        unknown[: len(fallback)] = fallback[: len(unknown)]
    rows = []
    for batch in _batches(dataset.tokens, window_tokens):
        rows.append(_measure(batch, losses, unknown))
        tell(batch.size)
    table = np.concatenate(rows) if rows else np.zeros((0, len(MEASURES)), dtype=np.float32)
    distances = np.stack([_distance(table[:, column]) for column in range(len(MEASURES))], axis=1)
    return Scan(
        window_tokens=window_tokens,
        measures={name: table[:, column] for column, name in enumerate(MEASURES)},
        scores=distances.max(axis=1) if len(table) else np.zeros(0, dtype=np.float32),
        reasons=distances.argmax(axis=1).astype(np.int8) if len(table) else np.zeros(0, dtype=np.int8),
    )


def strange_stretches(dataset: IndexedDataset, scanned: Scan, most: int = 10) -> list[Stretch]:
    """Return up to `most` outlier stretches, the most unusual first."""
    strange = np.concatenate(([False], scanned.scores >= STRANGE, [False]))
    edges = np.flatnonzero(strange[1:] != strange[:-1]).reshape(-1, 2)
    best = sorted(edges.tolist(), key=lambda edge: -float(scanned.scores[edge[0] : edge[1]].max()))
    return [stretch_at(dataset, scanned, first, end) for first, end in best[:most]]


def stretch_at(dataset: IndexedDataset, scanned: Scan, first: int, end: int) -> Stretch:
    """Return windows [first, end) as one stretch."""
    peak = first + int(scanned.scores[first:end].argmax())
    reason = MEASURES[int(scanned.reasons[peak])]
    token = first * scanned.window_tokens
    document = dataset.document_at(token)
    source = DocumentSources(dataset.prefix, dataset.document_count)[document]
    return Stretch(
        first=token,
        end=min(end * scanned.window_tokens, len(dataset.tokens)),
        score=float(scanned.scores[peak]),
        reason=reason,
        value=float(scanned.measures[reason][peak]),
        median=float(np.median(scanned.measures[reason])),
        document=document,
        source=f"document {document}" if source is None else str(source),
    )


def _batches(tokens: npt.NDArray[np.generic], window_tokens: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the windows in batches, [b, W]."""
    whole = len(tokens) // window_tokens
    for start in range(0, whole, BATCH_WINDOWS):
        end = min(start + BATCH_WINDOWS, whole)
        yield tokens[start * window_tokens : end * window_tokens].astype(np.int64).reshape(end - start, window_tokens)
    if len(tokens) % window_tokens:
        yield tokens[whole * window_tokens :].astype(np.int64)[np.newaxis]


def _measure(windows: npt.NDArray[np.int64], losses: npt.NDArray[np.float64], unknown: npt.NDArray[np.bool_]) -> Floats:
    """Return [b, measures] for [b, W] tokens."""
    return np.stack(
        [_entropy(windows), _repetition(windows), unknown[windows].mean(axis=1), losses[windows].mean(axis=1)], axis=1
    ).astype(np.float32)


def _entropy(windows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    count, length = windows.shape
    ordered = np.sort(windows, axis=1)
    starts = np.ones(windows.shape, dtype=np.bool_)  # of runs of equal tokens
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    places = np.flatnonzero(starts)
    runs = np.diff(places, append=windows.size)
    terms = np.bincount(places // length, weights=runs * np.log(runs), minlength=count)
    return np.asarray(np.log(length) - terms / length)


def _repetition(windows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    count, length = windows.shape
    if length <= GRAM:
        return np.zeros(count)
    mixed = hash_runs(windows.astype(np.uint64), GRAM)
    mixed.sort(axis=1)
    return np.asarray((mixed[:, 1:] == mixed[:, :-1]).mean(axis=1))


def _distance(values: Floats) -> Floats:
    """Return [n] distances from the median, in units of the usual distance; near 0 if all windows are similar."""
    if not len(values):
        return values
    distance = np.abs(values - np.median(values))
    usual = np.quantile(distance, 0.9) / 1.645  # equals the standard deviation of a normal distribution
    return np.asarray(distance / max(float(usual), 0.02), dtype=np.float32)


def draw_scan(scanned: Scan, stretches: Sequence[Stretch]) -> bytes:
    """Draw a PNG: the range of each measure along the tokens, with the outlier stretches marked."""
    figure, axes = new_plots("token", list(LABELS.values()))
    count = len(scanned.scores)
    edges = np.linspace(0, count, min(count, MOST_POINTS) + 1).astype(int)[:-1]
    for axis, name in zip(axes, MEASURES, strict=True):
        values = scanned.measures[name]
        low, high = np.minimum.reduceat(values, edges), np.maximum.reduceat(values, edges)
        axis.fill_between(edges * scanned.window_tokens, low, high, step="post", linewidth=0.8, edgecolor="C0")
        for stretch in stretches:
            axis.axvspan(stretch.first, stretch.end, color="C3", alpha=0.35 if stretch.reason == name else 0.12)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def scan_paths(output: Path) -> list[Path]:
    return [output.with_name(f"{output.name}{suffix}") for suffix in (".png", ".html")]


def write_scan(scanned: Scan, stretches: Sequence[Stretch], prefix: str, output: Path) -> list[Path]:
    """Write OUTPUT.png and OUTPUT.html.

    Raises:
        DataError: the folder cannot be written.
    """
    picture = draw_scan(scanned, stretches)
    paths = scan_paths(output)
    write_bytes_atomically(paths[0], picture)
    write_bytes_atomically(paths[1], _page(picture, stretches, prefix).encode())
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
        f"<table><tr><th>tokens</th><th>score</th><th>reason</th><th>first document</th></tr>\n{rows}</table>\n"
    )
