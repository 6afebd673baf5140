"""From configuration to samples through the run's own code: overlap, blends, stages, repetition, what differs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.checkpoint.manifest import Manifest
from megalm.config.deepspeed.json_reader import DS_CONFIGS_FOLDER, DeviceFacts, read_deepspeed_json
from megalm.config.loading import SAVED_CONFIG, config_to_yaml, load_run_config
from megalm.data.builder.build_plan import BuildOptions
from megalm.data.builder.builder import build_files
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.trained_tokens import trained_path
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.sampling.batch_loader import BatchLoader
from megalm.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from megalm.errors import ConfigError, DataError
from megalm.model.model_config import build_model_config
from megalm.planning.resolve import ResolvedRun, resolve
from megalm.planning.run_plan import make_plan
from megalm.train import datasets as run_datasets
from megalm.train.datasets import (
    RunData,
    batch_layout,
    find_data,
    open_data,
    rebuild_data,
    validation_loaders,
)
from megalm.train.resume.compatibility import DataIdentity, identity_of, incompatibilities
from megalm.train.run_summary import data_rows, data_warnings, planned_data
from tests.messages import assert_names
from tests.unit.data.test_build_files import ENDS, chat_json

BATCH = 16  # of the shipped JSONs


@pytest.fixture
def web(tmp_path: Path) -> str:
    return write(tmp_path / "web", [40] * 60)


@pytest.fixture
def code(tmp_path: Path) -> str:
    return write(tmp_path / "code", [25, 35] * 20)


def write(prefix: Path, lengths: Sequence[int]) -> str:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.append_documents(np.arange(sum(lengths)) % 257, list(lengths))
    return str(prefix)


def resolved(*overrides: str, folder: Path | None = None) -> ResolvedRun:
    words = {"data.tokenizer": "bytes", "data.sequence_length": "8", "train.steps": "20"}
    words |= {"data.cache": str(folder)} if folder else {}
    words |= dict(word.split("=", 1) for word in overrides)
    if not {"data.split", "data.validation"} & set(words):
        words["data.split"] = "null"  # the preset has one
    stated = [f"{key}={value}" for key, value in words.items()]
    ds = read_deepspeed_json(str(DS_CONFIGS_FOLDER / "fp32.json"))
    return resolve(load_run_config(None, stated), ds, 1, DeviceFacts("cpu", False, 4 << 30), 257)


def opened(*overrides: str) -> tuple[ResolvedRun, RunData]:
    run = resolved(*overrides)
    return run, open_data(run, find_data(run.config.data, lambda line: None))


def mixed(web: str, code: str) -> str:
    return f"data.train=[{{prefix: {web}, weight: 3}}, {{prefix: {code}, weight: 1}}]"


def tokens_of(data: RunData, first: int, end: int) -> list[tuple[str, int]]:
    """(dataset, position) of every token that is an input in samples [first, end)."""
    found = []
    for index in range(first, end):
        number, own = data.train.locate(index)
        part = data.train.parts[number]
        found += [(part.dataset.prefix, int(place)) for place in part.place(own).positions[:-1]]
    return found


def write_tokens(prefix: Path, documents: Sequence[Sequence[int]]) -> str:
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for document in documents:
            writer.append(document)
    return str(prefix)


@pytest.mark.parametrize("wrong", [257, 70_000, -1, -100])
def test_a_token_outside_the_vocabulary_is_refused_at_the_start(tmp_path: Path, wrong: int) -> None:
    prefix = write_tokens(tmp_path / "foreign", [[1] * 40, [2] * 11 + [wrong], [3] * 40])
    run = resolved(f"data.train={prefix}")
    for open_it in (lambda: open_data(run, find_data(run.config.data, print)), lambda: planned_data(run)):
        with pytest.raises(DataError) as error:
            open_it()
        assert_names(error.value, f"{prefix}.bin", 1, wrong, 51, 257)


def test_a_token_outside_the_vocabulary_between_the_probes_is_refused_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_datasets, "SCANNED_TOKENS", 8)
    monkeypatch.setattr(run_datasets, "PROBE_TOKENS", 4)
    prefix = write_tokens(tmp_path / "foreign", [[1] * 60, [2] * 30 + [300] * 2 + [2] * 30])
    run, data = opened(f"data.train={prefix}", f"data.validation={prefix}", "data.allow_validation_on_training=true")
    with BatchLoader(data.train, batch_layout(run, 0)) as loader, pytest.raises(DataError) as error:
        list(map(loader.batch, range(0, 64, BATCH)))
    assert_names(error.value, f"{prefix}.bin", 1, 300, 257)
    with pytest.raises(DataError) as error:
        list(validation_loaders(run, data, 0)["validation"][1])
    assert_names(error.value, f"{prefix}.bin", 1, 300, 257)


@pytest.mark.parametrize(
    ("append_eod", "ends", "refused"),
    [
        (True, [256, 256, 256], False),
        (True, [256, 7, 256], True),
        (False, [7, 7, 256], False),
        (False, [256, 256, 256], True),
    ],
)
def test_the_ends_of_foreign_documents_are_looked_at(
    tmp_path: Path, append_eod: bool, ends: list[int], refused: bool
) -> None:
    prefix = write_tokens(tmp_path / "foreign", [[], *([1] * 20 + [end] for end in ends), []])
    words = [f"data.train={prefix}", f"data.append_eod={str(append_eod).lower()}"]
    if not refused:
        opened(*words)
        return
    with pytest.raises(DataError) as error:
        opened(*words)
    assert_names(error.value, f"{prefix}.bin", 3, ends.count(256), 256, words[1])


def test_a_vocabulary_is_padded_to_a_multiple(web: str) -> None:
    data = f"data.train={web}"
    sizes = [
        make_plan(resolved(data, *words), 257).shape.vocab_size
        for words in ((), ("model.vocab_multiple=1",), ("model.vocab_multiple=128",), ("model.vocab_size=300",))
    ]
    assert sizes == [257, 257, 384, 300]


@pytest.mark.parametrize("copied", [False, True])
def test_validation_on_training_data_is_refused_unless_meant(web: str, code: str, tmp_path: Path, copied: bool) -> None:
    same = write(tmp_path / "copy", [40] * 60) if copied else str(tmp_path / "x" / ".." / "web")
    (tmp_path / "x").mkdir()
    words = [mixed(web, code), f"data.validation={{good: {write(tmp_path / 'other', [9] * 9)}, bad: {same}}}"]
    with pytest.raises(ConfigError) as error:
        opened(*words)
    assert_names(error.value, "data.validation", "bad", web, "data.allow_validation_on_training=true")
    run, data = opened(*words, "data.allow_validation_on_training=true")
    (warning,) = data_warnings(run, data)
    assert_names(warning, "bad", web)
    kept = replace(run, config=resolved(*words).config, sources=dict.fromkeys(run.sources, SAVED_CONFIG))
    assert len(data_warnings(kept, open_data(kept, data.places))) == 1  # a run that began so resumes


def test_a_weight_of_zero_leaves_a_dataset_out(web: str, code: str) -> None:
    without = f"data.train=[{{prefix: {web}, weight: 2}}, {{prefix: {code}, weight: 0}}]"
    run, data = opened(without, f"data.validation={code}")
    assert [usage.samples for usage in data.train.consumed(64)] == [64, 0]
    assert [data.train.locate(index) for index in range(64)] == [(0, index) for index in range(64)]
    assert data_warnings(run, data) == []
    (_, of_first), (_, of_second) = data_rows(run, data)
    assert_names(of_first, web, "100.0%")
    assert_names(of_second, code, "0.0%")
    later = f"data.stages=[{{from_step: 2, blend: [{{prefix: {code}, weight: 1}}]}}]"
    assert [opened(without, later)[1].train.locate(index)[0] for index in (BATCH - 1, BATCH)] == [0, 1]
    with pytest.raises(ConfigError) as error:
        opened(without.replace("weight: 2", "weight: 0"))
    assert_names(error.value, 0.0, 2)


def test_the_index_of_a_large_dataset_is_checked_once(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megalm.train.datasets.KEPT_CHECKS_FROM", 2)
    checked, verify = [], IndexedDataset.verify
    monkeypatch.setattr(IndexedDataset, "verify", lambda dataset: checked.append(dataset.prefix) or verify(dataset))
    words = f"data.train={web}", f"data.cache={tmp_path / 'cache'}"
    opened(*words)
    opened(*words)
    assert checked == [web]
    index = Path(f"{web}.idx")
    content = bytearray(index.read_bytes())
    content[34:38] = (39).to_bytes(4, "little")
    index.write_bytes(content)
    for _ in range(2):
        with pytest.raises(DataError) as error:
            opened(*words)
        assert_names(error.value, index, 1)


def test_a_shard_with_near_copies_in_it_is_reported(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{number} " * 100}) for number in range(40)]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    options = BuildOptions(dedup="minhash", shard=(0, 2))
    build_files([tmp_path / "some.jsonl"], ByteTokenizer(), tmp_path / "shard", options)
    (warning,) = data_warnings(*opened(f"data.train={tmp_path / 'shard'}", "train.steps=1"))
    assert_names(warning, tmp_path / "shard", "data_tools/merge_datasets.py --dedup minhash")


def test_a_stride_reaches_the_samples_and_is_reported_loudly(tmp_path: Path) -> None:
    prefix = write(tmp_path / "known", [199_386])
    where = [f"data.train={prefix}", "data.sequence_length=1024", "train.steps=10"]
    run, data = opened(*where, "data.stride=1")
    assert data.train.parts[0].samples_per_epoch == 199_386
    (warning,) = data_warnings(run, data)
    assert_names(warning, prefix, "data.stride=1", "data.sequence_length=1024", "1,018.7", "198,362", 194)
    # Samples start at neighbouring tokens.
    starts = sorted(int(data.train.parts[0].place(index).positions[0]) for index in range(4_000))
    assert min(np.diff(starts)) == 1
    plain = opened(*where)
    assert data_warnings(*plain) == []
    assert len({plain[1].train.order_fingerprint(1), data.train.order_fingerprint(1)}) == 2
    same = opened(*where, "data.stride=1024")[1].train.order_fingerprint(1)
    assert same == plain[1].train.order_fingerprint(1)


def test_packing_reaches_all_samples_and_tells_its_padding(web: str, tmp_path: Path) -> None:
    train, packing = f"data.train={write(tmp_path / 'own', [7] * 600)}", "data.packing=best_fit"
    run, data = opened(train, packing, "data.split=9,1")
    assert run.config.data.masks_documents
    assert (data.train.document_mask, data.train.parts[0].packing) == (True, "best_fit")
    assert {samples.packing for samples in data.validation.values()} == {"best_fit"}
    ((_, told),) = data_rows(run, data)
    assert_names(told, 540, "25.00%")
    assert planned_data(run)[0] == [("data", told)]
    off = resolved(train, packing, "data.document_mask=false")
    assert (off.config.data.masks_documents, resolved(train).config.data.masks_documents) == (False, False)
    for prefix, marked in ((web, True), (write(tmp_path / "plain", [40] * 60), False)):
        if marked:
            trained_path(prefix).write_bytes(b"\x0f" * 300)
        suggested = [
            data_warnings(*opened(f"data.train={prefix}", words)) for words in ("data.order=prefix_stable", packing)
        ]
        assert [len(warnings) for warnings in suggested] == [marked, 0]
        if marked:
            assert_names(suggested[0][0], web, "data.packing=stream", packing)


def test_packing_is_part_of_what_a_checkpoint_knows(web: str) -> None:
    def facts(*words: str) -> dict[str, dict[str, Any]]:
        run, data = opened(f"data.train={web}", *words)
        shape = build_model_config(run.config.model, 257, 8)
        return {**identity_of(run, shape, DataIdentity(data.train, "t"), 100), "model": {}}

    before = facts()
    del before["data"]["data.packing"]  # as earlier releases
    then = Manifest.from_json({**before, "step": 5, "files": {}, "tensors": {}})
    assert incompatibilities(then, facts()) == {}
    (found,) = incompatibilities(then, facts("data.packing=best_fit")).items()
    assert found[0] == "order"
    assert_names(" ".join(found[1]), "data.packing", "stream", "best_fit", "data.document_mask")


@pytest.mark.parametrize("blended", [False, True])
def test_an_extended_run_never_repeats_what_it_has_consumed(web: str, code: str, blended: bool) -> None:
    """2,400 and 1,200 tokens: 20 steps of 16 samples of 8 tokens are one epoch of neither."""
    train = mixed(web, code) if blended else f"data.train={web}"
    (_, short), (run, longer) = opened(train, "train.steps=9"), opened(train, "train.steps=18")
    half, end = 9 * BATCH, 18 * BATCH
    assert tokens_of(longer, 0, half) == tokens_of(short, 0, half)
    seen = tokens_of(longer, 0, end)
    assert len(set(seen)) == len(seen) == 18 * BATCH * 8
    identities = [DataIdentity(data.train, "t").at(half) for data in (short, longer)]
    assert identities[0] == identities[1]
    assert run.config.train.steps == 18


def test_weights_are_the_shares(web: str, code: str) -> None:
    run, data = opened(mixed(web, code))
    first, second = data.train.consumed(20 * BATCH)
    assert (first.prefix, first.samples, second.samples) == (web, 240, 80)
    (_, of_first), (_, of_second) = data_rows(run, data)
    assert_names(of_first, web, "75.0%", "0.80", "2,400")
    assert_names(of_second, code, "25.0%", "0.53", "1,200")
    assert data_warnings(run, data) == []


def test_a_stage_begins_with_its_step_and_may_be_added_later(web: str, code: str) -> None:
    train, later = f"data.train={web}", f"[{{from_step: 11, blend: [{{prefix: {code}, weight: 1}}]}}]"
    (_, plain), (run, staged) = opened(train), opened(train, f"data.stages={later}")
    chosen = [staged.train.locate(index)[0] for index in range(20 * BATCH)]
    assert chosen == [0] * (10 * BATCH) + [1] * (10 * BATCH)
    before, after = 10 * BATCH, 10 * BATCH + 1
    identities = {
        samples: [DataIdentity(data.train, "t").at(samples) for data in (plain, staged)] for samples in (before, after)
    }
    assert identities[before][0] == identities[before][1]
    assert identities[after][0]["order"] != identities[after][1]["order"]
    assert identities[after][0]["dataset"] != identities[after][1]["dataset"]
    *_, (_, of_first), (_, of_second) = data_rows(run, staged)
    assert_names(of_first, 1, web, "100.0%")
    assert_names(of_second, 11, code, "100.0%")
    again = resolved(train, f"data.stages={later}")
    assert config_to_yaml(again.config) == config_to_yaml(run.config)


def test_stages_begin_where_the_step_began_if_the_batch_has_changed(web: str, code: str) -> None:
    run = resolved(f"data.train={web}", f"data.stages=[{{from_step: 11, blend: [{{prefix: {code}, weight: 1}}]}}]")
    places = find_data(run.config.data, lambda line: None)
    data = open_data(run, places, first_sample_of=lambda step: 100 + 4 * step)
    assert [data.train.locate(index)[0] for index in (143, 144)] == [0, 1]


def test_an_order_that_begins_late_starts_with_the_stage_of_then(web: str, code: str) -> None:
    stages = ", ".join(
        f"{{from_step: {step}, blend: [{{prefix: {prefix}, weight: 1}}]}}" for step, prefix in ((5, code), (9, web))
    )
    run = resolved(f"data.train={web}", f"data.stages=[{stages}]")
    places = find_data(run.config.data, lambda line: None)
    data = open_data(run, places, first_sample_of=lambda step: (step - 7) * 16)
    assert [stage.first for stage in data.train.stages] == [0, 32]
    assert [data.train.locate(index)[0] for index in (0, 31, 32)] == [1, 1, 0]


def test_a_changed_mixture_is_named_in_words(tmp_path: Path, web: str, code: str) -> None:
    third = write(tmp_path / "third", [30] * 40)
    other_weights = f"data.train=[{{prefix: {web}, weight: 1}}, {{prefix: {code}, weight: 1}}]"

    def facts(words: str) -> dict[str, dict[str, Any]]:
        samples = opened(words)[1].train
        mixture = {"data.mixture": samples.mixture(100)}
        return {"model": {}, "data": mixture, "fingerprints": DataIdentity(samples, "t").at(100)}

    then = Manifest.from_json({**facts(mixed(web, code)), "step": 5, "files": {}, "tensors": {}})
    assert incompatibilities(then, facts(mixed(web, code))) == {}
    before = (f"{web} 75.0%", f"{code} 25.0%")
    for now, thing, after in (
        (other_weights, "order", (f"{web} 50.0%", f"{code} 50.0%")),
        (mixed(web, third), "dataset", (f"{web} 75.0%", f"{third} 25.0%")),
        (f"data.train={web}", "dataset", ("data.stages",)),
    ):
        (found,) = incompatibilities(then, facts(now)).items()
        assert found[0] == thing
        assert_names(found[1][-1], *before, *after)


def test_repetition_is_warned_of_and_refused(web: str, code: str) -> None:
    run, data = opened(mixed(web, code), "train.steps=200")
    warnings = data_warnings(run, data)
    assert_names(warnings[0], web, 200, "2,400", "8.0", 4)
    assert_names(warnings[1], code, 200, "1,200", "5.3")
    run, data = opened(mixed(web, code), "train.steps=200", "data.max_epochs=7")
    for refuse in (lambda: data_warnings(run, data), lambda: planned_data(run)):
        with pytest.raises(ConfigError) as refused:
            refuse()
        assert_names(refused.value, 200, web, "8.0", "data.max_epochs=7")


def test_validation_sets_by_name_and_by_split(web: str, code: str) -> None:
    named = f"data.validation={{prose: {web}, programs: {code}}}"
    meant = "data.allow_validation_on_training=true"
    assert list(opened(f"data.train={web}", named, meant)[1].validation) == ["prose", "programs"]
    assert list(opened(f"data.train={web}", f"data.validation={code}")[1].validation) == ["validation"]
    assert list(opened(f"data.train={web}", "data.split=9,1")[1].validation) == ["validation"]
    run, data = opened(mixed(web, code), "data.split=9,1")
    assert list(data.validation) == ["web", "code"]
    assert [samples.document_range for samples in data.validation.values()] == [(54, 60), (36, 40)]
    assert [part.document_range for part in data.train.parts] == [(0, 54), (0, 36)]
    part, whole = validation_loaders(run, data, 0)["web"]
    assert part is whole
    assert opened(f"data.train={web}", "data.split=1,0")[1].validation == {}
    prints = [
        opened(*words)[1].validation_fingerprint
        for words in (
            (f"data.train={web}", "data.split=9,1"),
            (f"data.train={web}", "data.split=9,1", "train.steps=40"),
            (f"data.train={web}", "data.split=8,2"),
            (f"data.train={web}", "data.split=9,1", "evaluate.max_samples=2"),
            (f"data.train={web}", "data.split=1,0"),
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4
    assert prints[-1] == ""


def test_large_orders_are_kept_and_small_ones_are_not(tmp_path: Path, web: str) -> None:
    large = write(tmp_path / "large", [9] * 100_000)
    for prefix, kept in ((web, False), (large, True)):
        run = resolved(f"data.train={prefix}", folder=tmp_path / "cache")
        data = open_data(run, find_data(run.config.data, lambda line: None))
        first = data.train.sample(0)[0].tolist()
        assert (tmp_path / "cache" / "orders").exists() == kept
    again = open_data(run, find_data(run.config.data, lambda line: None))
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")}
    assert again.train.sample(0)[0].tolist() == first
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_a_run_refuses_or_rebuilds_what_differs(tmp_path: Path) -> None:
    text = tmp_path / "raw.txt"
    text.write_text("a text " * 100)
    prefix = str(tmp_path / "my")
    build_files([text], ByteTokenizer(), prefix)
    stated = [f"data.train={prefix}", "data.append_eod=false"]
    with pytest.raises(DataError) as refused:
        opened(*stated)
    assert_names(refused.value, prefix, "data.rebuild=auto", "--no-append-eod")
    run, said = resolved(*stated, "data.rebuild=auto", f"data.input={text}"), list[str]()
    rows, _ = planned_data(run)
    assert_names(rows[0][1], prefix, "data.rebuild=auto")
    for _ in range(2):
        places = find_data(run.config.data, said.append)
        rebuild_data(run.config.data, places, 1, said.append)
    assert len(said) == 2, "once, with a word before and a word after"
    for line in said:
        assert_names(line, prefix)
    assert len(IndexedDataset(prefix).tokens) == len(text.read_bytes())
    open_data(run, places)
    (tmp_path / "raw2.txt").write_text("another text")
    with pytest.raises(DataError) as refused:
        opened(stated[0], stated[1], f"data.input={tmp_path}/raw2.txt")
    assert_names(refused.value, prefix, f"{tmp_path}/raw2.txt")


def test_a_dataset_that_is_not_there_is_built_of_its_input(tmp_path: Path) -> None:
    (tmp_path / "raw.txt").write_text("a text " * 100)
    stated = [f"data.train={tmp_path}/new", f"data.input={tmp_path}/raw.txt"]
    with pytest.raises(ConfigError) as refused:
        resolved(*stated)
    assert_names(refused.value, f"{tmp_path}/new.bin")
    run = resolved(*stated, "data.rebuild=auto")
    places = find_data(run.config.data, lambda line: None)
    rebuild_data(run.config.data, places, 1, lambda line: None)
    assert open_data(run, places).train.parts[0].tokens_per_epoch == 701


def test_both_parts_of_a_split_are_built_again_once(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    build_files([f"{tmp_path}/*.txt"], ByteTokenizer(), tmp_path / "x", BuildOptions(split=(80, 20)))
    parts = [f"data.train={tmp_path}/x-train", f"data.validation={tmp_path}/x-validation"]
    run, said = resolved(*parts, "data.rebuild=always"), list[str]()
    rebuild_data(run.config.data, find_data(run.config.data, said.append), 1, said.append)
    assert len(said) == 2, "once, with a word before and a word after"
    assert_names(said[0], f"{tmp_path}/x-train")
    assert_names(said[1], f"{tmp_path}/x")


def ending(folder: Path, name: str, eod_token: str) -> str:
    (folder / "text.jsonl").write_text("".join(f'"some text {number}"\n' for number in range(40)))
    tokenizer = load_tokenizer(folder / "tokenizer.json", eod_token)
    build_files([folder / "text.jsonl"], tokenizer, folder / name)
    return str(folder / name)


def test_the_token_that_ends_a_document(tmp_path: Path) -> None:
    """Chosen in the build and recorded, a run takes it over; another choice is refused with both and the command."""
    path = chat_json(tmp_path, ["some text"])
    own, other = (load_tokenizer(path, end).eod_id for end in ENDS)
    web, code = ending(tmp_path, "web", ENDS[1]), ending(tmp_path, "code", ENDS[0])

    def words(*more: str) -> tuple[str, ...]:
        return f"data.tokenizer={path}", f"data.cache={tmp_path}", *more

    assert opened(*words(f"data.train={web}"))[1].tokenizer.eod_id == other
    assert opened(*words(f"data.train={code}"))[1].tokenizer.eod_id == own
    assert opened(*words(f"data.train={web}", f"data.eod_token={ENDS[1]}"))[1].tokenizer.eod_id == other
    foreign = write_tokens(tmp_path / "foreign", [[1] * 40] * 3)
    assert opened(*words(f"data.train={foreign}"))[1].tokenizer.eod_id == own
    assert opened(*words(f"data.train={foreign}", f"data.eod_token={ENDS[1]}"))[1].tokenizer.eod_id == other
    for stated in ((f"data.train={web}", f"data.eod_token={ENDS[0]}"), (mixed(code, web),)):
        with pytest.raises(DataError) as refused:
            opened(*words(*stated))
        assert_names(refused.value, web, *ENDS, own, other, "data.eod_token", f"--eod-token '{ENDS[0]}'")
    with pytest.raises(DataError) as refused:
        opened(*words(f"data.train={web}", "data.eod_token=<|endoftex|>"))
    assert_names(refused.value, path, "'<|endoftex|>'", ENDS[1])


def test_the_token_that_begins_a_document(tmp_path: Path) -> None:
    """A run takes it over from its dataset; what begins otherwise is refused, of training and of validation."""
    path = chat_json(tmp_path, ["some text"])
    (tmp_path / "text.jsonl").write_text("".join(f'"some text {number}"\n' for number in range(40)))
    bos = load_tokenizer(path, bos_token=ENDS[1]).bos_id
    web, code = (str(tmp_path / name) for name in ("web", "code"))
    build_files([tmp_path / "text.jsonl"], load_tokenizer(path, bos_token=ENDS[1]), web)
    build_files([tmp_path / "text.jsonl"], load_tokenizer(path), code)

    def words(*more: str) -> tuple[str, ...]:
        return f"data.tokenizer={path}", f"data.cache={tmp_path}", *more

    found = {prefix: opened(*words(f"data.train={prefix}"))[1].tokenizer.bos_id for prefix in (web, code)}
    assert found == {web: bos, code: None}
    begun, foreign = (write_tokens(tmp_path / str(token), [[token, *[1] * 40]] * 3) for token in (bos, 1))
    assert opened(*words(f"data.train={begun}", f"data.bos_token={ENDS[1]}"))[1].tokenizer.bos_id == bos
    assert opened(*words(f"data.train={begun}"))[1].tokenizer.bos_id is None
    for stated, prefix in (
        ((f"data.train={web}", "data.bos_token=none"), web),
        ((f"data.train={code}", f"data.bos_token={ENDS[1]}"), code),
        ((mixed(web, code),), code),
        ((f"data.train={code}", f"data.validation={web}"), web),
        ((f"data.train={web}", f"data.validation={foreign}"), f"{foreign}.bin"),
    ):
        with pytest.raises(DataError) as refused:
            opened(*words(*stated))
        assert_names(refused.value, prefix, bos, "data.bos_token")


def test_foreign_documents_that_begin_as_the_tokenizer_begins_a_text_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = chat_json(tmp_path, ["some text"])
    bos = load_tokenizer(path, bos_token=ENDS[1]).bos_id
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": ENDS[1]}))
    words = f"data.tokenizer={path}", f"data.cache={tmp_path}"
    opened(*words, f"data.train={write_tokens(tmp_path / 'other', [[1] * 40] * 3)}")
    assert "data.bos_token" not in caplog.text
    opened(*words, f"data.train={write_tokens(tmp_path / 'begun', [[bos, *[1] * 40]] * 3)}")
    assert_names(caplog.text, tmp_path / "begun", ENDS[1], "data.bos_token")
