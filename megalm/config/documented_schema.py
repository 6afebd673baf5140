"""What a document says of the run that a recipe follows: it is judged and told of, and changes no run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megalm.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section

Quantity = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# In rising order, however they were written.
Ends = Annotated[tuple[Quantity, Quantity], AfterValidator(lambda ends: (min(ends), max(ends)))]

ClaimKind = Literal[
    "parameters",
    "embedding_parameters",
    "tokens",
    "tokens_per_step",
    "data_tokens",
    "samples",
    "epochs",
    "tokens_per_second",
    "step_seconds",
    "hours",
    "mfu",
    "weights_gb",
    "gradients_gb",
    "optimizer_gb",
    "activations_gb",
    "training_loss",
    "validation_loss",
    "perplexity",
]


class Claim(Section):
    """A number of a document, or the two ends of a range; of a loss the step, none: the last one."""

    claim: ClaimKind
    value: Quantity | Ends
    step: NonNegativeInt | None = None
    stride: PositiveInt | None = None


class DocumentedSection(Section):
    """What a document says of the run that a recipe follows: judged by `megalm plan`, told of; it changes no run."""

    device: str | None = Field(default=None, description="as in megalm/estimate/data_sheet.py")
    devices: PositiveInt | None = None
    device_memory_gib: PositiveFloat | None = None
    claims: tuple[Claim, ...] = Field(
        default=(), description="a list of {claim, value}, a loss with its step, a number of samples with its stride"
    )
