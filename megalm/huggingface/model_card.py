"""Writes the README.md of an exported model from its checkpoint and its run folder.

The card leaves out facts that neither of them holds, and shows only the last part of a path, because a published card
must not name a machine's folders.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from megalm.checkpoint.manifest import Manifest
from megalm.config.deepspeed.json_reader import open_deepspeed_json
from megalm.config.validation import to_yaml
from megalm.errors import ConfigError
from megalm.huggingface.config_json import family_of
from megalm.huggingface.export_tokenizer import SENTENCEPIECE, TOKENIZER, ExportedTokenizer
from megalm.model.model_config import ModelConfig
from megalm.planning.lr_schedule import ScheduleSegment
from megalm.runs.evaluations import read_evaluations
from megalm.runs.metrics_log import METRICS_FILE, Row, live_rows, read_metrics
from megalm.runs.run_folder import CONFIG_FILE, ENVIRONMENT_FILE, read_mapping
from megalm.utils.formatting import perplexity_of

_NEW_TOKENS = 50
_LICENSE = "# license: choose one before you publish this model, e.g. apache-2.0; none is implied"

Fact = tuple[str, str]


@dataclass(frozen=True)
class Card:
    """The sources of a model card.

    Attributes:
        name: the model's name.
        checkpoint: the checkpoint's folder, in `checkpoints` of its run folder.
        dtype: the dtype of the exported weights.
        ema: they are the moving average of those in training.
    """

    name: str
    checkpoint: Path
    manifest: Manifest
    shape: ModelConfig
    dtype: str
    tokenizer: ExportedTokenizer
    ema: bool = False

    def text(self) -> str:
        parts = [
            f"---\n{self._front_matter()}---\n",
            f"# {self.name}\n",
            f"A language model of {self.shape.parameter_count():,} parameters{self._kind()}\n",
            *self._section("Model", self._model()),
            *self._section("Trained on", self._trained_on()),
            *self._section("Validation", self._validation()),
            *self._section("Settings", self._settings()),
            self._use(),
            "## Limits\n\n" + "\n".join(f"- {limit}" for limit in self._limits()) + "\n",
        ]
        return "\n".join(parts)

    @property
    def _run(self) -> Path:
        return self.checkpoint.parent.parent

    @property
    def _metrics(self) -> Path | None:
        """The run's metrics, if the checkpoint is in its own run folder."""
        path = self._run / METRICS_FILE
        return path if path.is_file() and self.manifest.run == self._run.name else None

    def _kind(self) -> str:
        if self.manifest.imported_from:
            return "."
        if self.tokenizer.has_chat_template or self._origin():  # perhaps trained on conversations, here or before
            return ", trained with megalm."
        return ", pretrained with megalm. It continues text; it is not tuned to follow instructions."

    def _front_matter(self) -> str:
        tags = ["megalm", *([] if self.manifest.imported_from else ["pretrained"]), family_of(self.shape).name]
        content: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
        if results := list(self._results()):
            content["model-index"] = [{"name": self.name, "results": results}]
        return to_yaml(content) + _LICENSE + "\n"

    def _results(self) -> Iterator[dict[str, Any]]:
        """What a hub page shows of the validations and of `megalm evaluate`, in the form of a model-index.

        Source: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
        """
        measured = [
            (str(row.get("dataset", "validation")), key, row[key])
            for row in self._validations()
            for key in ("loss", "perplexity", "bits_per_byte")
            if isinstance(row.get(key), float)
        ]
        for one in read_evaluations(self._run) if self._metrics is not None else ():
            if one.step == self.manifest.step and one.ema == self.ema:
                measured.append((one.task, one.measure.replace(" ", "_"), one.value))
        for dataset, metrics in groupby(measured, key=itemgetter(0)):
            yield {
                "task": {"type": "text-generation"},
                "dataset": {"name": dataset, "type": dataset},
                "metrics": [{"type": kind, "value": value} for _, kind, value in metrics],
            }

    @staticmethod
    def _section(title: str, facts: Iterator[Fact]) -> list[str]:
        rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in facts]
        return [f"## {title}\n", "| | |\n|---|---|\n" + "\n".join(rows) + "\n"] if rows else []

    def _model(self) -> Iterator[Fact]:
        shape = self.shape
        yield "parameters", f"{shape.parameter_count():,}, stored in {self.dtype}"
        if self.ema:
            yield "weights", "the exponential moving average of those in training"
        yield "layers x hidden size", f"{shape.num_hidden_layers} x {shape.hidden_size:,}"
        groups = shape.num_key_value_heads
        shared = f", {groups} key/value heads" if groups != shape.num_attention_heads else ""
        yield "attention heads", f"{shape.num_attention_heads} of size {shape.head_dim}{shared}"
        yield "intermediate size", f"{shape.intermediate_size:,}"
        yield "vocabulary", f"{shape.vocab_size:,}, {'tied' if shape.tie_word_embeddings else 'untied'} embeddings"
        yield "maximum positions", f"{shape.max_position_embeddings:,}"
        if base := self.manifest.model.get("mup_base_width"):
            yield (
                "maximal-update parametrisation",
                (f"base width {base:,}; the weights here hold the multipliers of logits and scores"),
            )

    def _trained_on(self) -> Iterator[Fact]:
        manifest = self.manifest
        if source := manifest.imported_from:
            yield "starts from", f"the weights of {source}, without further training"
            return
        if origin := self._origin():
            yield "starts from", origin
        if manifest.averaged_from:
            yield "average of the weights of", ", ".join(manifest.averaged_from)
        name, whole = self._dataset()
        if name:
            yield "dataset", name
        if tokens := manifest.tokens:
            # Fewer steps than the checkpoint's where another toolkit trained before: those tokens are not counted.
            yield "tokens", f"{tokens:,} in {manifest.data_position.steps or manifest.step:,} steps"
            if whole:
                yield "epochs", f"{tokens / whole:.2f} of {whole:,} tokens"
            yield "tokens per parameter", f"{tokens / self.shape.parameter_count():.2f}"

    def _origin(self) -> str | None:
        """The run and checkpoint that this run started from, if any."""
        rows = read_metrics(self._metrics) if self._metrics is not None else ()
        first = next((row for row in rows if row.get("event") in ("start", "resume")), {})
        path = Path(first["path"]) if first.get("path") else None
        return None if path is None else f"the weights of {path.parent.parent.name}, {path.name}"

    def _dataset(self) -> tuple[str | None, int | None]:
        """The dataset in config.yaml, and its training tokens if every attempt used the same single dataset."""
        data = read_mapping(self.checkpoint / CONFIG_FILE).get("data")
        section = data if isinstance(data, dict) else {}
        train, stages = section.get("train"), section.get("stages") or []
        name = section.get("recipe") if train is None else _mixture(train)
        for stage in stages:
            name = f"{name}; from step {stage['from_step']:,} {_mixture(stage['blend'])}"
        segments = self.manifest.data_position.segments
        orders = [segment for segment in segments if segment.begins == "anew"]
        if len(orders) > 1:
            return f"{name} (the last of {len(orders)} orders or datasets)", None
        if stages or isinstance(train, list) or section.get("stride"):
            return name, None
        attempts = [read_mapping(path) for path in self._run.glob(f"{Path(ENVIRONMENT_FILE).stem}*.json")]
        sizes = {part["tokens_per_epoch"] for attempt in attempts for part in attempt.get("datasets", [])}
        return name, sizes.pop() if len(sizes) == 1 == len(orders) else None

    def _validation(self) -> Iterator[Fact]:
        rows = self._validations()
        for row in rows:
            words = [_loss(row["loss"])]
            if row.get("bits_per_byte") is not None:
                words.append(f"{row['bits_per_byte']:.3f} bits per byte")
            over = f" ({row['targets']:,} tokens)" if row.get("targets") else ""
            yield str(row.get("dataset", "validation")), ", ".join(words) + over
        manifest = self.manifest
        loss, count = manifest.whole_validation_loss, manifest.whole_validation_tokens
        if loss is None:
            loss, count = manifest.validation_loss, manifest.validation_tokens
        if loss is not None and not rows and not self.ema:
            tokens = f" ({count:,} tokens)" if count else ""
            yield "validation", f"{_loss(loss)}{tokens}"

    def _validations(self) -> list[Row]:
        """The last validation of each dataset at this step and attempt, from metrics.jsonl; of an average its loss."""
        if self._metrics is None:
            return []
        step, attempt = self.manifest.step, self.manifest.attempt
        rows = [row for row in live_rows(read_metrics(self._metrics)) if row["kind"] == "eval" and row["step"] == step]
        rows = [row for row in rows if row.get("attempt", 1) == attempt]
        if self.ema:  # the other columns are of the weights themselves
            rows = [{**row, "loss": row.get("ema_loss"), "perplexity": None, "bits_per_byte": None} for row in rows]
        rows = [row for row in rows if isinstance(row.get("loss"), float) and math.isfinite(row["loss"])]
        return list({row.get("dataset"): row for row in rows}.values())

    def _settings(self) -> Iterator[Fact]:
        manifest = self.manifest
        for segment in manifest.schedule.segments:
            yield "learning rate", str(ScheduleSegment.of(segment))
        for last in manifest.data_position.segments[-1:]:
            yield "batch", f"{last.global_batch} sequences of {last.sequence_length:,} tokens"
        if optimizer := _optimizer(self.checkpoint / "deepspeed.json"):
            yield "optimizer", optimizer
        if topology := manifest.topology:
            yield "precision", f"{topology.precision}, fp32 masters; ZeRO stage {topology.zero_stage}"
            context = f" x {topology.context} context" if topology.context > 1 else ""
            grid = f"{topology.data} data{context} x {topology.tensor} tensor x {topology.pipeline} pipeline"
            grid += f", {topology.expert} expert" if topology.expert > 1 else ""
            yield "ranks", f"{topology.world_size} ({grid})"
        if manifest.data.get("data.document_mask"):
            yield "documents", "attention does not cross document boundaries"
        environment = read_mapping(self._run / ENVIRONMENT_FILE) if manifest.run == self._run.name else {}
        packages = environment.get("packages") or {}
        versions = [f"{name} {packages[name]}" for name in ("megalm", "deepspeed", "torch") if packages.get(name)]
        if versions:
            yield "versions", ", ".join(versions)
        seed = manifest.data.get("train.seed")
        if seed is not None:
            yield "seed", str(seed)
        if created := manifest.created:
            yield "checkpoint", f"step {manifest.step:,} of {manifest.run}, {created}"
        if manifest.status != "good":
            yield "marked", f"{manifest.status}: {manifest.status_reason}"

    def _use(self) -> str:
        generate = f"max_new_tokens={min(_NEW_TOKENS, self.shape.max_position_embeddings // 2)}"
        load = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
            'model = AutoModelForCausalLM.from_pretrained("PATH")\n'
            'inputs = tokenizer("Once", return_tensors="pt")\n'
            f"print(tokenizer.decode(model.generate(**inputs, {generate})[0]))\n"
        )
        begin = "" if self.manifest.bos_id is None else f"[{self.manifest.bos_id}] + "
        if TOKENIZER not in self.tokenizer.files:
            load = (
                "import sentencepiece\nimport torch\nfrom transformers import AutoModelForCausalLM\n\n"
                f'tokenizer = sentencepiece.SentencePieceProcessor(model_file="PATH/{SENTENCEPIECE}")\n'
                'model = AutoModelForCausalLM.from_pretrained("PATH")\n'
                f'ids = torch.tensor([{begin}tokenizer.encode("Once")])\n'
                f"print(tokenizer.decode(model.generate(ids, {generate})[0].tolist()))\n"
            )
        return f"## Use\n\n`PATH` is this folder.\n\n```python\n{load}```\n"

    def _limits(self) -> Iterator[str]:
        yield f"The model takes at most {self.shape.max_position_embeddings:,} tokens."
        if self.manifest.bos_id is None:
            yield "Training used no beginning-of-sequence token; a document ends with the end-of-sequence token."
        else:
            yield (
                "In training a document began with the beginning-of-sequence token "
                f"(id {self.manifest.bos_id}), which the tokenizer puts before a text; give no text without it."
            )
        yield f"Tokenizer: {self.tokenizer.note}."
        if TOKENIZER in self.tokenizer.files:
            yield (
                "The name of a special token in a text is read as that token. In training such a name was text, as "
                "`tokenizer(text, split_special_tokens=True)` reads it."
            )
            if "pad_token" not in self.tokenizer.special:
                yield (
                    "The vocabulary has no token to pad with. If you pad with the end-of-sequence token, mask the "
                    "padding by its position: a model that is never trained on that token does not learn to stop."
                )
        yield "Choose a licence before you publish the model; the training texts have licences too."


def _mixture(train: str | list[dict[str, Any]]) -> str:
    """The names and weights of the configured datasets."""
    if isinstance(train, str):
        return Path(train).name
    return ", ".join(f"{Path(part['prefix']).name} (weight {part['weight']:g})" for part in train)


def _optimizer(path: Path) -> str | None:
    """The optimizer's type and parameters and the clipping in a DeepSpeed JSON."""
    try:
        settings = open_deepspeed_json(path).settings
    except ConfigError:
        return None
    section, clipping = settings.optimizer, settings.gradient_clipping
    if section is None:
        return None
    numbers = [f"{name} {value}" for name, value in section.params.model_dump(mode="json", exclude_unset=True).items()]
    return ", ".join([section.type, *numbers, *([f"clipped at norm {clipping:g}"] if clipping else [])])


def _loss(nats: float) -> str:
    return f"loss {nats:.4f} nats per token, perplexity {perplexity_of(nats):,.2f}"


def _cell(text: str) -> str:
    """Escape text for one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
