"""What a sweep leaves behind: its record in `runs/sweeps/NAME/sweep.json`, beside it a page, logs and JSONs of runs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megalm.config.schema import RunSection
from megalm.errors import ConfigError, MegalmError
from megalm.runs.run_folder import RunFolder, read_mapping
from megalm.runs.run_status import read_status
from megalm.sweeps.expansion import Sweep, make_sweep, sweep_folder
from megalm.utils.atomic_files import write_json
from megalm.utils.did_you_mean import did_you_mean
from megalm.utils.file_lock import HeldLock, take_lock

RECORD = "sweep.json"
REPORT = "report.html"

State = Literal["waiting", "running", "stopped", "failed", "finished"]
_FROM_END: Mapping[str, State] = {"finished": "finished", "stopped": "stopped", "failed": "failed"}


@dataclass(frozen=True)
class SweepFolder:
    """The folder of a sweep, `root/sweeps/NAME`."""

    path: Path

    @property
    def root(self) -> Path:
        """The folder of the run folders."""
        return self.path.parent.parent

    @property
    def record(self) -> Path:
        return self.path / RECORD

    @property
    def report(self) -> Path:
        return self.path / REPORT

    def log(self, run: str) -> Path:
        """The output of a run that this machine started."""
        return self.path / f"{run}.log"

    def read(self) -> tuple[Sweep, list[str]]:
        """Return the sweep as it was written, and the words that start a run of it.

        Raises:
            ConfigError: there is no record, or it is damaged.
        """
        content = read_mapping(self.record)
        try:
            runs = [dict(run["values"]) for run in content["runs"]]
            sweep = make_sweep(content["name"], self.root, content["axes"], content["arguments"], runs)
            launcher = [str(word) for word in content["launcher"]]
        except (KeyError, TypeError, AttributeError):
            raise ConfigError(f"{self.record}: is not the record of a sweep; name another sweep") from None
        return sweep, launcher

    def write(self, sweep: Sweep, launcher: Sequence[str]) -> Sweep:
        """Record a sweep, or add its values to those of an earlier call; return the whole sweep.

        Args:
            launcher: the words that start a run, up to launch/pretrain.py.

        Raises:
            ConfigError: a sweep of this name has other keys or other arguments.
        """
        whole = sweep
        if self.record.is_file():
            whole = _merged(self.read()[0], sweep, self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be created ({error.strerror}); choose another run.root") from None
        for run in whole.runs:
            if (content := whole.json_content(run)) is not None:
                write_json(whole.json_of(run), content)
        runs = [{"name": run.name, "values": dict(run.values)} for run in whole.runs]
        axes = {key: list(values) for key, values in whole.axes.items()}
        record: dict[str, Any] = {"name": whole.name, "axes": axes, "arguments": list(whole.arguments)}
        write_json(self.record, {**record, "launcher": list(launcher), "runs": runs})
        return whole

    @contextlib.contextmanager
    def recorded(self, sweep: Sweep, launcher: Sequence[str]) -> Iterator[Sweep]:
        """Record a sweep as `write` does; a new one that is refused inside the context leaves nothing."""
        is_new = not self.record.exists()
        whole = self.write(sweep, launcher)
        try:
            yield whole
        except MegalmError:
            if is_new:
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def lock(self) -> HeldLock:
        """Keep a second `megalm sweep` away.

        Raises:
            ConfigError: another one works on this sweep.
        """
        try:
            return take_lock(self.path / "lock", wait_seconds=0.0)
        except BlockingIOError:
            raise ConfigError(f"another `megalm sweep` runs {self.path}; wait for it, or stop it") from None


def find_sweep(name: str) -> SweepFolder:
    """Return the folder of a recorded sweep, by its path or its name under the default run root.

    Raises:
        ConfigError: there is none.
    """
    default = sweep_folder(Path(RunSection().root), name)
    for path in (Path(name), default):
        if (path / RECORD).is_file():
            return SweepFolder(path)
    known = sorted(path.parent.name for path in default.parent.glob(f"*/{RECORD}"))
    meant = did_you_mean(name, known)
    raise ConfigError(
        f"{name}: no such sweep, and no {default}{meant}; give key=a,b,c, a YAML file, or a sweep's folder"
    )


def state_of(run_dir: Path) -> State:
    """Return the state of a run, from its lock and its last event."""
    status = read_status(run_dir)
    if status.state == "running":
        return "running"
    if status.event is None:
        return "failed" if RunFolder(run_dir).failures.is_dir() else "waiting"
    if status.event["event"] != "end":
        return "stopped"  # killed, or its machine failed: it wrote no end
    return _FROM_END.get(str(status.event.get("status")), "failed")


def _merged(before: Sweep, now: Sweep, path: Path) -> Sweep:
    """Return a sweep with the runs of both."""
    problems = []
    if list(before.arguments) != list(now.arguments):
        gone = [word for word in before.arguments if word not in now.arguments]
        new = [word for word in now.arguments if word not in before.arguments]
        problems.append(f"its arguments were {' '.join(gone) or 'fewer'}, are {' '.join(new) or 'fewer'}")
    if set(before.axes) != set(now.axes):
        problems.append(f"it sweeps {', '.join(before.axes)}, not {', '.join(now.axes)}")
    if problems:
        raise ConfigError(f"sweep {path} exists with other settings: {'; '.join(problems)}; choose another --name")
    axes = {
        key: [*values, *(value for value in now.axes[key] if value not in values)]
        for key, values in before.axes.items()
    }
    runs = [*(run.values for run in before.runs), *(run.values for run in now.runs)]
    in_order = [{key: values[key] for key in axes} for values in runs]
    return make_sweep(now.name, now.root, axes, now.arguments, in_order)
