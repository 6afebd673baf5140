"""Rules about the data section, and the files that it names: see run_checks.py."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from megalm.config.schema import DataSection, RunConfig
from megalm.errors import ConfigError
from megalm.planning.checks.context import CheckContext


def data_is_brought(case: CheckContext) -> None:
    data = case.config.data
    if data.train is None and data.recipe is None:
        raise ConfigError(f"data.train is not stated; {what_data_to_bring(case.config)}, or data.recipe=python-stdlib")


def what_data_to_bring(config: RunConfig) -> str:
    """What to state where a run has no data, in words."""
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
        raise ConfigError(f"data.train={named} needs data.tokenizer, the one that the dataset was built with")
    if data.train is None and data.validation is not None:
        shown = f"={data.validation}" if isinstance(data.validation, str) else ""
        raise ConfigError(f"data.validation{shown} needs data.train; state it, or use data.split")
    for key, stated in (
        ("data.stages", data.stages),
        ("data.input", data.input),
        ("data.append_eod", data.append_eod is not None),
        ("data.rebuild", data.rebuild != "never"),
    ):
        if data.train is None and stated:
            raise ConfigError(f"{key} needs data.train, a dataset of one's own; state it")


def blends_name_datasets_once(case: CheckContext) -> None:
    for stage in case.config.data.blends:
        where = "data.train" if stage.from_step == 1 else f"data.stages, from_step {stage.from_step}"
        if not stage.blend:
            raise ConfigError(f"{where} is an empty list; name a dataset, or several as {{prefix, weight}}")
        repeated = _repeated(part.prefix for part in stage.blend)
        if repeated is not None:
            raise ConfigError(f"{where} names {repeated} twice; add its weights up")


def stages_follow_each_other(case: CheckContext) -> None:
    before = 1
    for stage in case.config.data.stages:
        if stage.from_step <= before:
            raise ConfigError(
                f"data.stages: from_step={stage.from_step} does not come after step {before}; sort the stages, the "
                "first mixture is data.train"
            )
        before = stage.from_step


def stride_makes_samples(case: CheckContext) -> None:
    data = case.config.data
    if data.stride is not None and data.stride > data.sequence_length:
        raise ConfigError(
            f"data.stride={data.stride} is more than data.sequence_length={data.sequence_length}, which would leave "
            "tokens out; state less, or leave it out"
        )


def megatron_order_is_plain(case: CheckContext) -> None:
    data = case.config.data
    if data.order != "megatron":
        return
    for stated, what in (
        (data.stages or not isinstance(data.train, str | None), "mixes datasets"),
        (data.stride not in (None, data.sequence_length), f"has data.stride={data.stride}"),
    ):
        if stated:
            raise ConfigError(
                f"data.order=megatron is the order of one dataset without overlap, and this run {what}; "
                "use data.order=prefix_stable"
            )


def input_belongs_to_one_dataset(case: CheckContext) -> None:
    data = case.config.data
    if data.input is not None and not isinstance(data.train, str):
        raise ConfigError(
            "data.input says what the one dataset of data.train is built of, and data.train is a list; leave it out: "
            "each dataset's .json says what it was built of"
        )


def one_source_of_validation(case: CheckContext) -> None:
    data = case.config.data
    if data.validation is not None and data.split is not None:
        named = data.validation if isinstance(data.validation, str) else "{...}"
        raise ConfigError(
            f"data.validation={named} and data.split={data.split} both say what is validated on; keep one"
        )


def validation_sets_have_names(case: CheckContext) -> None:
    data = case.config.data
    if isinstance(data.validation, dict):
        if not data.validation:
            raise ConfigError("data.validation is an empty mapping; state NAME: PREFIX, or leave it out")
        for name in data.validation:
            if name == "validation" or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
                raise ConfigError(
                    f"data.validation: {name!r} is no name of a set: use letters, digits, '.', '_' and '-'; "
                    "'validation' is all of them together"
                )
    prefixes = {part.prefix for stage in data.blends for part in stage.blend}
    repeated = _repeated(Path(prefix).name for prefix in prefixes)
    if data.split is not None and repeated is not None:
        raise ConfigError(
            f"data.split={data.split} validates on a part of each dataset by its name, and two are called {repeated}; "
            "name validation sets with data.validation"
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


def dataset_files_exist(case: CheckContext) -> None:
    data = case.config.data
    for key, prefix in _named(data):
        # What a dataset was built of is in its .json, or stated: then it can be built when the run starts.
        buildable = Path(f"{prefix}.json").is_file() or (data.input is not None and prefix == data.train)
        if data.rebuild != "never" and buildable:
            continue
        for suffix in (".bin", ".idx"):
            if not Path(f"{prefix}{suffix}").is_file():
                raise ConfigError(
                    f"{key}={prefix}: {prefix}{suffix} does not exist; a dataset is named by its prefix, without "
                    ".bin; python data_tools/build_dataset.py makes one"
                )


def tokenizer_exists(case: CheckContext) -> None:
    tokenizer = case.config.data.tokenizer
    if tokenizer is not None and tokenizer != "bytes" and not Path(tokenizer).exists():
        raise ConfigError(
            f"data.tokenizer={tokenizer} does not exist; python data_tools/train_tokenizer.py makes one, "
            "or use data.tokenizer=bytes"
        )


def _named(data: DataSection) -> list[tuple[str, str]]:
    """(key, prefix) of every dataset, each prefix once."""
    named = [
        ("data.train" if stage.from_step == 1 else "data.stages", part.prefix)
        for stage in data.blends
        for part in stage.blend
    ]
    named += [("data.validation", prefix) for prefix in data.validation_sets.values()]
    return list({prefix: (key, prefix) for key, prefix in reversed(named)}.values())[::-1]


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


DATA_RULES: tuple[Callable[[CheckContext], None], ...] = (
    data_is_brought,
    data_is_complete,
    blends_name_datasets_once,
    stages_follow_each_other,
    stride_makes_samples,
    megatron_order_is_plain,
    input_belongs_to_one_dataset,
    one_source_of_validation,
    validation_sets_have_names,
    split_is_two_weights,
)
# They look at the disk, so they come after all that needs no look.
DATA_FILE_RULES: tuple[Callable[[CheckContext], None], ...] = (dataset_files_exist, tokenizer_exists)
