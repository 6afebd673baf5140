"""`megalm presets`: list the presets. `megalm config`: convert configuration files of other toolkits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.options import Gpu
from megalm.config.deepspeed.json_reader import named_json
from megalm.config.loading import DEFAULT_PRESET, describe_preset, load_run_config, preset_path, preset_paths
from megalm.config.validation import shown
from megalm.cost_model.gpu_specs import gpu_by_name
from megalm.errors import ConfigError
from megalm.model.model_config import build_model_config
from megalm.planning.convert_json import CHANGES_TRAINING, DEEPSPEED_JSON, RUN_YAML, Row, convert
from megalm.utils.formatting import table, terminal_width
from megalm.utils.terminal import echo, echo_text

app = typer.Typer(no_args_is_help=True, help="Convert configuration files of other toolkits.")

_DEFAULT_GPU = "H100"
_WIDTH = 120  # the largest width of the list of presets; longer lines are hard to read


def presets(name: str = typer.Argument(None, help="Print this preset's YAML instead of the list.")) -> None:
    """List the presets with their parameters and layers x width, or print one; --config takes their names."""
    if name is None:
        rows = [[preset, *_size(preset), describe_preset(preset)] for preset in preset_paths()]
        headings = ["preset", "parameters", "layers x width", "description and source"]
        echo(table(headings, rows, min(terminal_width() or _WIDTH, _WIDTH)))
    else:
        echo_text(preset_path(name).read_text(encoding="utf-8").rstrip())


def _size(preset: str) -> tuple[str, str]:
    config = load_run_config(preset, []).config
    rows = config.model.vocab_size or (config.data.recipe_vocab_size if config.data.recipe else 0)
    shape = build_model_config(config.model, rows, config.data.sample_length)
    count = f"{shape.parameter_count():,}" if rows else "by tokenizer"
    return count, f"{shape.num_hidden_layers} x {shape.hidden_size}"


@app.callback()
def config() -> None:
    """Convert configuration files of other toolkits."""


@app.command("convert")
def convert_command(
    theirs: Annotated[Path, typer.Argument(metavar="THEIRS.json", help="A DeepSpeed JSON of another toolkit.")],
    write: Annotated[
        Path, typer.Option("--write", metavar="DIR", help=f"Write DIR/{DEEPSPEED_JSON} and DIR/{RUN_YAML}.")
    ],
    world_size: Annotated[int, typer.Option("--world-size", min=1, help="The ranks that the batch must fit.")] = 1,
    gpu: Gpu = _DEFAULT_GPU,
    preset: Annotated[
        str, typer.Option("--preset", help="The preset of the run configuration, for the model and the data.")
    ] = DEFAULT_PRESET,
) -> None:
    """Convert a DeepSpeed JSON to two files that launch/pretrain.py accepts unchanged.

    \b
    megalm config convert theirs.json --write mine --world-size 8
    """
    source = named_json(theirs)
    for name in (DEEPSPEED_JSON, RUN_YAML):
        target = write / name
        if target.exists() or target.is_symlink():
            own = target.exists() and source.exists() and target.samefile(source)
            reason = "is the file to convert" if own else "exists already"
            raise ConfigError(f"--write {write}: {target} {reason}; name another folder")
    converted = convert(source, world_size, gpu_by_name(gpu or _DEFAULT_GPU), preset)
    json_file, yaml_file = converted.write(write, source)
    echo(table(["key", "value", "became", "why"], [_cells(row) for row in converted.rows]))
    lost = [row.key for row in converted.rows if row.became == CHANGES_TRAINING]
    if lost:
        echo(f"WARNING: the training changes, because these are left out: {', '.join(lost)}", err=True)
    echo(f"launch/pretrain.py --deepspeed_config {json_file} --config {yaml_file}")


def _cells(row: Row) -> tuple[str, ...]:
    return row.key, "" if row.value is None else shown(row.value), row.became, row.why
