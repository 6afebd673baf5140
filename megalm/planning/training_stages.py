"""Batch and sequence length of each step of a run, and what follows from them: samples, tokens, steps.

Steps count from 1. Everything that multiplies steps by a batch or a sequence length asks here, since either may grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import zip_longest

from megalm.config.schema import RunConfig


@dataclass(frozen=True)
class TrainingStage:
    """From `first_step` on, each step reads `sequences` sequences of `sequence_length` tokens.

    Attributes:
        parts: sequences that a sample is cut into.
    """

    first_step: int
    sequences: int
    sequence_length: int
    parts: int = 1

    @property
    def samples(self) -> int:
        """Of one step."""
        return self.sequences // self.parts

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.sequences * self.sequence_length


@dataclass(frozen=True)
class TrainingStages:
    """The stages of a run in order, the first one from step 1 on; the last one does not end."""

    stages: tuple[TrainingStage, ...]

    @staticmethod
    def of(config: RunConfig, sequences: int) -> TrainingStages:
        """Return the stages of a run whose first step has a batch of `sequences`."""
        data, batch, length = config.data, sequences, config.data.sequence_length
        batches = {max(1, stage.from_step): stage.sequences for stage in config.schedule.batch}
        lengths = {stage.from_step: stage.sequence_length for stage in data.stages if stage.sequence_length}
        found: list[TrainingStage] = []
        for step in sorted({1, *batches, *lengths}):
            batch, length = batches.get(step, batch), lengths.get(step, length)
            if not found or (batch, length) != (found[-1].sequences, found[-1].sequence_length):
                found.append(TrainingStage(step, batch, length, data.sample_length // length))
        return TrainingStages(tuple(found))

    @staticmethod
    def from_json(value: object) -> TrainingStages | None:
        """Return what `as_json` gave; None: it is not that."""
        try:
            stages = tuple(TrainingStage(*map(int, stage)) for stage in value)  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            return None
        is_whole = bool(stages) and all(min(astuple(stage)) > 0 for stage in stages)
        return TrainingStages(stages) if is_whole else None

    def as_json(self) -> list[list[int]]:
        """Return first step, sequences, sequence length and parts of each stage."""
        return [list(astuple(stage)) for stage in self.stages]

    @property
    def grow(self) -> bool:
        """Whether steps differ."""
        return len(self.stages) > 1

    @property
    def largest_batch(self) -> int:
        return max(stage.sequences for stage in self.stages)

    @property
    def longest(self) -> TrainingStage:
        """The stage of the longest sequences, and of several the one with the largest batch."""
        return max(self.stages, key=lambda stage: (stage.sequence_length, stage.sequences))

    def at(self, step: int) -> TrainingStage:
        """Return the stage of step `step`; of step 0, the first one."""
        return next((stage for stage in reversed(self.stages) if stage.first_step <= step), self.stages[0])

    def spans(self, steps: int, after: int = 0) -> Iterator[tuple[TrainingStage, int]]:
        """Yield each stage that steps `after` + 1 to `steps` have a part in, and the number of these steps."""
        for stage, following in zip_longest(self.stages, self.stages[1:]):
            end = steps if following is None else min(steps, following.first_step - 1)
            count = end - max(after, stage.first_step - 1)
            if count > 0:
                yield stage, count

    def samples(self, steps: int, after: int = 0) -> int:
        """Return the number of samples of steps `after` + 1 to `steps`; 0 if there are none."""
        return sum(stage.samples * count for stage, count in self.spans(steps, after))

    def tokens(self, steps: int, after: int = 0) -> int:
        """Return the number of tokens of steps `after` + 1 to `steps`; 0 if there are none."""
        return sum(stage.tokens * count for stage, count in self.spans(steps, after))

    def steps_for(self, tokens: int) -> int:
        """Return the least number of steps, from the first one, with at least `tokens` tokens."""
        done = 0
        for stage, following in zip_longest(self.stages, self.stages[1:]):
            needed = -(-tokens // stage.tokens)
            length = needed if following is None else following.first_step - stage.first_step
            if needed <= length:
                break
            done, tokens = done + length, tokens - length * stage.tokens
        return done + needed
