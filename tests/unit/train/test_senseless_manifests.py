"""Manifests with a valid seal and senseless values: refused in a line at the door, or harmless to all who read them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.discovery import first_whole
from megalm.checkpoint.manifest import MANIFEST, Manifest, read_manifest, shape_of, write_manifest
from megalm.checkpoint.retention import Retention, prune, tidy
from megalm.cli.main import main
from megalm.communicator import SingleProcessCommunicator
from megalm.config.deepspeed.json_reader import DeviceFacts, read_deepspeed_json
from megalm.config.loading import load_run_config
from megalm.errors import CheckpointError
from megalm.planning.lr_schedule import ScheduleSegment, rate_at
from megalm.planning.resolve import ResolvedRun, resolve
from megalm.runs.run_folder import RunFolder
from megalm.train.resume.compatibility import (
    change_notes,
    first_sample_of,
    incompatibilities,
    lengths_of_order,
    progress_from,
    with_schedule,
)
from megalm.train.resume.resume_plan import _require_state, find_checkpoint
from tests.messages import assert_names

ROOT = Path(__file__).resolve().parents[3]
RUN = ROOT / "tests" / "fixtures" / "run-0.1.0" / "small"
NEWEST = "step-00000009"
CONTENT = json.loads((RUN / "checkpoints" / NEWEST / MANIFEST).read_text())
SENSELESS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 2**31, 2**63, 10**30, 10**400, "", "..", "../x", "1", "nan", "\ud800", "\x1b[2J", [], {}])
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.integers() | st.text(max_size=3), max_size=3)
    | st.dictionaries(st.text(max_size=3), st.integers() | st.none(), max_size=2)
)


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every key and list item, at every depth; of the tensors the first is enough."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, item) in enumerate(items):
        if path != ("tensors",) or number == 0:
            yield (*path, key)
            yield from places(item, (*path, key))


PLACES = [place for place in places(CONTENT) if place[0] not in ("format", "seal")]


def sealed(folder: Path, place: tuple[str | int, ...], value: Any) -> None:
    """Write the manifest with another value at a place, as somebody would who seals it again."""
    content = json.loads(json.dumps(CONTENT))
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    unchecked = Manifest.model_construct()
    unchecked._content = content
    write_manifest(folder, unchecked)


@pytest.fixture(scope="module")
def resolved() -> ResolvedRun:
    source = read_deepspeed_json(str(ROOT / "ds_configs" / "fp32.json"))
    return resolve(load_run_config(None, ["train.steps=40"]), source, 1, DeviceFacts("cpu", False, 1 << 33), 257)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "mine"
    shutil.copytree(RUN, folder)
    return folder / "checkpoints" / NEWEST


def use(folder: Path, run: ResolvedRun) -> None:
    """Do what commands and a resume do with a manifest, short of building a model.

    Raises:
        CheckpointError: it is refused.
    """
    checkpoints = folder.parent
    tidy(checkpoints)
    prune(checkpoints, Retention(1), dry_run=True)
    assert first_whole(checkpoints, "auto")[0] is not None
    manifest = read_manifest(folder)
    for command in (["list", str(checkpoints.parent)], ["show", str(folder)]):
        with pytest.raises(SystemExit) as left:
            main(["checkpoint", *command])
        assert left.value.code in (0, 2)
    _require_state(folder, manifest)
    CheckpointReader(folder).model()
    shape_of(folder, manifest)
    assert manifest.mark == "" or manifest.status != "good"
    if manifest.holds is not None:
        return
    for more in (None, 5):
        schedule = with_schedule(run, manifest, more)
    segments = tuple(ScheduleSegment.of(stored) for stored in manifest.schedule.segments)
    for step in (1, 2, manifest.step, manifest.step + 100):
        assert rate_at(segments, step) >= 0
        assert first_sample_of(manifest, run)(step) >= 0
    assert lengths_of_order(manifest)
    now = {"model": manifest.model, "data": manifest.data, "fingerprints": manifest.fingerprints.model_dump()}
    incompatibilities(manifest, now)
    for continuation in ("on", "anew", "recut"):
        position = progress_from(manifest, run, continuation)  # type: ignore[arg-type]
        position.schedule = schedule
        list(change_notes(position, manifest, run))
        position.data_json("a")


@given(place=st.sampled_from(PLACES), value=SENSELESS)
@example(place=("model", "style"), value=[])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_senseless_value_is_refused_or_harmless(
    folder: Path, resolved: ResolvedRun, place: tuple[str | int, ...], value: Any
) -> None:
    sealed(folder, place, value)
    with contextlib.suppress(CheckpointError):
        use(folder, resolved)


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("step",), 8, 8),
        (("tensors", "layers.0.mlp.up.weight", "shape"), [8, 32], "tensors.layers.0.mlp.up.weight"),
        (("tensors", "layers.0.mlp.up.weight", "fragments", 0, "stop"), 255, "tensors.layers.0.mlp.up.weight"),
        (("tokens",), "4608", "tokens"),
        (("counters", "optimizer_step"), 10, "counters"),
        (("counters", "loss_scaler"), {"cur_scale": 0.0}, "counters.loss_scaler.cur_scale"),
        (("data_position", "segments", 1, "global_batch"), 0, "data_position.segments.1.global_batch"),
        (("data_position", "segments", 1, "samples_consumed"), 2**50, "data_position"),
        (("schedule", "segments", 0, "first_step"), 2, "schedule"),
        (("schedule", "segments", 1, "offset_steps"), 5, "schedule"),
        (("schedule", "segments", 0, "steps"), 0, "schedule.segments.0.steps"),
        (("schedule", "stated", 0, "kind"), "zigzag", "schedule.stated.0.kind"),
        (("model", "num_hidden_layers"), 10**12, "num_hidden_layers"),
        (("model", "qk_norm"), 0, "qk_norm"),
        (("files", "rank-00000.safetensors", "bytes"), 16, "files.rank-00000.safetensors"),
    ],
    ids=str,
)
def test_it_is_named_and_passed_over(
    folder: Path, capsys: pytest.CaptureFixture[str], place: tuple[str | int, ...], value: Any, named: object
) -> None:
    sealed(folder, place, value)
    with pytest.raises(CheckpointError) as refused:
        read_manifest(folder)
    assert_names(refused.value, folder / MANIFEST, named, "--resume")
    run = RunFolder(folder.parent.parent)
    found = find_checkpoint(run, "auto", SingleProcessCommunicator(), require=_require_state)
    assert found is not None
    assert found.reader.manifest.step == 4
    (warning,) = found.warnings
    assert_names(warning, folder / MANIFEST, named)
    with pytest.raises(SystemExit):
        main(["checkpoint", "list", str(run.path)])
    rows = capsys.readouterr().out.splitlines()
    assert any(row.startswith("step-00000004") and "good" in row for row in rows)
    assert any(row.startswith(NEWEST) and "damaged" in row for row in rows)


def test_one_that_lacks_state_is_passed_over_too(folder: Path) -> None:
    sealed(folder, ("counters",), {})
    run = RunFolder(folder.parent.parent)
    found = find_checkpoint(run, "auto", SingleProcessCommunicator(), require=_require_state)
    assert found is not None
    assert found.reader.manifest.step == 4
    assert_names(found.warnings, "counters")
