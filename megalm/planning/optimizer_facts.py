"""The optimizer of a resolved run: Adam or AdamW, or Muon for the matrices of the blocks with AdamW for the rest."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megalm.config.deepspeed.json_reader import DeepSpeedConfig
from megalm.config.deepspeed.json_schema import AdjustRate
from megalm.model.parameter_groups import Algorithm, RateScales


def rate_factor(adjust: AdjustRate, rows: int, columns: int) -> float:
    """Return by what a matrix's learning rate is multiplied for its shape.

    `original`: updates of a matrix with more outputs than inputs grow with their root. `match_rms_adamw`: an update is
    as large, by its root mean square, as AdamW's usual one.
    """
    if adjust == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


@dataclass(frozen=True)
class MuonFacts:
    """Muon's settings; names as in torch.optim.Muon."""

    momentum: float
    nesterov: bool
    ns_coefficients: tuple[float, float, float]
    ns_steps: int
    adjust_lr_fn: AdjustRate

    def __str__(self) -> str:
        nesterov = ", nesterov" if self.nesterov else ""
        return f"muon, momentum {self.momentum:g}{nesterov}, {self.ns_steps} steps, rate by shape: {self.adjust_lr_fn}"


@dataclass(frozen=True)
class OptimizerFacts:
    """Adam's settings, for all parameters or those that are not Muon's.

    Attributes:
        kind: "adam" adds weight decay to the gradient, "adamw" subtracts it from the weight; "muon" is AdamW beside it.
        rates: algorithm -> its peak learning rate, where it is not the schedule's.
    """

    kind: Literal["adamw", "adam", "muon"]
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    muon: MuonFacts | None = None
    rates: tuple[tuple[Algorithm, float], ...] = ()

    def rate_scales(self, peak: float, width_multiplier: float = 1.0) -> RateScales:
        """Return for each algorithm, and for hidden matrices, the factor of the learning rate to the schedule's.

        Args:
            peak: of the schedule.
            width_multiplier: m of the maximal-update parametrisation. An update of Adam has elements of one size, so
                its product with a layer's input grows with the width. An orthogonal matrix of Muon keeps lengths;
                `match_rms_adamw` multiplies it by the root of the width.
        """
        own: dict[Algorithm, float] = dict(self.rates)
        hidden: dict[Algorithm, float] = {"adam": 1 / width_multiplier, "muon": 1.0}
        if self.muon is not None and self.muon.adjust_lr_fn == "match_rms_adamw":
            hidden["muon"] = 1 / math.sqrt(width_multiplier)
        plain = {algorithm: own.get(algorithm, peak) / peak for algorithm in hidden}
        return {
            **{(algorithm, False): scale for algorithm, scale in plain.items()},
            **{(algorithm, True): scale * hidden[algorithm] for algorithm, scale in plain.items()},
        }

    def as_json(self) -> dict[str, Any]:
        """Return it as a section of a DeepSpeed JSON; learning rates without their own are the schedule's."""
        kind = {"adamw": "AdamW", "adam": "Adam", "muon": "Muon"}[self.kind]
        parameters: dict[str, Any] = {
            "betas": list(self.betas),
            "eps": self.epsilon,
            "weight_decay": self.weight_decay,
        }
        if self.muon is not None:
            parameters |= asdict(self.muon) | {"ns_coefficients": list(self.muon.ns_coefficients)}
        return {"type": kind, "params": parameters | {f"{algorithm}_lr": rate for algorithm, rate in self.rates}}

    def __str__(self) -> str:
        return (
            f"{'adamw' if self.kind == 'muon' else self.kind}, betas {self.betas[0]:g} and {self.betas[1]:g}, "
            f"eps {self.epsilon:g}, weight decay {self.weight_decay:g}"
        )


def optimizer_facts(ds: DeepSpeedConfig) -> tuple[OptimizerFacts, list[str]]:
    """Return the optimizer of a JSON, and a notice for each default that a person may not expect."""
    section = ds.settings.optimizer
    if section is None:
        facts = OptimizerFacts("adamw", (0.9, 0.95), 1e-8, 0.1)
        return facts, [f"{ds.path} has no optimizer: AdamW, betas 0.9 and 0.95, eps 1e-8, weight_decay 0.1"]
    params = section.params
    if section.is_muon:  # DeepSpeed has other defaults for the Adam beside Muon
        defaults = {"betas": (0.9, 0.95), "eps": 1e-10}
        own = {name: it for name, it in defaults.items() if f"optimizer.params.{name}" not in ds.explicit_keys}
        params = params.model_copy(update=own)
    notices = [
        f"{ds.path} has no optimizer.params.{name}: {value}"
        for name, value in (("betas", params.betas), ("eps", params.eps), ("weight_decay", params.weight_decay))
        if f"optimizer.params.{name}" not in ds.explicit_keys
    ]
    adam = params.betas, params.eps, params.weight_decay
    if not section.is_muon:
        # DeepSpeed's "Adam" is AdamW too, unless adam_w_mode is false.
        adamw = section.type.lower() == "adamw" or params.adam_w_mode
        return OptimizerFacts("adamw" if adamw else "adam", *adam), notices
    muon = MuonFacts(params.momentum, params.nesterov, params.ns_coefficients, params.ns_steps, params.adjust_lr_fn)
    rates: tuple[tuple[Algorithm, float | None], ...] = (("muon", params.muon_lr), ("adam", params.adam_lr))
    given = tuple((algorithm, rate) for algorithm, rate in rates if rate is not None)
    return OptimizerFacts("muon", *adam, muon, given), notices
