"""Rules of the data; see run_checks.py."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from megalm.config.schema import DataSection, RunConfig
from megalm.data.readers.questions import read_questions, task_name
from megalm.errors import DataError
from megalm.planning.batch_size import TrainingStages
from megalm.planning.engine_checks import CheckContext, Rule
from megalm.topology import divisors, nearest
from megalm.utils.addresses import public_address
from megalm.utils.remote_files import is_remote

# Of a run, and of a validation set.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def data_is_configured(case: CheckContext) -> Iterator[str]:
    data = case.config.data
    if data.train is None and data.recipe is None:
        yield f"data.train is missing; {how_to_give_data(case.config)}, or data.recipe=python-stdlib"


def how_to_give_data(config: RunConfig) -> str:
    """Return the advice for a run without data."""
    if config.data.tokenizer is not None:
        return "give a dataset prefix"
    most = f" of at most {config.model.vocab_size:,} entries" if config.model.vocab_size else ""
    return (
        f"give a dataset prefix and its tokenizer: data.train=PREFIX data.tokenizer=FILE{most} "
        "(made by data_tools/train_tokenizer.py and build_dataset.py)"
    )


def data_is_complete(case: CheckContext) -> Iterator[str]:
    data = case.config.data
    if data.train == ():
        yield "data.train is an empty list; name a dataset, or several as {prefix, weight}"
    if data.train is not None:
        if data.tokenizer is None:
            prefix = data.train if isinstance(data.train, str) else "[...]"
            yield f"data.train={prefix} needs data.tokenizer, the tokenizer that built the dataset"
        if data.input is not None and not isinstance(data.train, str):
            yield (
                "data.input names the raw text of one dataset, but data.train is a list; remove data.input: the .json "
                "of each dataset names its own"
            )
        return
    for key, given in (
        (
            f"data.validation={data.validation}" if isinstance(data.validation, str) else "data.validation",
            data.validation,
        ),
        ("data.stages, blend", any(stage.blend for stage in data.stages)),
        ("data.input", data.input),
        ("data.append_eod", data.append_eod is not None),
        ("data.eod_token", data.eod_token is not None),
        ("data.bos_token", data.bos_token is not None),
        ("data.rebuild", data.rebuild != "never"),
    ):
        if given:
            yield f"{key} needs data.train, your own dataset; set it"


def stages_follow_each_other(case: CheckContext) -> Iterator[str]:
    data, before = case.config.data, 1
    for stage in data.stages:
        if not stage.blend and stage.sequence_length is None:
            yield (
                f"data.stages, from_step {stage.from_step} changes nothing; give it a blend, a list of "
                "{prefix, weight}, or a sequence_length"
            )
        if stage.from_step <= before:
            yield (
                f"data.stages: from_step={stage.from_step} is not after step {before}; sort the stages, and put the "
                "first mixture into data.train"
            )
        before = stage.from_step
    for stage in data.blends:
        where = "data.train" if stage.from_step == 1 else f"data.stages, from_step {stage.from_step}"
        repeated = _repeated(part.prefix for part in stage.blend)
        if repeated is not None:
            yield f"{where} names {repeated} twice; add its weights up"


def samples_can_be_cut(case: CheckContext) -> Iterator[str]:
    data, longest = case.config.data, case.config.data.sample_length
    for training_stage in TrainingStages.of(case.config, 1).stages:
        length = training_stage.sequence_length
        if longest % length:
            near = " or ".join(map(str, nearest(length, divisors(longest))))
            yield (
                f"data.stages, from step {training_stage.first_step}: sequence_length={length} does not divide the "
                f"longest, {longest}, so samples cannot be cut into it; use {near}, or another longest length"
            )
    overlaps, is_cut = data.stride not in (None, longest), len(set(data.sequence_lengths)) > 1
    if data.stride is not None and data.stride > longest:
        yield (
            f"data.stride={data.stride} is more than data.sequence_length={longest} and would skip tokens; lower it or "
            "remove it"
        )
    if data.packing != "stream" and is_cut:
        yield (
            "data.stages with sequence_length cuts samples into parts, and with them documents that "
            f"data.packing={data.packing} keeps whole; give all stages one length, or data.packing=stream"
        )
    elif data.packing != "stream" and overlaps:
        yield (
            f"data.stride={data.stride} makes windows of a stream overlap, and data.packing={data.packing} has none; "
            "remove one of them"
        )
    if data.order != "megatron":
        return
    for given, does in (
        (len(data.blends) > 1 or not isinstance(data.train, str | None), "mixes datasets"),
        (overlaps, f"has data.stride={data.stride}"),
        (data.packing != "stream", f"has data.packing={data.packing}"),
    ):
        if given:
            yield (
                f"data.order=megatron is for one dataset without overlap, but this run {does}; use "
                "data.order=prefix_stable"
            )


def validation_can_be_told(case: CheckContext) -> Iterator[str]:
    """Validation sets have one source, and names that tell them apart."""
    data = case.config.data
    if data.validation is not None and data.split is not None:
        named = data.validation if isinstance(data.validation, str) else "{...}"
        yield f"data.validation={named} and data.split={data.split} both choose validation data; keep one"
    if data.validation == {}:
        yield "data.validation is an empty mapping; use NAME: PREFIX, or remove it"
    for name in data.validation if isinstance(data.validation, dict) else ():
        if name == "validation" or not NAME.fullmatch(name):
            yield (
                f"data.validation: {name!r} cannot name a set: use letters, digits, '.', '_' and '-'; 'validation' "
                "means all sets together"
            )
    if data.split is None:
        return
    try:
        train, validation = (float(part) for part in data.split.split(","))
    except ValueError:
        train = validation = -1.0
    if not (0 < train < float("inf") and 0 <= validation < float("inf")):
        yield f"data.split={data.split!r} is not TRAIN,VALIDATION; write two weights such as 95,5"
    repeated = _repeated(Path(prefix).name for prefix in {part.prefix for stage in data.blends for part in stage.blend})
    if repeated is not None:
        yield (
            f"data.split={data.split} needs datasets with different names, but two are called {repeated}; rename one, "
            "or build held-out datasets (data_tools/build_dataset.py --split) and name them in data.validation"
        )


def data_files_exist(case: CheckContext) -> Iterator[str]:
    data, tokenizer = case.config.data, case.config.data.tokenizer
    for key, path in (*_named_datasets(data), ("data.tokenizer", tokenizer or "")):
        if "://" in path and is_remote(path):
            yield (
                f"{key}={public_address(path)}: a run reads its data from a local disk; copy it there first, or build "
                "the dataset from text at an address (data_tools/build_dataset.py --input)"
            )
            return
    for key, prefix in _named_datasets(data):
        # A dataset can be built at the start if its .json or the configuration names its raw text.
        buildable = Path(f"{prefix}.json").is_file() or (data.input is not None and prefix == data.train)
        absent = [suffix for suffix in (".bin", ".idx") if not Path(f"{prefix}{suffix}").is_file()]
        if absent and not (data.rebuild != "never" and buildable):
            yield (
                f"{key}={prefix}: {prefix}{absent[0]} does not exist; give the prefix of a dataset, without .bin, or "
                "build one with python data_tools/build_dataset.py"
            )
    if tokenizer is not None and tokenizer != "bytes" and not Path(tokenizer).exists():
        yield (
            f"data.tokenizer={tokenizer} does not exist; make one with python data_tools/train_tokenizer.py, or use "
            "data.tokenizer=bytes"
        )


def tasks_are_questions(case: CheckContext) -> Iterator[str]:
    files = case.config.evaluate.tasks
    if repeated := _repeated(map(task_name, files)):
        yield f"evaluate.tasks: two files are named {repeated}; give each another name"
    for file in files:
        try:
            read_questions(Path(file))
        except DataError as error:
            yield f"evaluate.tasks: {error}"


def _named_datasets(data: DataSection) -> list[tuple[str, str]]:
    """Return (key, prefix) of every dataset, each prefix once."""
    named: dict[str, str] = {}
    for stage in data.blends:
        for part in stage.blend:
            named.setdefault(part.prefix, "data.train" if stage.from_step == 1 else "data.stages")
    for prefix in data.validation_sets.values():
        named.setdefault(prefix, "data.validation")
    return [(key, prefix) for prefix, key in named.items()]


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


DATA_RULES: tuple[Rule, ...] = (
    data_is_configured,
    data_is_complete,
    stages_follow_each_other,
    samples_can_be_cut,
    validation_can_be_told,
)
DATA_FILE_RULES: tuple[Rule, ...] = (data_files_exist, tasks_are_questions)
