"""Tasks of EleutherAI's lm-evaluation-harness, which asks a checkpoint through its own model interface.

The harness reads the data, makes the prompts and takes the metrics; texts are encoded, cut and scored as its `hf` model
does it for an exported checkpoint, so the numbers are those of `lm_eval --model hf`. `lm_eval` is an extra.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from pydantic import ValidationError

from megalm.communicator import SingleProcessCommunicator
from megalm.config.schema import SampleSection
from megalm.data.sampling.batch_loader import ScoredSequence, SequenceBatches
from megalm.data.sampling.samples import evenly
from megalm.errors import ConfigError, DataError
from megalm.inference.dataset_eval import Row
from megalm.inference.generation import CachedModel
from megalm.inference.inference_model import InferenceModel
from megalm.train.text_samples import extend, prompt_tokens
from megalm.utils.did_you_mean import did_you_mean

SOURCE = "lm_eval"
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")  # of SampleSection, with the harness's names
_OFFLINE = "without internet, name a task YAML with local data, or fill the cache of datasets (HF_HOME) elsewhere"
_YAML = (".yaml", ".yml")


class HarnessTask:
    """Tasks and groups of the harness; see `DatasetTask`. The data is read once for all checkpoints.

    Args:
        loaded: by `TaskManager.load`.
        max_samples: the largest number of documents of each task, evenly spaced.
        tell: called with lines for the user.
    """

    def __init__(
        self, loaded: dict[str, Any], batch_size: int, max_samples: int | None, tell: Callable[[str], None]
    ) -> None:
        self._loaded, self._batch_size, self._tell = loaded, batch_size, tell
        self._documents = {name: evenly(len(task.eval_docs), max_samples) for name, task in loaded["tasks"].items()}

    @property
    def batches(self) -> int:
        """The documents, which `heartbeat` counts."""
        return sum(map(len, self._documents.values()))

    def rows(self, model: InferenceModel, heartbeat: Callable[[float], None]) -> list[Row]:
        """A result for each task and group."""
        harness = HarnessModel(model, self._batch_size, heartbeat)
        found = ask(harness, self._loaded, samples=self._documents, log_samples=False)
        if harness.cut:
            self._tell(f"{harness.cut:,} contexts of tasks exceed the model's window and lose their beginning")
        everything = {**found["results"], **found.get("groups", {})}
        return [
            {
                "source": SOURCE,
                "dataset": name,
                "task": name,
                "questions": int(numbers["sample_len"]),
                "fewshot": found["n-shot"].get(name),
                "version": found["versions"].get(name),
                **_metrics(numbers),
            }
            for name, numbers in everything.items()
        ]


def ask(model: HarnessModel, loaded: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Evaluate loaded tasks, as `lm_eval.simple_evaluate` does it; options are those of `lm_eval.evaluate`."""
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # the same examples for each checkpoint
    with redirect_stdout(sys.stderr):  # it prints what it does; stdout holds results only
        found: dict[str, Any] = evaluate(model, loaded, **options)
    return found


