"""What PREFIX.json says of a merged dataset: sums of its parts, and what cannot be known of parts of other tools."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from megalm.data.dedup import Dedup
from megalm.data.indexed import IndexedDataset
from megalm.data.inputs import KEPT_MESSAGES
from megalm.data.near import KEPT_PAIRS, Pair, check_threshold
from megalm.data.report import KEPT_NAMES, BuildReport, is_whole, report_of, versions
from megalm.data.signatures import AWAITS_MERGE, signatures_path
from megalm.data.sources import Sources
from megalm.errors import DataError

SUMMED = ("empty_documents", "skipped", "inexact_documents", "text_bytes")


def asked_of(
    prefixes: Sequence[str | Path], sidecars: Sequence[dict[str, Any] | None], dedup: Dedup, threshold: float | None
) -> dict[str, Any]:
    """Which copies are left out, as PREFIX.json has it.

    Raises:
        DataError: shards whose near copies would stay, or datasets of several thresholds.
    """
    if dedup != "minhash":
        for prefix, sidecar in zip(prefixes, sidecars, strict=True):
            if sidecar and sidecar.get("minhash", {}).get(AWAITS_MERGE):
                raise DataError(
                    f"{prefix}: is a shard built with --dedup minhash, and still has its near copies; merge with "
                    "--dedup minhash"
                )
        return {"dedup": dedup} if dedup != "none" else {}
    known = {sidecar["options"]["minhash_threshold"] for sidecar in sidecars if sidecar and sidecar.get("minhash")}
    if threshold is None and len(known) > 1:
        raise DataError(
            f"{prefixes[0]} and others were built with several thresholds, {', '.join(map(str, sorted(known)))}; "
            "state one (--minhash-threshold 0.8)"
        )
    # Where none is known there are no signatures either, which is refused before anything is compared.
    stated = next(iter(known), 1.0) if threshold is None else threshold
    return {"dedup": dedup, "minhash_threshold": check_threshold(stated)}


def merged_report(
    prefixes: Sequence[str | Path],
    sidecars: Sequence[dict[str, Any] | None],
    output_prefix: str | Path,
    datasets: Sequence[IndexedDataset],
    asked: dict[str, Any],
) -> BuildReport:
    """What PREFIX.json will say, but for what copying finds out.

    Raises:
        DataError: inputs of different tokenizers.
    """
    known = [(prefix, sidecar) for prefix, sidecar in zip(prefixes, sidecars, strict=True) if sidecar is not None]
    stated = [(prefix, sidecar) for prefix, sidecar in known if sidecar["tokenizer"]]
    for prefix, sidecar in stated:
        first_prefix, first = stated[0]
        for fact, what in (("fingerprint", "tokenizer"), ("eod_id", "end of documents")):
            if sidecar["tokenizer"].get(fact) != first["tokenizer"].get(fact):
                raise DataError(
                    f"{prefix}: was built with {what} {sidecar['tokenizer'].get('name')}, {first_prefix} with another, "
                    f"{first['tokenizer'].get('name')}; build one of them again"
                )
    complete = len(known) == len(prefixes) and all(sidecar["options"].get("complete", True) for _, sidecar in known)
    report = BuildReport(
        prefix=Path(output_prefix).name,
        tokenizer=stated[0][1]["tokenizer"] if stated else {},
        options={"merged": [str(prefix) for prefix in prefixes], "complete": complete, **asked},
        inputs=[entry for _, sidecar in known for entry in sidecar["inputs"]],
        documents=sum(dataset.document_count for dataset in datasets),
        dtype=datasets[0].dtype.name,
        versions=versions(),
    )
    if not complete:
        return report
    report.options["hashes"] = [sidecar["bin_sha256"] for _, sidecar in known]
    if reads := [sidecar["options"]["read"] for _, sidecar in known if "read" in sidecar["options"]]:
        report.options["read"] = reads[0]
    for key in SUMMED:
        setattr(report, key, sum(sidecar.get(key, 0) for _, sidecar in known))
    for _, sidecar in known:
        for name, count in sidecar.get("removed", {}).items():
            report.removed[name] = report.removed.get(name, 0) + count
    report.near_copies = [pair for _, sidecar in known for pair in sidecar.get("near_copies", [])][:KEPT_PAIRS]
    report.inexact_names = [name for _, sidecar in known for name in sidecar["inexact_names"]][:KEPT_NAMES]
    report.messages = [text for _, sidecar in known for text in sidecar.get("messages", [])][:KEPT_MESSAGES]
    return report


def finished_report(output_prefix: str | Path, report: BuildReport, thorough: bool) -> BuildReport | None:
    """The report of the same merge, if it is there (see `is_whole`)."""
    known = report_of(output_prefix) if report.options["complete"] else None
    if known is None:
        return None
    same = known.options == report.options and known.tokenizer == report.tokenizer
    if report.options.get("dedup") == "minhash" and not signatures_path(output_prefix).exists():
        return None
    return known if same and is_whole(output_prefix, known, thorough) else None


def note_pairs(report: BuildReport, pairs: Sequence[Pair], datasets: Sequence[IndexedDataset]) -> None:
    """Name what was left out and why, after what the builds named."""
    ends = list(accumulate(dataset.document_count for dataset in datasets))

    def name(number: int) -> str:
        place = bisect_right(ends, number)
        dataset = datasets[place]
        document = number - ends[place] + dataset.document_count
        source = Sources(dataset.prefix, dataset.document_count)[document]
        return source.name if source else f"{dataset.prefix} document {document}"

    for pair in pairs[: KEPT_PAIRS - len(report.near_copies)]:
        report.near_copies.append({"left_out": name(pair.left_out), "copy_of": name(pair.copy_of), "alike": pair.alike})


def count_removed(report: BuildReport, copies: int, dedup: Dedup) -> None:
    """Documents that were left out of one more dataset."""
    if dedup == "none":
        return
    report.documents -= copies
    report.removed[dedup] = report.removed.get(dedup, 0) + copies
    if copies:
        report.text_bytes = 0  # of those that stay: not known
