"""Counts the files of megalm/ that a reader passes through who follows one way of a run, by running it.

    python tools/count_files.py                 this checkout
    python tools/count_files.py --before PATH   another one beside it, such as a worktree of an older commit
    python tools/count_files.py --list          the files, too

A tiny run of three steps is trained on one CPU rank, uncompiled and through launch/pretrain.py, and then resumed.
Counted are the files of which a function was called, by the thread that trains; not those that only build objects
(nothing but `__init__`) and not imports. The ways are:

    config to engine    both configurations read and resolved, and the engine built
    training step       one call of the trainer's step
    restore             the checkpoint found, what is resumed planned, and the state loaded
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
# Way -> the functions that it consists of, by the names that they have had: those that are there are followed.
WAYS = {
    "config to engine": {"resolve_run", "load_settings", "build_engine"},
    "training step": {"_train_step"},
    "restore": {"find_start", "find_resume_checkpoint", "plan_course", "plan_resume", "_restore", "restore"},
}
RESUMED = ("restore",)  # what only a resumed run does; the rest is of a fresh one
CONSTRUCTORS = {"__init__", "__post_init__"}
STEPS, MORE_STEPS = 3, 5
WORDS = (
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


class Ways:
    """The files of each way so far: the functions that were called there.

    Args:
        package: its folder; calls elsewhere do not count.
    """

    def __init__(self, package: Path) -> None:
        self._package = f"{package}{os.sep}"
        self._open: list[tuple[FrameType, str]] = []
        self._imports = 0  # modules being imported, one by another
        self.files: dict[str, dict[str, set[str]]] = {way: {} for way in WAYS}

    def see(self, frame: FrameType, event: str, _: Any) -> None:
        """A profile function: `sys.setprofile` calls it before and after every function."""
        code = frame.f_code
        if not code.co_filename.startswith(self._package):
            return
        if code.co_name == "<module>":
            self._imports += {"call": 1, "return": -1}.get(event, 0)
        elif self._imports:
            return  # class bodies, and what makes constants
        elif event == "call":
            self._enter(frame, code.co_filename[len(self._package) :], code.co_name)
        elif event == "return" and self._open and self._open[-1][0] is frame:
            self._open.pop()

    def _enter(self, frame: FrameType, path: str, name: str) -> None:
        self._open += [(frame, way) for way, functions in WAYS.items() if name in functions]
        for _, way in self._open:
            self.files[way].setdefault(path, set()).add(name)


def followed(root: Path, words: Sequence[str], result: Path) -> None:
    """Run launch/pretrain.py of a checkout in this process, and write what was counted; never returns."""
    ways = Ways(root / "megalm")
    leave: Callable[[int], Any] = os._exit

    def write_and_leave(code: int) -> None:
        sys.setprofile(None)
        counted = {
            way: {path: sorted(names) for path, names in files.items() if names - CONSTRUCTORS}
            for way, files in ways.files.items()
        }
        result.write_text(json.dumps(counted))
        leave(code)

    os._exit = write_and_leave  # type: ignore[assignment]  # a rank leaves by it
    sys.argv = [str(root / "launch" / "pretrain.py"), *words]
    sys.path.insert(0, str(root))
    sys.setprofile(ways.see)
    runpy.run_path(sys.argv[0], run_name="__main__")


def counted(root: Path) -> dict[str, dict[str, list[str]]]:
    """Way -> file -> functions called in it.

    Raises:
        subprocess.CalledProcessError: a run failed; its words are on stderr.
    """
    environment = {**os.environ, "PYTHONPATH": str(root), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    found: dict[str, dict[str, list[str]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text.txt").write_text("def read(self):\n    return self\n\n" * 400)
        data = "--input text.txt --tokenizer bytes --output-prefix data/small --txt-documents blank-line"
        _run(root / "data_tools" / "build_dataset.py", data.split(), folder, environment)
        settings = ("--deepspeed_config", str(root / "ds_configs" / "zero2.json"), *WORDS)
        runs = {"fresh": (f"train.steps={STEPS}",), "resumed": ("--resume", "auto", f"train.steps={MORE_STEPS}")}
        for name, words in runs.items():
            arguments = ("--root", str(root), "--result", name, "--", *settings, *words)
            _run(Path(__file__).resolve(), arguments, folder, environment)
            ways = json.loads((folder / name).read_text())
            found |= {way: files for way, files in ways.items() if (way in RESUMED) == (name == "resumed")}
    return found


def _run(script: Path, words: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, str(script), *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.stderr.write(f"{done.stdout}\n{done.stderr}\n")
        done.check_returncode()


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the files of megalm/ that one way of a run goes through.")
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--list", action="store_true", help="name the files, and the functions called in each")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result is not None:
        followed(options.root, options.words, options.result.resolve())
    now = counted(ROOT)
    before = counted(options.before.resolve()) if options.before is not None else {}
    for way, files in now.items():
        older = f"{len(before[way])} files before, " if way in before else ""
        sys.stdout.write(f"{way}: {older}{len(files)} now\n")
        assert files, f"none of {', '.join(WAYS[way])} was called: what is it called now?"
        if options.list:
            sys.stdout.writelines(f"    {path}: {', '.join(files[path])}\n" for path in sorted(files))


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
