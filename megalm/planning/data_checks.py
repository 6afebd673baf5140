"""Rules of the data; see run_checks.py."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from megalm.config.schema import DataSection, RunConfig
from megalm.data.readers.questions import read_questions, task_name
from megalm.errors import ConfigError, DataError
from megalm.planning.batch_size import TrainingStages
from megalm.planning.engine_checks import CheckContext, Rule
from megalm.topology import divisors, nearest
from megalm.utils.addresses import public_address
from megalm.utils.remote_files import is_remote

# Of a run, and of a validation set.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def data_is_configured(case: CheckContext) -> None:
    data = case.config.data
    if data.train is None and data.recipe is None:
        raise ConfigError(f"data.train is missing; {how_to_give_data(case.config)}, or data.recipe=python-stdlib")


def how_to_give_data(config: RunConfig) -> str:
    """Return the advice for a run without data."""
    if config.data.tokenizer is not None:
        return "give a dataset prefix"
    most = f" of at most {config.model.vocab_size:,} entries" if config.model.vocab_size else ""
    return (
        f"give a dataset prefix and its tokenizer: data.train=PREFIX data.tokenizer=FILE{most} "
        "(made by data_tools/train_tokenizer.py and build_dataset.py)"
    )


def data_is_complete(case: CheckContext) -> None:
    data = case.config.data
    if data.train is not None and data.tokenizer is None:
        named = data.train if isinstance(data.train, str) else "[...]"
        raise ConfigError(f"data.train={named} needs data.tokenizer, the tokenizer that built the dataset")
    if data.train is not None:
        return
    if data.validation is not None:
        shown = f"={data.validation}" if isinstance(data.validation, str) else ""
        raise ConfigError(f"data.validation{shown} needs data.train, another dataset; set it, or use data.split")
    for key, given in (
        ("data.stages, blend", any(stage.blend for stage in data.stages)),
        ("data.input", data.input),
        ("data.append_eod", data.append_eod is not None),
        ("data.eod_token", data.eod_token is not None),
        ("data.bos_token", data.bos_token is not None),
        ("data.rebuild", data.rebuild != "never"),
    ):
        if given:
            raise ConfigError(f"{key} needs data.train, your own dataset; set it")


def stages_change_something(case: CheckContext) -> None:
    data = case.config.data
    if data.train == ():
        raise ConfigError("data.train is an empty list; name a dataset, or several as {prefix, weight}")
    for stage in data.stages:
        if not stage.blend and stage.sequence_length is None:
            raise ConfigError(
                f"data.stages, from_step {stage.from_step} changes nothing; give it a blend, a list of "
                "{prefix, weight}, or a sequence_length"
            )


def lengths_divide_samples(case: CheckContext) -> None:
    data, stages = case.config.data, TrainingStages.of(case.config, 1).stages
    for stage in stages:
        length, longest = stage.sequence_length, data.sample_length
        if longest % length:
            near = " or ".join(map(str, nearest(length, divisors(longest))))
            raise ConfigError(
                f"data.stages, from step {stage.first_step}: sequence_length={length} does not divide the longest, "
                f"{longest}, so samples cannot be cut into it; use {near}, or another longest length"
            )


def blends_name_datasets_once(case: CheckContext) -> None:
    for stage in case.config.data.blends:
        where = "data.train" if stage.from_step == 1 else f"data.stages, from_step {stage.from_step}"
        repeated = _repeated(part.prefix for part in stage.blend)
        if repeated is not None:
            raise ConfigError(f"{where} names {repeated} twice; add its weights up")


def stages_follow_each_other(case: CheckContext) -> None:
    before = 1
    for stage in case.config.data.stages:
        if stage.from_step <= before:
            raise ConfigError(
                f"data.stages: from_step={stage.from_step} is not after step {before}; sort the stages, and put the "
                "first mixture into data.train"
            )
        before = stage.from_step


def stride_makes_samples(case: CheckContext) -> None:
    data = case.config.data
    if data.stride is not None and data.stride > data.sample_length:
        raise ConfigError(
            f"data.stride={data.stride} is more than data.sequence_length={data.sample_length} and would skip "
            "tokens; lower it or remove it"
        )


def packing_has_no_overlap(case: CheckContext) -> None:
    data = case.config.data
    if data.packing == "stream":
        return
    if len(set(data.sequence_lengths)) > 1:
        raise ConfigError(
            "data.stages with sequence_length cuts samples into parts, and with them documents that "
            f"data.packing={data.packing} keeps whole; give all stages one length, or data.packing=stream"
        )
    if data.stride not in (None, data.sample_length):
        raise ConfigError(
            f"data.stride={data.stride} makes windows of a stream overlap, and data.packing={data.packing} has none; "
            "remove one of them"
        )


def megatron_order_is_plain(case: CheckContext) -> None:
    data = case.config.data
    if data.order != "megatron":
        return
    for given, does in (
        (len(data.blends) > 1 or not isinstance(data.train, str | None), "mixes datasets"),
        (data.stride not in (None, data.sample_length), f"has data.stride={data.stride}"),
        (data.packing != "stream", f"has data.packing={data.packing}"),
    ):
        if given:
            raise ConfigError(
                f"data.order=megatron is for one dataset without overlap, but this run {does}; "
                "use data.order=prefix_stable"
            )


def input_belongs_to_one_dataset(case: CheckContext) -> None:
    data = case.config.data
    if data.input is not None and not isinstance(data.train, str):
        raise ConfigError(
            "data.input names the raw text of one dataset, but data.train is a list; remove data.input: the .json of "
            "each dataset names its own"
        )


def one_source_of_validation(case: CheckContext) -> None:
    data = case.config.data
    if data.validation is not None and data.split is not None:
        named = data.validation if isinstance(data.validation, str) else "{...}"
        raise ConfigError(f"data.validation={named} and data.split={data.split} both choose validation data; keep one")


def validation_sets_have_names(case: CheckContext) -> None:
    data = case.config.data
    if isinstance(data.validation, dict):
        if not data.validation:
            raise ConfigError("data.validation is an empty mapping; use NAME: PREFIX, or remove it")
        for name in data.validation:
            if name == "validation" or not NAME.fullmatch(name):
                raise ConfigError(
                    f"data.validation: {name!r} cannot name a set: use letters, digits, '.', '_' and '-'; "
                    "'validation' means all sets together"
                )
    repeated = _repeated(Path(prefix).name for prefix in {part.prefix for stage in data.blends for part in stage.blend})
    if data.split is not None and repeated is not None:
        raise ConfigError(
            f"data.split={data.split} needs datasets with different names, but two are called {repeated}; rename one, "
            "or build held-out datasets (data_tools/build_dataset.py --split) and name them in data.validation"
        )


def split_is_two_weights(case: CheckContext) -> None:
    split = case.config.data.split
    if split is None:
        return
    try:
        train, validation = (float(part) for part in split.split(","))
    except ValueError:
        train = validation = -1.0
    if not (0 < train < float("inf") and 0 <= validation < float("inf")):
        raise ConfigError(f"data.split={split!r} is not TRAIN,VALIDATION; write two weights such as 95,5")


def datasets_are_local(case: CheckContext) -> None:
    data = case.config.data
    for key, path in (*_named_datasets(data), ("data.tokenizer", data.tokenizer or "")):
        if "://" in path and is_remote(path):
            raise ConfigError(
                f"{key}={public_address(path)}: a run reads its data from a local disk; copy it there first, or build "
                "the dataset from text at an address (data_tools/build_dataset.py --input)"
            )


def dataset_files_exist(case: CheckContext) -> None:
    data = case.config.data
    for key, prefix in _named_datasets(data):
        # A dataset can be built at the start if its .json or the configuration names its raw text.
        buildable = Path(f"{prefix}.json").is_file() or (data.input is not None and prefix == data.train)
        if data.rebuild != "never" and buildable:
            continue
        for suffix in (".bin", ".idx"):
            if not Path(f"{prefix}{suffix}").is_file():
                raise ConfigError(
                    f"{key}={prefix}: {prefix}{suffix} does not exist; give the prefix of a dataset, without .bin, or "
                    "build one with python data_tools/build_dataset.py"
                )


def tokenizer_exists(case: CheckContext) -> None:
    tokenizer = case.config.data.tokenizer
    if tokenizer is not None and tokenizer != "bytes" and not Path(tokenizer).exists():
        raise ConfigError(
            f"data.tokenizer={tokenizer} does not exist; make one with python data_tools/train_tokenizer.py, "
            "or use data.tokenizer=bytes"
        )


def tasks_are_questions(case: CheckContext) -> None:
    files = case.config.evaluate.tasks
    if repeated := _repeated(map(task_name, files)):
        raise ConfigError(f"evaluate.tasks: two files are named {repeated}; give each another name")
    problems = []
    for file in files:
        try:
            read_questions(Path(file))
        except DataError as error:
            problems.append(f"evaluate.tasks: {error}")
    if problems:
        raise ConfigError(*problems)


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
    stages_change_something,
    blends_name_datasets_once,
    stages_follow_each_other,
    lengths_divide_samples,
    stride_makes_samples,
    packing_has_no_overlap,
    megatron_order_is_plain,
    input_belongs_to_one_dataset,
    one_source_of_validation,
    validation_sets_have_names,
    split_is_two_weights,
)
DATA_FILE_RULES: tuple[Rule, ...] = (datasets_are_local, dataset_files_exist, tokenizer_exists, tasks_are_questions)
