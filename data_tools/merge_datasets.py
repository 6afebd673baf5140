"""Copy several indexed datasets into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from console import out, print_near_copy, run
from options import one_of

from megalm.data.builder.decontamination import describe_overlap
from megalm.data.builder.dedup import Dedup
from megalm.data.builder.merge import merge_datasets
from megalm.data.indexed.dataset import IndexedDataset
from megalm.utils.progress import ProgressBar, percent


def main(
    prefixes: Annotated[list[Path], typer.Argument(help="PREFIXes of the datasets, in order")],
    output_prefix: Annotated[Path, typer.Option(help="PREFIX of the dataset to write")],
    dedup: Annotated[str, typer.Option(help="none, exact, or minhash: remove repeated documents")] = "none",
    minhash_threshold: Annotated[
        float | None,
        typer.Option(help="similarity from which documents are near copies, 0 to 1; default: as in the builds"),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace a dataset of this name")] = False,
) -> None:
    """Merge datasets of one tokenizer without tokenizing again.

    \b
    python data_tools/merge_datasets.py --output-prefix data/all data/a data/b
    """
    # A single dataset is refused below, whether it exists or not.
    tokens = sum(len(IndexedDataset(prefix).tokens) for prefix in prefixes) if len(prefixes) > 1 else 0
    with ProgressBar("merging", tokens, shown=percent) as bar:
        report = merge_datasets(
            prefixes,
            output_prefix,
            overwrite,
            out.print,
            one_of("--dedup", dedup, Dedup),
            minhash_threshold,
            bar.advance,
        )
    out.print(f"{output_prefix}: {report.documents:,} documents, {report.tokens:,} tokens ({report.dtype})")
    for name in ("exact", "minhash"):
        if name in report.removed:
            out.print(f"removed {report.removed[name]:,} documents by {name}, in the builds and the merge")
    for line in describe_overlap(report.overlap):
        out.print(line)
    print_near_copy(report)


if __name__ == "__main__":
    run(main)
