"""What is written: files that the safetensors library reads, copies that do not follow training, room for them."""

from __future__ import annotations

import hashlib
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.checkpointer import CheckpointWriter, HostStaging
from megalm.checkpoint.diff import different_facts, different_shapes, largest_differences
from megalm.checkpoint.discovery import step_folders
from megalm.checkpoint.manifest import read_manifest, set_status, write_manifest
from megalm.checkpoint.retention import Retention
from megalm.checkpoint.safetensors_file import TensorEntry, write_shard, write_tensors
from megalm.checkpoint.save_transaction import bytes_needed, save_checkpoint
from megalm.checkpoint.shard_spec import Fragment, FragmentKey
from megalm.communicator import SingleProcessCommunicator
from megalm.errors import CheckpointError, TrainingError
from megalm.utils.formatting import format_bytes
from tests.checkpoint_files import SHAPES, assert_holds, fragments, save, whole
from tests.messages import assert_names


def test_a_shard_is_a_safetensors_file_and_its_hash_is_the_files(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.safetensors"
    key = FragmentKey("odd", "master", (3, 2), 1, 4)
    source = torch.arange(12.0).view(3, 4)[:, ::2]  # no piece of memory of its own
    parts = [*fragments(3), Fragment(key, source.reshape(-1)[1:4])]
    summary = write_shard(path, parts)
    assert (summary.bytes, summary.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    tensors = load_file(path)
    assert tensors["master/odd"].tolist() == [2.0, 4.0, 6.0]
    for name, shape in SHAPES.items():
        assert tensors[f"exp_avg/{name}"].shape == shape
        torch.testing.assert_close(tensors[f"exp_avg/{name}"].view(-1), whole(3, name, "exp_avg"), rtol=0, atol=0)


def test_no_more_than_two_batches_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is asked for when the one before the last has been hashed and written."""
    monkeypatch.setattr("megalm.checkpoint.safetensors_file._HASH_BATCH_BYTES", 4000)  # one tensor
    alive: list[int] = []
    seen = []

    def tensors() -> Any:
        for number in range(6):
            tensor = torch.full((1000,), float(number))
            alive.append(number)
            weakref.finalize(tensor.untyped_storage(), alive.remove, number)
            seen.append(len(alive))
            yield tensor
            del tensor

    with (tmp_path / "file").open("wb") as file:
        write_tensors(file, [TensorEntry(str(number), (1000,)) for number in range(6)], tensors())
    assert max(seen) <= 3  # one in the writer's hand, one being hashed, one just made


def test_bf16_and_no_elements(tmp_path: Path) -> None:
    entries = [TensorEntry("none", (0, 4)), TensorEntry("half", (2, 2), torch.bfloat16), TensorEntry("one", ())]
    values = torch.tensor([[1.0, 2.0], [3.001, -4.0]])
    with (tmp_path / "file").open("wb") as file:
        write_tensors(file, entries, iter([torch.zeros(0), values, torch.tensor(5.0)]))
    tensors = load_file(tmp_path / "file")
    assert tensors["none"].shape == (0, 4)
    torch.testing.assert_close(tensors["half"], values.bfloat16(), rtol=0, atol=0)
    assert tensors["one"].item() == 5.0


def test_copies_stay_what_they_were_and_their_memory_is_used_again() -> None:
    live = fragments(1)
    host = HostStaging()
    held = host.take(live)
    for fragment in live:
        fragment.tensor.add_(1.0)
    for fragment in held:
        expected = whole(1, fragment.key.name, fragment.key.kind)
        torch.testing.assert_close(fragment.tensor, expected, rtol=0, atol=0)
    again = host.take(live)
    assert [copy.tensor.data_ptr() for copy in again] == [copy.tensor.data_ptr() for copy in held]
    torch.testing.assert_close(again[0].tensor, live[0].tensor, rtol=0, atol=0)


def test_as_much_memory_is_locked_as_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's pinned allocator would round up to a power of two. The CUDA runtime is made up here."""
    locked: list[tuple[int, int]] = []

    def register(place: int, size: int, flags: int) -> int:
        locked.append((place, size))
        return 0

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    live = fragments(1)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        host = HostStaging()
        held = host.take(live)
        host.take(live)
    assert locked == [(held[0].tensor.data_ptr(), sum(4 * fragment.key.count for fragment in live))]


def on_disk(fragment: Fragment, reads: list[FragmentKey]) -> Fragment:
    """A fragment that is read when its tensor is asked for."""

    def read() -> torch.Tensor:
        reads.append(fragment.key)
        return fragment.tensor.clone()

    return Fragment(fragment.key, read)


def test_what_lies_on_a_disk_is_read_once() -> None:
    reads: list[FragmentKey] = []
    live = fragments(1)
    copies = HostStaging().take([live[0], *(on_disk(fragment, reads) for fragment in live[1:])])
    assert reads == [fragment.key for fragment in live[1:]]
    for copy, fragment in zip(copies, live, strict=True):
        torch.testing.assert_close(copy.tensor.view(-1), fragment.tensor.view(-1), rtol=0, atol=0)


def test_a_disk_too_full_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = bytes_needed(fragments(1))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(TrainingError) as error:
        save(tmp_path, 5)
    assert_names(error.value, "step-00000005", tmp_path, format_bytes(needed))
    assert_names(error.value, "megalm checkpoint prune", "checkpoint.keep_last")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=needed))
    path = save(tmp_path, 5)
    assert sum(file.stat().st_size for file in path.iterdir()) <= needed


