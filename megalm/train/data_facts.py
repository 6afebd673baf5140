"""What a run reads of each dataset: for the opening facts and --dry-run, with what people should be warned of."""

from __future__ import annotations

from megalm.config.resolve import ResolvedRun
from megalm.data.report import sidecar_of
from megalm.data.signatures import AWAITS_MERGE
from megalm.data.streams import stride_warning
from megalm.errors import ConfigError, DataError
from megalm.train.datasets import RunData, find_data, open_data

# Up to about four passes, repeated text trains nearly as well as new text (arXiv 2305.16264, read in November 2026).
MANY_REPETITIONS = 4.0


def data_rows(run: ResolvedRun, data: RunData) -> list[tuple[str, str]]:
    """A row for each dataset of the run, and for each change of the mixture."""
    parts, rows = data.train.parts, []
    for part, planned in zip(parts, data.train.planned(data.samples), strict=True):
        share = f"{planned.samples / data.samples:.1%} of the samples, " if len(parts) > 1 else ""
        seen = f", each token {planned.repetition:.2f} times" if part.stride < part.sequence_length else ""
        text = f"{share}{planned.epochs:.2f} epochs of {part.tokens_per_epoch:,} tokens{seen}"
        rows.append(("data", f"{planned.prefix}: {text}"))
    for stage in run.config.data.blends if run.config.data.stages else ():
        all_of_it = sum(part.weight for part in stage.blend)
        shares = ", ".join(f"{part.prefix} {part.weight / all_of_it:.1%}" for part in stage.blend)
        unread = "" if stage.from_step <= run.config.train.steps else " (after the last step)"
        rows.append(("data", f"from step {stage.from_step:,}: {shares}{unread}"))
    return rows


def planned_data(run: ResolvedRun) -> tuple[list[tuple[str, str]], list[str]]:
    """Rows and warnings of a run that is not started: nothing is prepared or built.

    Raises:
        ConfigError, DataError: as when it is started.
    """
    data = run.config.data
    if data.train is None:
        return [], []
    try:
        opened = open_data(run, find_data(data, lambda line: None))
    except DataError as error:
        if data.rebuild == "never":
            raise
        return [("data", f"is built when the run starts: {error}")], []
    return data_rows(run, opened), data_warnings(run, opened)


def data_warnings(run: ResolvedRun, data: RunData) -> list[str]:
    """What the run reads more often than people may think.

    Raises:
        ConfigError: a dataset that is read more often than `data.max_epochs`.
    """
    steps, most = run.config.train.steps, run.config.data.max_epochs
    warnings = []
    for prefix in sorted({planned.prefix for planned in data.train.planned(data.samples)}):
        if ((sidecar_of(prefix) or {}).get("minhash") or {}).get(AWAITS_MERGE):
            warnings.append(
                f"{prefix} is one shard of a build with --dedup minhash, and its near copies are still in: "
                "data_tools/merge_datasets.py --dedup minhash takes them out"
            )
    for part, planned in zip(data.train.parts, data.train.planned(data.samples), strict=True):
        overlap = stride_warning(part.tokens_per_epoch, part.sequence_length, part.stride, planned.samples)
        if overlap is not None:
            warnings.append(f"{planned.prefix}: {overlap}")
        if most is not None and planned.repetition > most:
            raise ConfigError(
                f"{steps} steps see {planned.prefix} {planned.repetition:.1f} times, data.max_epochs={most:g}; "
                "train fewer steps, or bring more data"
            )
        if overlap is None and planned.repetition > MANY_REPETITIONS:
            warnings.append(
                f"{planned.prefix}: {steps} steps see each of its {part.tokens_per_epoch:,} tokens "
                f"{planned.repetition:.1f} times; beyond {MANY_REPETITIONS:g} times text teaches less and less "
                "(data.max_epochs refuses it)"
            )
    return warnings
