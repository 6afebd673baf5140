"""One page about a run: `write_report`. A single HTML file without scripts, images or other files to load."""

from __future__ import annotations

import time
from pathlib import Path

from megalm.errors import ConfigError
from megalm.runs.metrics_log import ReadBatches, read_batches
from megalm.runs.run_folder import RunFolder
from megalm.tracking.report.page import render
from megalm.tracking.report.run_data import read_run
from megalm.utils.atomic_files import refuse_overwriting_inputs, write_atomically, writing_to

REPORT_FILE = "report.html"


def write_report(run_dir: Path, output: Path | None = None, read: ReadBatches = read_batches) -> Path:
    """Write the page of a run, which may still be training; return its path.

    Args:
        output: None: report.html in the run folder.

    Raises:
        ConfigError: there is no run folder, its configuration is damaged, or the page cannot be written, or `output` is
            a file of the run.
        DataError: a line of metrics.jsonl before the last is damaged.
    """
    path = output or run_dir / REPORT_FILE
    refuse_overwriting_inputs([path], RunFolder(run_dir).records)
    now = time.time()
    content = render(read_run(run_dir, now, read), now).encode("utf-8", errors="replace")
    with writing_to(path, "choose another path with --output", ConfigError):
        write_atomically(path, lambda file: file.write(content), durable=False)
    return path
