"""Say what an indexed dataset holds, check it, and show its documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from console import one_line_errors, out, run

from megalm.data.inspection import describe, document_text, verify
from megalm.data.tokenizer import load_tokenizer


def main(
    prefix: Annotated[Path, typer.Argument(help="PREFIX of PREFIX.bin and PREFIX.idx")],
    check: Annotated[bool, typer.Option("--verify", help="read all tokens: index, vocabulary, recorded hash")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="to show text, and to compare with the recorded one")] = None,
    document: Annotated[int | None, typer.Option(min=0, help="show this document, from 0")] = None,
) -> None:
    """Print facts about a dataset; exit code 2 where it is damaged or of another tokenizer."""
    with one_line_errors():
        loaded = load_tokenizer(tokenizer) if tokenizer else None
        facts = describe(prefix, loaded)
        if check:
            facts |= verify(prefix, loaded)
        if document is not None:
            out.print(document_text(prefix, document, loaded))
            return
        width = max(map(len, facts))
        for name, value in facts.items():
            out.print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    run(main)
