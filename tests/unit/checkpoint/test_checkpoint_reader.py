"""A fragment of any layout is read from the fragments of any other, element by element the same."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalm.checkpoint.checkpoint_reader import CheckpointReader, chunks_of, overlap
from megalm.checkpoint.manifest import Manifest, write_manifest
from megalm.checkpoint.safetensors_file import write_shard
from megalm.checkpoint.shard_spec import Fragment, FragmentKey
from megalm.errors import CheckpointError
from tests.messages import assert_names


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))


@st.composite
def keys(draw: st.DrawFn, shape: tuple[int, ...]) -> FragmentKey:
    rectangle = None
    if draw(st.booleans()):
        firsts = [draw(st.integers(0, size - 1)) for size in shape]
        rectangle = tuple(
            (first, draw(st.integers(first + 1, size))) for first, size in zip(firsts, shape, strict=True)
        )
    count = math.prod(last - first for first, last in rectangle or [(0, size) for size in shape])
    start = draw(st.integers(0, count))
    return FragmentKey("x", "master", shape, start, draw(st.integers(start, count)), rectangle)


def elements(key: FragmentKey) -> npt.NDArray[np.int64]:
    """Number in the whole parameter of each element of a fragment: the definition, with an index for each element."""
    whole = np.arange(math.prod(key.shape)).reshape(key.shape)
    if key.rectangle is not None:
        whole = whole[tuple(slice(*rows) for rows in key.rectangle)]
    return whole.reshape(-1)[key.start : key.stop]


@given(st.data())
def test_boxes_are_the_fragment_in_its_order(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    key = data.draw(keys(shape))
    whole = torch.arange(math.prod(shape)).view(shape)
    parts = [whole[tuple(map(slice, box.first, box.last))].reshape(-1) for box in chunks_of(key)]
    found = torch.cat(parts) if parts else torch.empty(0)
    np.testing.assert_array_equal(found.numpy(), elements(key))
    assert len(parts) <= 2 * len(shape) - 1  # however large it is


@given(st.data())
def test_what_two_fragments_share_is_copied_and_nothing_else(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    stored, wanted = data.draw(keys(shape)), data.draw(keys(shape))
    values, result = torch.from_numpy(elements(stored)), torch.full((wanted.stop - wanted.start,), -1)
    for source in chunks_of(stored):
        for target in chunks_of(wanted):
            if (corners := overlap(source, target)) is not None:
                target.view(result, *corners).copy_(source.view(values, *corners))
    expected = elements(wanted)
    np.testing.assert_array_equal(result.numpy(), np.where(np.isin(expected, elements(stored)), expected, -1))


def saved(folder: Path, fragments: list[Fragment]) -> CheckpointReader:
    """A checkpoint of one parameter, of which each rank has written one fragment."""
    shards = [write_shard(folder / f"rank-{rank}", [fragment]) for rank, fragment in enumerate(fragments)]
    stored = [{"file": shard.file, **asdict(key)} for shard in shards for key in shard.keys]
    files = {shard.file: {"bytes": shard.bytes, "sha256": shard.sha256} for shard in shards}
    tensors = {"w": {"shape": fragments[0].key.shape, "fragments": stored}}
    unchecked = Manifest.model_construct()
    unchecked._content = {"step": 1, "files": files, "tensors": tensors}
    write_manifest(folder, unchecked)
    return CheckpointReader(folder)


def layouts() -> dict[str, list[FragmentKey]]:
    """A matrix [6, 4] as it lies on the ranks of some layouts."""
    shape = (6, 4)

    def key(start: int, stop: int, *rectangle: tuple[int, int]) -> FragmentKey:
        return FragmentKey("w", "master", shape, start, stop, rectangle or None)

    return {
        "one rank": [key(0, 24)],
        "data 3": [key(0, 7), key(7, 14), key(14, 24)],
        "columns 2": [key(0, 12, (0, 3), (0, 4)), key(0, 12, (3, 6), (0, 4))],
        "rows 2, data 2": [
            part for rows in ((0, 2), (2, 4)) for part in (key(0, 7, (0, 6), rows), key(7, 12, (0, 6), rows))
        ],
        "vocabulary 4": [key(0, (b - a) * 4, (a, b), (0, 4)) for a, b in ((0, 2), (2, 4), (4, 5), (5, 6))],
    }


@pytest.mark.parametrize("written", list(layouts()))
def test_every_layout_reads_every_other(tmp_path: Path, written: str) -> None:
    whole = torch.randn(6, 4)

    def tensor(key: FragmentKey) -> torch.Tensor:
        return whole.view(-1)[torch.from_numpy(elements(key))]

    reader = saved(tmp_path, [Fragment(key, tensor(key)) for key in layouts()[written]])
    for keys_ in layouts().values():
        for key in keys_:
            assert torch.equal(reader.read(key), tensor(key)), key
    assert torch.equal(reader.model()["w"], whole)


def test_holes_are_reported(tmp_path: Path) -> None:
    first, second = layouts()["columns 2"]
    with pytest.raises(CheckpointError) as error:
        saved(tmp_path, [Fragment(first, torch.zeros(12))])
    assert_names(error.value, tmp_path, "tensors.w", "master", 12, 24)
    reader = saved(tmp_path, [Fragment(first, torch.zeros(12)), Fragment(first, torch.zeros(12))])
    for key, found, wanted in ((FragmentKey("w", "master", (6, 4), 14, 16), 0, 2), (second, 0, 12)):
        with pytest.raises(CheckpointError) as error:
            reader.read(key)
        assert_names(error.value, tmp_path, "master/w", found, wanted)


@pytest.mark.parametrize("rectangle", [((0, 7), (0, 4)), ((2, 2), (0, 4)), ((0, 3),), ((0, 3), (0, 1))])
def test_parts_outside_of_the_parameter_are_refused(tmp_path: Path, rectangle: tuple[tuple[int, int], ...]) -> None:
    key = replace(layouts()["columns 2"][0], rectangle=rectangle)
    with pytest.raises(CheckpointError) as error:
        saved(tmp_path, [Fragment(key, torch.zeros(12))])
    assert_names(
        error.value, tmp_path, "tensors.w", "--resume"
    )  # values that are only missing name no other checkpoint
