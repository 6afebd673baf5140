"""Counts the files of megalm/ that a reader passes through to follow one flow of a run, by running it.

    python tools/count_files.py                 this checkout
    python tools/count_files.py --before PATH   compare with another checkout, such as a worktree of an older commit
    python tools/count_files.py --list          print the files, too

A tiny run trains three steps on one CPU rank, uncompiled and through launch/pretrain.py, and then resumes. A file
counts if the training thread calls a function in it; `__init__` and module code do not count. The flows are:

    config to engine    read and resolve both configurations, and build the engine
    training step       one call of the trainer's step
    restore             find the checkpoint, plan the resume, and load the state
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Flow -> its functions, under all names that they have had; it follows those that exist.
FLOWS = {
    "config to engine": {"resolve_run", "load_settings", "build_engine"},
    "training step": {"_train_step"},
    "restore": {"find_start", "find_resume_checkpoint", "plan_course", "plan_resume", "_restore", "restore"},
}
RESUMED = ("restore",)  # measured in the resumed run, the others in the fresh one
CONSTRUCTORS = {"__init__", "__post_init__"}
STEPS, MORE_STEPS = 3, 5
OVERRIDES = (
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "data.sequence_length=32",
    "schedule.warmup_steps=1",
    "evaluate.interval_steps=null",
    "checkpoint.interval_steps=null",
    "sample.max_new_tokens=1",
    "tracking.mlflow=false",
    "compile=false",
    "data.train=data/small",
    "data.tokenizer=bytes",
    "data.split=90,10",
    "run.name=small",
)


class CalledFiles:
    """The files of each flow so far, with the functions called in them.

    Args:
        package: the package's folder; calls elsewhere do not count.
    """

    def __init__(self, package: Path) -> None:
        self._package = f"{package}{os.sep}"
        self._open: list[tuple[FrameType, str]] = []
        self._imports = 0  # depth of nested imports
        self.files: dict[str, dict[str, set[str]]] = {flow: {} for flow in FLOWS}

    def see(self, frame: FrameType, event: str, _: Any) -> None:
        """A profile function: `sys.setprofile` calls it before and after every function."""
        code = frame.f_code
        if not code.co_filename.startswith(self._package):
            return
        if code.co_name == "<module>":
            self._imports += {"call": 1, "return": -1}.get(event, 0)
        elif self._imports:
            return  # class bodies, and code that computes constants
        elif event == "call":
            self._enter(frame, code.co_filename[len(self._package) :], code.co_name)
        elif event == "return" and self._open and self._open[-1][0] is frame:
            self._open.pop()

    def _enter(self, frame: FrameType, path: str, name: str) -> None:
        self._open += [(frame, flow) for flow, functions in FLOWS.items() if name in functions]
        for _, flow in self._open:
            self.files[flow].setdefault(path, set()).add(name)


def followed(root: Path, arguments: Sequence[str], result: Path) -> None:
    """Run launch/pretrain.py of a checkout in this process, and write the counts; never returns."""
    called = CalledFiles(root / "megalm")
    leave: Callable[[int], Any] = os._exit

    def write_and_leave(code: int) -> None:
        sys.setprofile(None)
        counted = {
            flow: {path: sorted(names) for path, names in files.items() if names - CONSTRUCTORS}
            for flow, files in called.files.items()
        }
        result.write_text(json.dumps(counted))
        leave(code)

    os._exit = write_and_leave  # type: ignore[assignment]  # a rank exits through it
    sys.argv = [str(root / "launch" / "pretrain.py"), *arguments]
    sys.path.insert(0, str(root))
    sys.setprofile(called.see)
    runpy.run_path(sys.argv[0], run_name="__main__")


def counted(root: Path) -> dict[str, dict[str, list[str]]]:
    """Flow -> file -> functions called in it.

    Raises:
        subprocess.CalledProcessError: a run failed; its output is on stderr.
    """
    environment = {**os.environ, "PYTHONPATH": str(root), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    found: dict[str, dict[str, list[str]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text.txt").write_text("def read(self):\n    return self\n\n" * 400)
        data = "--input text.txt --tokenizer bytes --output-prefix data/small --txt-documents blank-line"
        _run(root / "data_tools" / "build_dataset.py", data.split(), folder, environment)
        settings = ("--deepspeed_config", str(root / "ds_configs" / "zero2.json"), *OVERRIDES)
        runs = {"fresh": (f"train.steps={STEPS}",), "resumed": ("--resume", "auto", f"train.steps={MORE_STEPS}")}
        for name, options in runs.items():
            arguments = ("--root", str(root), "--result", name, "--", *settings, *options)
            _run(Path(__file__).resolve(), arguments, folder, environment)
            flows = json.loads((folder / name).read_text())
            found |= {flow: files for flow, files in flows.items() if (flow in RESUMED) == (name == "resumed")}
    return found


def _run(script: Path, arguments: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(f"{done.stdout}\n{done.stderr}\n")
        done.check_returncode()


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the files of megalm/ that one flow of a run calls.")
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument("--list", action="store_true", help="print the files, and the functions called in each")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result is not None:
        followed(options.root, options.arguments, options.result.resolve())
    now = counted(ROOT)
    before = counted(options.before.resolve()) if options.before is not None else {}
    for flow, files in now.items():
        older = f"{len(before[flow])} files before, " if flow in before else ""
        sys.stdout.write(f"{flow}: {older}{len(files)} now\n")
        assert files, f"none of {', '.join(FLOWS[flow])} was called; add its new name to FLOWS"
        if options.list:
            sys.stdout.writelines(f"    {path}: {', '.join(files[path])}\n" for path in sorted(files))


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
