"""Copy several indexed datasets into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from console import one_line_errors, out, run

from megalm.data.merge import MergeDedup, merge_datasets
from megalm.errors import DataError


def main(
    prefixes: Annotated[list[Path], typer.Argument(help="PREFIXes of the datasets, in the order wanted")],
    output_prefix: Annotated[Path, typer.Option(help="PREFIX of the dataset to write")],
    dedup: Annotated[str, typer.Option(help="none or exact: leave out documents that came before")] = "none",
    overwrite: Annotated[bool, typer.Option(help="replace a dataset of this name")] = False,
) -> None:
    """Merge datasets of one tokenizer without tokenizing again.

    Example: python data_tools/merge_datasets.py --output-prefix data/all data/a data/b
    """
    with one_line_errors():
        if dedup not in ("none", "exact"):
            raise DataError(f"--dedup {dedup}: is unknown; merging knows none and exact")
        wanted = cast(MergeDedup, dedup)
        report = merge_datasets(prefixes, output_prefix, overwrite, out.print, wanted)
        out.print(f"{output_prefix}: {report.documents:,} documents, {report.tokens:,} tokens ({report.dtype})")
        if "exact" in report.removed:
            out.print(f"left out {report.removed['exact']:,} documents by exact, in the builds and in the merge")


if __name__ == "__main__":
    run(main)
