"""All that only a GPU can show, in one command of under nine minutes: `make gpu-check`.

    python -m benchmarks.gpu_check [--device auto|cuda|cpu] [--budget 520] [--parts tests speed-124m ...] [--out FOLDER]

Writes RESULT.md and RESULT.json to --out, by default $OUT, or gpu-check/. Each part runs in processes of its own within
its share of the budget; a part that fails, hangs or lacks a package is reported, and the others run. On a CPU the same
parts run with tiny models. Exit code 1 if a part fails. Needs nothing but Python's standard library itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.report import page, write_json

ROOT = Path(__file__).resolve().parents[2]
_BUDGET_SECONDS = 520.0
_GRACE_SECONDS = 4.0  # between asking a part to end and killing it
_LOG_LINES = 25
_SETTINGS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        weight: its share of the budget; a part before it that needs less leaves it more.
        needs: modules that it imports.
    """

    name: str
    title: str
    weight: float
    needs: tuple[str, ...]


_MODEL = ("torch", "numpy", "pydantic", "hjson", "psutil", "filelock")
_ENGINE = (*_MODEL, "deepspeed", "einops", "msgpack", "cpuinfo", "orjson", "yaml")
_RUN = (*_ENGINE, "typer", "rich", "safetensors", "jinja2", "tqdm", "sentencepiece", "pyarrow", "backports")
PARTS = (
    Part("machine", "The machine and its speed", 25, ("torch",)),
    Part("tests", "Tests marked gpu", 50, (*_MODEL, "pytest", "pytest_timeout", "hypothesis")),
    Part("overlap", "ZeRO 2 with overlap_comm on against off", 50, _ENGINE),
    Part("parity", "Parity on one card: each model, ZeRO stage and precision", 80, (*_ENGINE, "pytest")),
    Part("document-mask", "Document masks", 40, _MODEL),
    Part("checkpoint", "A checkpoint behind training, and a resume from it", 65, _RUN),
    Part("speed-124m", "Speed, 124 M", 50, _ENGINE),
    Part("speed-354m", "Speed, 354 M", 50, _ENGINE),
    Part("speed-1.3b", "Speed, 1.3 B", 60, _ENGINE),
    Part("speed-largest", "Speed, the largest model that fits", 60, _ENGINE),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--budget", type=float, default=_BUDGET_SECONDS, help="seconds for all parts together")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="default: all")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "gpu-check"))
    arguments = parser.parse_args()
    device = _device() if arguments.device == "auto" else arguments.device
    wanted = [part for part in PARTS if arguments.parts is None or part.name in arguments.parts]
    result = check(wanted, device, arguments.budget, arguments.out.resolve())
    print(f"{arguments.out / 'RESULT.md'} and RESULT.json: {result['seconds']:.0f} s")
    return 1 if any(part["status"] in ("failed", "out of time") for part in result["parts"]) else 0


def check(wanted: Sequence[Part], device: str, budget: float, out: Path) -> dict[str, Any]:
    """Run the parts one after another; both files are complete after each of them."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    missing = sorted({name for part in wanted for name in part.needs if importlib.util.find_spec(name) is None})
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"make gpu-check on {device}, Python {sys.version.split()[0]}",
        "commit": _commit(),
        "device": device,
        "budget": budget,
        "missing": missing,
        "install": "`make install` installs them; docs/measurements.md says how without a network.",
        "parts": [],
    }
    for index, part in enumerate(wanted):
        left = budget - (time.monotonic() - began)
        share = part.weight / sum(other.weight for other in wanted[index:])
        print(f"==> {part.title} (at most {left * share:.0f} s)", flush=True)
        result["parts"].append(_run(part, device, left * share))
        result["seconds"] = time.monotonic() - began
        done = result["parts"][-1]
        print(f"    {done['status']} in {done['seconds']:.0f} s {done['reason']}", flush=True)
        write_json(out / "RESULT.json", result)
        (out / "RESULT.md").write_text(page(result))
    return result


def _run(part: Part, device: str, seconds: float) -> dict[str, Any]:
    """Run one part in processes of its own."""
    began = time.monotonic()
    found: dict[str, Any] = {"name": part.name, "title": part.title, "status": "not run", "seconds": 0.0}
    found |= {"reason": "", "facts": {}, "checks": [], "tables": [], "log": []}
    if missing := [name for name in part.needs if importlib.util.find_spec(name) is None]:
        return found | {"reason": f"needs {', '.join(missing)}"}
    if seconds <= 1.5 * _GRACE_SECONDS:
        return found | {"reason": "no time is left"}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        log, report = Path(folder) / "log.txt", Path(folder) / "report.json"
        limit = seconds - _GRACE_SECONDS
        command = [sys.executable, "-m", "benchmarks.gpu_check.parts", part.name, device, str(report), str(limit)]
        environment = {name: value for name, value in os.environ.items() if name not in _SETTINGS}
        # Caches of its own: a compiler that is killed leaves half a library, which every later process would load.
        environment |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
        if device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            code = _ended(process, limit)
        if report.is_file():
            found |= json.loads(report.read_text())
        fails = code != 0 or any(each["holds"] is False for each in found["checks"])
        found["status"] = "out of time" if code is None else "failed" if fails else "passed"
        if code is None:
            found["reason"] = f"stopped after {limit:.0f} s; what it had found by then is below"
        elif code:
            found["reason"] = f"exit code {code}"
        if fails:
            found["log"] = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    return found | {"seconds": time.monotonic() - began}


def _ended(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """The exit code, or None after `limit` seconds; nothing of the process's session is left either way."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS / 2)
        return None
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _device() -> str:
    """cuda where torch sees a device, in a process of its own: a broken driver may end it."""
    probe = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return (
        "cpu" if subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode else "cuda"
    )


def _commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
