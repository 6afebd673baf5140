"""Who may import whom (CONTRIBUTING.md), read from the syntax trees: nothing is imported here.

Every import counts: at the top, inside functions, relative, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from collections import Counter
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


# The package from the ground up: a part imports those before it, never one behind it, so there is no circle of parts.
LAYERS = (
    "errors",
    "rank_environment",
    "topology",
    "utils",
    "cluster",
    "communicator",
    "config",
    "model",
    "data",
    "parallel",
    "checkpoint",
    "cost_model",
    "planning",
    "runs",
    "tracking",
    "sweeps",
    "engine",
    "nodes",
    "train",
    "rehearsal",
    "parity",
    "huggingface",
    "gguf",
    "inference",
    "cli",
)


def part_of(name: str) -> str | None:
    """`engine` of megalm.engine.build; None of what is outside the package, and of the package itself."""
    package, _, rest = name.partition(".")
    return rest.split(".")[0] if package == "megalm" and rest else None


def _imports_upwards(item: Import) -> bool:
    importer, imported = part_of(item.importer), part_of(item.imported)
    if importer not in LAYERS or imported not in LAYERS:
        return False
    return LAYERS.index(imported) > LAYERS.index(importer)


def _has_no_layer(item: Import) -> bool:
    return any(part not in (None, "__version__", *LAYERS) for part in map(part_of, (item.importer, item.imported)))


def reaches_beyond(place: str, *allowed: str) -> Callable[[Import], bool]:
    """Whether a part imports another part of the package than these."""
    return lambda item: (
        inside(item.importer, place) and inside(item.imported, "megalm") and not inside(item.imported, place, *allowed)
    )


def _training_sees_classes(item: Import) -> bool:
    return (
        inside(item.importer, "megalm.train")
        and not inside(item.importer, "megalm.train.setup")
        and inside(item.imported, "megalm.engine", "megalm.parallel")
        and not inside(item.imported, "megalm.engine.interface")
    )


DISTRIBUTED_PLACES = (
    "megalm.nodes",
    "megalm.parallel",
    "megalm.engine",
    "megalm.checkpoint",
    "megalm.testing",
    "megalm.rehearsal.stand_ins",
    "megalm.rehearsal.rehearsal",
)
DEEPSPEED_PLACES = ("megalm.engine", "launch", "megalm.rehearsal.stand_ins", "megalm.rehearsal.rehearsal_process")
DOORS = ("launch", "data_tools")
ENGINES = ("megalm.engine", "megalm.parallel")

RULES = (
    Rule("config imports no torch", never("megalm.config", "torch")),
    Rule("topology is pure integers: no torch", never("megalm.topology", "torch")),
    Rule("nothing imports a layer above its own", _imports_upwards),
    Rule("every part of the package has its layer", _has_no_layer),
    Rule("cost_model is pure integers: no torch", never("megalm.cost_model", "torch")),
    Rule("utils imports no torch", never("megalm.utils", "torch")),
    Rule("planning imports no torch: it runs on a login node", never("megalm.planning", "torch")),
    Rule("data imports no torch: it runs on a login node", never("megalm.data", "torch")),
    Rule("tracking imports no torch", never("megalm.tracking", "torch")),
    Rule("sweeps imports no torch: it runs on a login node", never("megalm.sweeps", "torch")),
    Rule("model imports config.schema alone", reaches_beyond("megalm.model", "megalm.config.schema", "megalm.errors")),
    Rule("model knows no group of ranks", never("megalm.model", "torch.distributed", "deepspeed")),
    Rule(
        "parallel imports model and topology alone",
        reaches_beyond("megalm.parallel", "megalm.model", "megalm.topology", "megalm.errors"),
    ),
    Rule("deepspeed is imported in engine, launch and for a rehearsal", only_in("deepspeed", *DEEPSPEED_PLACES)),
    Rule(
        "mlflow is imported in tracking/mlflow_mirror/client.py only",
        only_in("mlflow", "megalm.tracking.mlflow_mirror.client"),
    ),
    Rule(
        "tensorboard is an extra, imported in its sink only",
        only_in("tensorboard", "megalm.tracking.sinks.tensorboard_sink"),
    ),
    Rule("fsspec is imported in utils/remote_files.py only", only_in("fsspec", "megalm.utils.remote_files")),
    Rule("wandb is an extra, imported in its sink only", only_in("wandb", "megalm.tracking.sinks.wandb_sink")),
    Rule(
        "lm_eval is an extra, imported in inference/lm_eval_tasks.py only",
        only_in("lm_eval", "megalm.inference.lm_eval_tasks"),
    ),
    Rule("utils/file_lock.py owns the locks: filelock there only", only_in("filelock", "megalm.utils.file_lock")),
    Rule("utils/file_lock.py owns the locks: fcntl there only", only_in("fcntl", "megalm.utils.file_lock")),
    Rule(
        "torch.distributed: not just anywhere",
        only_in("torch.distributed", *DISTRIBUTED_PLACES),
    ),
    Rule("huggingface reads and writes files: it sees no engine", never("megalm.huggingface", *ENGINES)),
    Rule("inference is one process: no engine, no groups", never("megalm.inference", *ENGINES)),
    Rule("transformers is for tests: an export needs none", never("megalm", "transformers")),
    Rule("megalm never imports launch or data_tools", never("megalm", *DOORS)),
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
        ("megalm/config/a.py", "from megalm.planning.resolve import resolve"),
        ("megalm/tracking/a.py", "from megalm.train.setup import pretrain"),
        ("megalm/topology.py", "from megalm.utils.formatting import format_bytes"),
        ("megalm/attic/a.py", "from megalm.errors import ConfigError"),
        ("megalm/data/builder/a.py", "def f():\n    from torch import nn"),
        ("megalm/model/a.py", "from ..parallel import groups"),
        ("megalm/model/a.py", "import torch.distributed as dist"),
        ("megalm/model/__init__.py", "from .. import parallel"),
        ("megalm/train/a.py", "from torch import distributed"),
        ("megalm/train/a.py", "import torch\ntorch.distributed.barrier()"),
        ("megalm/train/a.py", "import deepspeed.comm"),
        ("megalm/utils/a.py", "import torch"),
        ("megalm/cluster/a.py", "from megalm.runs.run_folder import RunFolder"),
        ("megalm/utils/a.py", "from megalm.config.schema import RunConfig"),
        ("megalm/tracking/a.py", "import mlflow"),
        ("megalm/runs/a.py", "import fcntl"),
        ("data_tools/a.py", "from filelock import FileLock"),
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
    assert breaches
    assert all(line.startswith(f"{path}:{source.count(chr(10)) + 1}: ") for line in breaches)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megalm/engine/a.py", "import deepspeed, torch.distributed"),
        ("megalm/tracking/mlflow_mirror/client.py", "import mlflow"),
        ("megalm/tracking/a.py", "from megalm.tracking.mlflow_mirror.client import MlflowStore"),
        ("megalm/model/a.py", "import torch\nfrom megalm.config.schema import ModelSection"),
        ("megalm/config/a.py", "import torchlike"),
        ("megalm/utils/file_lock.py", "def f():\n    from filelock import lock_descriptor"),
        ("megalm/train/trainer.py", "from megalm.engine.interface import Engine"),
        ("megalm/train/setup.py", "from megalm.engine.zero_engine import ZeroEngine"),
        ("launch/a.py", "from megalm.cli import main"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert broken_rules(source, Path(path)) == []


def modules() -> list[Path]:
    return [path for path in sorted((ROOT / "megalm").rglob("*.py")) if path.name != "__init__.py"]


def test_no_file_name_stands_twice() -> None:
    places: dict[str, list[str]] = {}
    for path in modules():
        places.setdefault(path.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_no_room_is_a_hall() -> None:
    """A folder of more than fifteen modules gets rooms of its own."""
    rooms = Counter(str(path.parent.relative_to(ROOT)) for path in modules())
    assert not {room: count for room, count in rooms.items() if count > 15}
