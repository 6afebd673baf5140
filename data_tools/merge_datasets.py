"""Copy several indexed datasets into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from console import one_line_errors, out, run

from megalm.data.merge import merge_datasets


def main(
    prefixes: Annotated[list[Path], typer.Argument(help="PREFIXes of the datasets, in the order wanted")],
    output_prefix: Annotated[Path, typer.Option(help="PREFIX of the dataset to write")],
    overwrite: Annotated[bool, typer.Option(help="replace a dataset of this name")] = False,
) -> None:
    """Merge datasets of one tokenizer without tokenizing again.

    Example: python data_tools/merge_datasets.py --output-prefix data/all data/a data/b
    """
    with one_line_errors():
        report = merge_datasets(prefixes, output_prefix, overwrite=overwrite, progress=out.print)
        out.print(f"{output_prefix}: {report.documents:,} documents, {report.tokens:,} tokens ({report.dtype})")


if __name__ == "__main__":
    run(main)