def _metrics(numbers: dict[str, Any]) -> Row:
    """The metrics of a task and their standard errors, by name; with its filter's name where there is one."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in numbers.items():
        metric, comma, kind = key.partition(",")
        if not comma or isinstance(value, str) or not np.isscalar(value):
            continue
        name = f"{metric.removesuffix('_stderr')}{'' if kind == 'none' else f' ({kind})'}"
        (errors if metric.endswith("_stderr") else metrics)[name] = float(value)  # type: ignore[arg-type]  # a scalar
    return {"metrics": metrics, "errors": errors}


def load_tasks(
    words: Sequence[str],
    include: Sequence[Path],
    fewshot: int | None,
    watched: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> dict[str, Any]:
    """Load tasks with their data, as `lm_eval.simple_evaluate` does it.

    Args:
        words: names, or patterns, of tasks, groups and tags; YAML files; folders of YAML files, for all in them.
        include: folders whose tasks can be named too.
        fewshot: examples in each prompt, of tasks that do not fix their number at 0; None: as each task says.
        watched: iterates over the words; a caller can show the progress.

    Raises:
        ConfigError: there is no such task.
        DataError: a task's YAML or data cannot be read or fetched.
    """
    random.seed(DEFAULT_RANDOM_SEED)  # some tasks shuffle
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for name in ("datasets", "huggingface_hub", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)  # each try to fetch something
    absent = [str(folder) for folder in include if not folder.is_dir()]
    if absent:
        raise ConfigError(f"--include-path {', '.join(absent)}: no such folder")
    loader = _Loader(include)
    objects = [found for word in watched(words) for found in loader.load(word)]
    try:
        loaded: dict[str, Any] = loader.manager(()).load(objects)
    except ValueError as error:  # a task twice
        raise ConfigError(f"--tasks {','.join(words)}: {error}; name each once") from None
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)
    return loaded


class _Loader:
    """Loads tasks and groups. The harness's own ones, thousands of files, are looked through once, and where needed."""

    def __init__(self, include: Sequence[Path]) -> None:
        self._include = include
        self._managers: dict[tuple[tuple[Path, ...], bool], Any] = {}

    def manager(self, folders: Sequence[Path], own: bool = False) -> Any:
        """The `TaskManager` of these folders and, with `own`, of the harness's tasks."""
        key = tuple(folders), own
        if key not in self._managers:
            paths = [str(folder) for folder in folders]
            self._managers[key] = TaskManager(include_path=paths, include_defaults=own)
        return self._managers[key]

    def load(self, word: str) -> list[Any]:
        """Load what a word names: see `load_tasks`."""
        path = Path(word).expanduser()
        if path.is_dir():
            return self._of_folder(path)
        if path.suffix in _YAML:
            if not path.is_file():
                raise DataError(f"--tasks {word}: no such file")
            return self._objects(str(path), [*self._include, path.parent], f"--tasks {word}")
        for own in (False, True):
            manager = self.manager(self._include, own)
            if names := manager.match_tasks([word]):
                return [found for name in names for found in self._objects(name, self._include, f"task {name}", own)]
        meant = did_you_mean(word, manager.all_tasks)
        raise ConfigError(f"--tasks {word}: lm-eval has no such task{meant}; `lm-eval ls tasks` lists all")

    def _of_folder(self, folder: Path) -> list[Any]:
        """All of a folder: its groups, and its tasks that are in none of them."""
        manager, found = self.manager([folder]), list[Any]()
        for names in (manager.all_groups, manager.all_subtasks):
            grouped = {task.task_name for one in found if hasattr(one, "get_all_tasks") for task in one.get_all_tasks()}
            for name in names:
                if name not in grouped:
                    found += self._objects(name, [*self._include, folder], f"--tasks {folder}: {name}")
        if not found:
            raise DataError(f"--tasks {folder}: the folder has no YAML file of a task")
        return found

    def _objects(self, name: str, folders: Sequence[Path], what: str, own: bool = False) -> list[Any]:
        """Load a group, or tasks; one that refers to the harness's own tasks, too.

        Raises:
            DataError: its YAML or data cannot be read or fetched.
        """
        try:
            try:
                loaded = self.manager(folders, own).load([name])
            except KeyError:
                loaded = self.manager(folders, True).load([name])
        except Exception as error:  # of many libraries
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise DataError(f"{what} cannot be loaded ({first}); {_OFFLINE}") from error
        return list(loaded["groups"].values()) or list(loaded["tasks"].values())


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval is not installed everywhere
    """A checkpoint as the harness asks it.

    Args:
        batch_size: rows per batch; changes memory and speed only.
        heartbeat: called with the number of documents, or its part, that are done.

    Attributes:
        cut: contexts that lost their beginning because they exceed the model's window.
    """

    def __init__(self, model: InferenceModel, batch_size: int, heartbeat: Callable[[float], None]) -> None:
        super().__init__()
        self._model, self._batch_size, self._heartbeat = model, batch_size, heartbeat
        self._length = model.shape.max_position_embeddings
        self._share = 1.0  # of a document, which each request or batch row is
        self.cut = 0

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        tokenizer = self._model.tokenizer
        return tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, as an export's tokenizer has them: with the bos_id, where there is one, once."""
        tokenizer = self._model.tokenizer
        if add_special_tokens is False:
            return tokenizer.encode_batch([string])[0].tolist()
        (tokens,) = tokenizer.encode_batch([string.removeprefix(tokenizer.bos_token or "")])
        return tokenizer.begun(tokens).tolist()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation after its context."""
        self._share = _documents(requests) / len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood in nats of each text, in windows that score each token once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self._length, context_len=1):
                context, continuation = make_disjoint_window(window)
                windows.append((None, context, continuation))
                owners.append(number)
        self._share = _documents(requests) / max(1, len(windows))
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The text after each context, up to a stop sequence or the end of the document."""
        cached, tokenizer, texts = CachedModel(self._model), self._model.tokenizer, []
        for number, request in enumerate(requests):
            context, options = request.args
            settings, stops = self._generation(options, request.task_name)
            room = self._length - settings.max_new_tokens
            if room < 1:
                raise ConfigError(
                    f"task {request.task_name} generates up to {settings.max_new_tokens} tokens, the model's window "
                    f"has {self._length}; set generation_kwargs.max_gen_toks in its YAML"
                )
            (prompt,) = prompt_tokens(tokenizer, [context])
            self.cut += len(prompt) > room
            tokens = prompt[-room:]
            begun = len(tokens)
            comm = SingleProcessCommunicator()
            for _ in extend(cached, comm, [tokens], tokenizer, settings, self._length, seed=number):
                if any(stop in tokenizer.decode(tokens[begun:]) for stop in stops):
                    break
            texts.append(postprocess_generated_text(tokenizer.decode(tokens[begun:]), stops, None))
            self._heartbeat(1)
        return texts

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        sequences = [self._sequence(*request) for request in requests]
        batches = SequenceBatches(sequences, self._batch_size)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(sequences)
        for index, batch in enumerate(batches):
            losses, greedy = self._model.score_rows(batch.micro_batches[0], greedy=True)
            places = batches.indices(index)
            for place, loss, is_greedy in zip(places, losses.tolist(), greedy.tolist(), strict=True):
                found[place] = -loss, is_greedy
            self._heartbeat(self._share * len(places))
        return found

    def _sequence(self, texts: object, context: list[int], continuation: list[int]) -> ScoredSequence:
        """The last tokens of context and continuation, as many as the window has, and one target more."""
        if not 0 < len(continuation) <= self._length:
            raise DataError(
                f"a task asks for a text of {len(continuation)} tokens, and the model's window has {self._length}: "
                f"{str(texts)[:200]}"
            )
        tokens = [*context, *continuation][-(self._length + 1) :]
        self.cut += len(tokens) < len(context) + len(continuation)
        return ScoredSequence(np.array(tokens), len(tokens) - len(continuation))

    def _generation(self, options: dict[str, Any], task: str) -> tuple[SampleSection, list[str]]:
        """How to draw tokens, and the texts to stop at."""
        wanted = normalize_gen_kwargs(options)
        stops = handle_stop_sequences(wanted.pop("until", None), eos=None)
        samples, temperature = wanted.pop("do_sample"), wanted.pop("temperature", 0.0)
        own = {name: wanted.pop(name) for name in _SAMPLING if name in wanted}
        if unknown := sorted(wanted.keys() - {"max_gen_toks"}):
            raise ConfigError(f"task {task}: generation_kwargs has {', '.join(unknown)}, which megalm does not know")
        own = {"top_k": None, **own} if samples else {"top_k": None}
        heat = temperature if samples else 0.0
        try:
            settings = SampleSection(max_new_tokens=wanted["max_gen_toks"], temperature=heat, **own)
        except ValidationError as error:
            (first, *_) = error.errors()
            raise ConfigError(f"task {task}: generation_kwargs.{first['loc'][0]}: {first['msg']}") from None
        return settings, [stop for stop in stops if stop]


def _documents(requests: Sequence[Any]) -> int:
    return len({(request.task_name, request.doc_id) for request in requests})