def test_a_failure_after_the_checkpoint_is_in_place_says_so(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(TrainingError) as error:
        save(tmp_path, 5)
    assert_names(error.value, "step-00000005", "latest", "--resume auto")
    assert_holds(tmp_path / "step-00000005", 5)


def test_room_is_made_by_what_need_not_be_kept_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """keep_last was lowered since these were written: two go before the save, the promised two stay."""
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    usage = shutil.disk_usage(tmp_path)
    needed = bytes_needed(fragments(1))

    def disk(_: object) -> Any:
        return usage._replace(free=0 if (tmp_path / "step-00000002").exists() else needed)

    monkeypatch.setattr("shutil.disk_usage", disk)
    writer = CheckpointWriter(tmp_path, Retention(2), SingleProcessCommunicator(), asynchronous=False)
    writer.begin(5, fragments(5), {"attempt": 1}, [])
    (saved,) = writer.completed()
    assert saved.pruned == ("step-00000001", "step-00000002", "step-00000003")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(TrainingError, match="megalm checkpoint prune"):
        writer.begin(6, fragments(6), {"attempt": 1}, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000004", "step-00000005"]


def test_what_a_run_stands_on_is_no_room_to_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set back to step 1, until step 2 is saved anew: killed before that, it has nothing else to go on from."""
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=0))
    writer = CheckpointWriter(
        tmp_path, Retention(2), SingleProcessCommunicator(), asynchronous=False, origin=tmp_path / "step-00000001"
    )
    with pytest.raises(TrainingError, match="megalm checkpoint prune"):
        writer.begin(2, fragments(5), {"attempt": 2}, [])
    names = [path.name for path in step_folders(tmp_path)]
    assert names == ["step-00000001", "step-00000003", "step-00000004"]
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    writer.begin(2, fragments(5), {"attempt": 2}, [])
    assert [path.name for path in step_folders(tmp_path)] == ["step-00000002", "step-00000004"]


def test_a_status_is_kept_with_its_reason(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    before = read_manifest(path)
    set_status(path, "bad", "loss of 9")
    assert read_manifest(path).content == {**before.content, "status": "bad", "status_reason": "loss of 9"}
    assert_holds(path, 5)


def test_two_checkpoints_are_compared(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 1, tokens=7), save(tmp_path / "b", 3, data={"order": "x"})
    readers = CheckpointReader(first), CheckpointReader(second)
    facts = different_facts(readers[0].manifest.content, readers[1].manifest.content)
    assert set(facts) == {("step", "1", "3"), ("tokens", "7", "30"), ("data.order", "-", "x")}
    assert different_shapes(*readers) == []
    differences = largest_differences(*readers)
    assert list(differences) == ["embedding", "layers.0", "norm"]
    assert set(differences["layers.0"].values()) == {200.0}
    assert set(largest_differences(readers[0], readers[0])["norm"].values()) == {0.0}


def test_of_two_optimizers_what_both_keep_is_compared(tmp_path: Path) -> None:
    """A matrix of Muon has a momentum buffer where Adam has two moments; a norm has Adam's in both."""
    readers = []
    for folder in ("adam", "muon"):
        kept = [part for part in fragments(1) if folder == "adam" or part.key.name != "layers.0.up"]
        if folder == "muon":
            for kind in ("master", "momentum_buffer"):
                kept.append(Fragment(FragmentKey("layers.0.up", kind, (5, 3), 0, 15), torch.ones(15)))
        path = save_checkpoint(tmp_path / folder, 1, kept, {"attempt": 1}, [], SingleProcessCommunicator())
        readers.append(CheckpointReader(path))
    assert readers[1].kinds("layers.0.up") == ("master", "momentum_buffer")
    assert readers[1].kinds("norm.weight") == ("master", "exp_avg", "exp_avg_sq")
    differences = largest_differences(*readers)
    assert differences["norm"] == {"master": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
    assert differences["layers.0"] == {"master": 112.0 + 1.0}
    with pytest.raises(CheckpointError) as refused:
        readers[1].read_parameter("layers.0.up", (5, 3), "exp_avg")
    assert_names(refused.value, "exp_avg/layers.0.up", 0, 15)


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 1), save(tmp_path / "b", 1)
    tensors = json.loads((second / "manifest.json").read_text())["tensors"]
    tensors["norm.weight"]["shape"] = [5, 1]
    tensors["new"] = {"shape": [2], "fragments": []}
    write_manifest(second, read_manifest(second).amended(tensors=tensors))
    readers = CheckpointReader(first), CheckpointReader(second)
    assert different_shapes(*readers) == [("norm.weight", "[5]", "[5, 1]"), ("new", "-", "[2]")]
    assert list(largest_differences(*readers)) == ["embedding", "layers.0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_converted_to_one_file(tmp_path: Path, dtype: torch.dtype) -> None:
    target = tmp_path / "weights.safetensors"
    written = CheckpointReader(save(tmp_path / "run", 7)).write_weights(target, dtype)
    assert written == target.stat().st_size
    with safe_open(target, framework="pt") as file:
        assert set(file.keys()) == set(SHAPES)
        for name, shape in SHAPES.items():
            expected = whole(7, name, "master").view(shape).to(dtype)
            torch.testing.assert_close(file.get_tensor(name), expected, rtol=0, atol=0)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 7)
    tensors = json.loads((path / "manifest.json").read_text())["tensors"]
    tensors["norm.weight"]["fragments"].clear()
    write_manifest(path, read_manifest(path).amended(tensors=tensors))
    reader = CheckpointReader(path)
    with pytest.raises(CheckpointError) as error:
        reader.write_weights(tmp_path / "weights.safetensors", torch.float32)
    assert_names(error.value, path, "master/norm.weight", 0, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_closed_reader_holds_no_file(tmp_path: Path) -> None:
    """What is pruned later must give its room back, though the run went on from it."""
    path = save(tmp_path, 5)
    reader = CheckpointReader(path)
    reader.model()
    assert str(path) in Path("/proc/self/maps").read_text()
    reader.close()
    assert str(path) not in Path("/proc/self/maps").read_text()
    reader.model()  # it opens them again
