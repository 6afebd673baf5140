"""TensorBoard as a sink: event files in RUN_DIR/tensorboard, one for each process that writes.

Where rows are taken back, a new file with all rows that count takes the place of those before, which are emptied. Each
file begins with a restart event, by which a TensorBoard that is open drops what it has read.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams.metadata import NULL_TENSOR, PLUGIN_DATA_VERSION, SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo
from tensorboard.summary.writer.record_writer import RecordWriter

from megalm.runs.metrics_log import Row
from megalm.tracking.mlflow_mirror import run_facts
from megalm.tracking.mlflow_mirror.sink import seconds
from megalm.tracking.sinks.append_sink import AppendSink, Fact

_FILES = "events.out.tfevents."  # and the seconds of its beginning, by which readers sort


class TensorBoardSink(AppendSink):
    folder_name = "tensorboard"

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self._writer: RecordWriter | None = None

    @property
    def name(self) -> str:
        return f"TensorBoard in {self.folder}"

    @property
    def outcome(self) -> str:
        return f"{self.sent} values to {self.folder}; to see it, run tensorboard --logdir {self.run_dir}"

    def open(self) -> None:
        if self._writer is None:
            if not self._files():  # deleted
                self.state.begin_again()
            self._writer = self._new_file((self.state.last_step or 0) + 1)

    def forget(self) -> None:
        before = self._files()
        self._writer = self._new_file(0)
        for path in before:
            # A TensorBoard that has a file open never gets past its deletion, but past its end.
            if path.stat().st_size:
                os.truncate(path, 0)
            else:
                path.unlink()

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            numbers = self.numbers_of(row)
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()])
            self._add(Event(wall_time=seconds(row), step=row["step"], summary=summary))
            self.sent += len(numbers)
        self._flush()

    def finish(self) -> None:
        self._flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _files(self) -> list[Path]:
        return list(self.folder.glob(f"{_FILES}*"))

    def _new_file(self, step: int) -> RecordWriter:
        """Begin a file; values of `step` and later ones in the files before it no longer count."""
        self.folder.mkdir(exist_ok=True)
        moments = [int(path.name.removeprefix(_FILES).partition(".")[0]) for path in self._files()]
        moment = max(int(time.time()), max(moments, default=0) + 1)
        self._facts = {}
        writer = RecordWriter((self.folder / f"{_FILES}{moment:010d}.{platform.node()}.{os.getpid()}").open("xb"))
        restart = SessionLog(status=SessionLog.START)
        for event in (Event(file_version="brain.Event:2"), Event(step=step, session_log=restart)):
            event.wall_time = time.time()
            writer.write(event.SerializeToString())
        writer.flush()
        return writer

    def write_facts(self, facts: Mapping[str, Fact]) -> None:
        """Write the settings for the page HPARAMS, which compares runs."""
        started = SessionStartInfo(start_time_secs=run_facts.start_ms(self.run_dir) / 1e3)
        for name, value in facts.items():
            if isinstance(value, bool):
                started.hparams[name].bool_value = value
            elif isinstance(value, (int, float)):
                started.hparams[name].number_value = value
            else:
                started.hparams[name].string_value = str(value)
        content = HParamsPluginData(version=PLUGIN_DATA_VERSION, session_start_info=started).SerializeToString()
        plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=content)
        metadata = SummaryMetadata(plugin_data=plugin)
        values = [Summary.Value(tag=SESSION_START_INFO_TAG, metadata=metadata, tensor=NULL_TENSOR)]
        self._add(Event(wall_time=time.time(), summary=Summary(value=values)))
        self._flush()

    def _add(self, event: Any) -> None:
        assert self._writer is not None, "start comes first"
        self._writer.write(event.SerializeToString())

    def _flush(self) -> None:
        assert self._writer is not None, "start comes first"
        self._writer.flush()
