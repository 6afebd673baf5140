"""Who may import whom (CONTRIBUTING.md), read from the syntax trees: nothing is imported here.

Every import counts: at the top, inside functions, relative, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megalm", "launch", "data_tools")


@dataclass(frozen=True)
class Import:
    """`importer` (megalm.engine.zero_engine) imports `imported` (torch.distributed, or megalm.train.trainer.run)."""

    importer: str
    imported: str
    line: int


def inside(name: str, *packages: str) -> bool:
    """Is a dotted name one of these packages or anything in them?"""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@dataclass(frozen=True)
class Rule:
    text: str
    broken_by: Callable[[Import], bool]


def only_in(package: str, *places: str) -> Callable[[Import], bool]:
    return lambda item: inside(item.imported, package) and not inside(item.importer, *places)


def never(place: str, *packages: str) -> Callable[[Import], bool]:
    return lambda item: inside(item.importer, place) and inside(item.imported, *packages)


def _model_reaches_out(item: Import) -> bool:
    return (
        inside(item.importer, "megalm.model")
        and inside(item.imported, "megalm")
        and not inside(item.imported, "megalm.model", "megalm.config.schema", "megalm.errors")
    )


def _parallel_reaches_out(item: Import) -> bool:
    allowed = ("megalm.parallel", "megalm.model", "megalm.topology", "megalm.errors", "megalm.config.schema")
    return (
        inside(item.importer, "megalm.parallel")
        and inside(item.imported, "megalm")
        and not inside(item.imported, *allowed)
    )


def _utils_reaches_out(item: Import) -> bool:
    allowed = ("megalm.utils", "megalm.errors", "megalm.utils.atomic_files")
    return (
        inside(item.importer, "megalm.utils")
        and inside(item.imported, "megalm", "torch")
        and not inside(item.imported, *allowed)
    )


def _training_sees_classes(item: Import) -> bool:
    return (
        inside(item.importer, "megalm.train")
        and not inside(item.importer, "megalm.train.setup")
        and inside(item.imported, "megalm.engine", "megalm.parallel")
        and not inside(item.imported, "megalm.engine.interface")
    )


DISTRIBUTED_PLACES = ("megalm.parallel", "megalm.engine", "megalm.checkpoint", "megalm.testing")
DOORS = ("launch", "data_tools")
ENGINES = ("megalm.engine", "megalm.parallel")

RULES = (
    Rule("config imports no torch", never("megalm.config", "torch")),
    Rule("topology is pure integers: no torch", never("megalm.topology", "torch")),
    Rule("estimate is pure integers: no torch", never("megalm.cost_model", "torch")),
    Rule("utils imports errors and itself only: no torch", _utils_reaches_out),
    Rule("planning imports no torch: it runs on a login node", never("megalm.planning", "torch")),
    Rule("data imports no torch: it runs on a login node", never("megalm.data", "torch")),
    Rule("tracking imports no torch", never("megalm.tracking", "torch")),
    Rule("model imports torch, model and config.schema only", _model_reaches_out),
    Rule("parallel imports model, never what stands above it", _parallel_reaches_out),
    Rule("deepspeed is imported in engine and launch only", only_in("deepspeed", "megalm.engine", "launch")),
    Rule(
        "mlflow is imported in tracking/mlflow_mirror/client.py only",
        only_in("mlflow", "megalm.tracking.mlflow_mirror.client"),
    ),
    Rule("torch.distributed: parallel, engine, checkpoint only", only_in("torch.distributed", *DISTRIBUTED_PLACES)),
    Rule("checkpoint stores fragments and never sees the engine", never("megalm.checkpoint", "megalm.engine")),
    Rule("huggingface reads and writes files: it sees no engine", never("megalm.huggingface", *ENGINES)),
    Rule("huggingface is imported by commands only", only_in("megalm.huggingface", "megalm.huggingface", "megalm.cli")),
    Rule("offline is one process: no engine, no groups", never("megalm.inference", *ENGINES)),
    Rule("offline is imported by commands only", only_in("megalm.inference", "megalm.inference", "megalm.cli")),
    Rule("transformers is for tests: an export needs none", never("megalm", "transformers")),
    Rule("megalm never imports launch or data_tools", never("megalm", *DOORS)),
    Rule("megalm imports its command line in cli only", only_in("megalm.cli", "megalm.cli", *DOORS)),
    Rule("train sees the engine's protocol; train/setup.py alone the classes", _training_sees_classes),
)


def imports_of(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of a module; `from a import b` counts as `a.b`, because b may be a module."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                parts = [*base, *([node.module] if node.module else []), alias.name]
                yield Import(module, ".".join(parts), node.lineno)
        elif isinstance(node, ast.Attribute) and node.attr == "distributed" and ast.unparse(node.value) == "torch":
            yield Import(module, "torch.distributed", node.lineno)  # reached through a plain `import torch`
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            by_name = ast.unparse(node.func) in ("importlib.import_module", "__import__")
            names = [node.args[0].value] if by_name else []
            yield from (Import(module, str(name), node.lineno) for name in names)


def broken_rules(source: str, path: Path, rules: tuple[Rule, ...] = RULES) -> list[str]:
    """`file:line: module imports x: rule`, one a breach; `path` is relative to the repository."""
    parts = path.with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    return [
        f"{path}:{item.line}: {item.importer} imports {item.imported}, but: {rule.text}"
        for item in imports_of(source, module, is_package)
        for rule in rules
        if rule.broken_by(item)
    ]


def test_import_rules_hold() -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 20
    breaches = [line for path in files for line in broken_rules(path.read_text(), path.relative_to(ROOT))]
    assert not breaches, "\n" + "\n".join(breaches)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megalm/config/a.py", "import torch"),
        ("megalm/data/builder/a.py", "def f():\n    from torch import nn"),
        ("megalm/model/a.py", "from ..parallel import groups"),
        ("megalm/model/a.py", "import torch.distributed as dist"),
        ("megalm/model/__init__.py", "from .. import parallel"),
        ("megalm/train/a.py", "from torch import distributed"),
        ("megalm/train/a.py", "import torch\ntorch.distributed.barrier()"),
        ("megalm/train/a.py", "import deepspeed.comm"),
        ("megalm/utils/a.py", "import torch"),
        ("megalm/utils/a.py", "from megalm.config.schema import RunConfig"),
        ("megalm/tracking/a.py", "import mlflow"),
        ("megalm/tracking/a.py", "import importlib\nimportlib.import_module('mlflow.entities')"),
        ("megalm/parallel/a.py", "from megalm.engine.zero_engine import Engine"),
        ("megalm/checkpoint/a.py", "import deepspeed"),
        ("megalm/engine/a.py", "from launch import pretrain"),
        ("megalm/train/trainer.py", "if TYPE_CHECKING:\n    from megalm.engine import zero"),
        ("megalm/train/text_samples.py", "from megalm.engine.zero_engine import ZeroEngine"),
        ("megalm/train/a.py", "from megalm import cli"),
        ("megalm/huggingface/a.py", "from megalm.engine.build import build_engine"),
        ("megalm/huggingface/a.py", "import transformers"),
        ("megalm/inference/a.py", "from megalm.engine.interface import Engine"),
        ("megalm/train/a.py", "from megalm.inference.inference_model import InferenceModel"),
        ("megalm/train/a.py", "from megalm.huggingface.import_model import import_model"),
    ],
)
def test_breaches_are_found(path: str, source: str) -> None:
    breaches = broken_rules(source, Path(path))
    assert len(breaches) == 1
    assert breaches[0].startswith(f"{path}:{source.count(chr(10)) + 1}: ")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megalm/engine/a.py", "import deepspeed, torch.distributed"),
        ("megalm/tracking/mlflow_mirror/client.py", "import mlflow"),
        ("megalm/tracking/a.py", "from megalm.tracking.mlflow_mirror.client import MlflowStore"),
        ("megalm/model/a.py", "import torch\nfrom megalm.config.schema import ModelSection"),
        ("megalm/config/a.py", "import torchlike"),
        ("megalm/train/trainer.py", "from megalm.engine.interface import Engine"),
        ("megalm/train/setup.py", "from megalm.engine.zero_engine import ZeroEngine"),
        ("launch/a.py", "from megalm.cli import main"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert broken_rules(source, Path(path)) == []
