"""What a rule across files looks at."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.deepspeed.json_reader import DeepSpeedConfig, DeviceFacts, choose_precision
from megalm.config.deepspeed.json_schema import DeepSpeedSettings, Precision, ZeroSection
from megalm.config.loading import LoadedConfig
from megalm.config.schema import RunConfig


@dataclass(frozen=True)
class CheckContext:
    """A run configuration together with its DeepSpeed JSON, the number of ranks and the device."""

    loaded: LoadedConfig
    ds: DeepSpeedConfig
    world_size: int
    device: DeviceFacts

    @property
    def config(self) -> RunConfig:
        return self.loaded.config

    @property
    def settings(self) -> DeepSpeedSettings:
        return self.ds.settings

    @property
    def zero(self) -> ZeroSection:
        return self.ds.settings.zero_optimization

    @property
    def precision(self) -> Precision:
        return choose_precision(self.settings, self.device)[0]

    @property
    def preset_words(self) -> str:
        return f"preset {self.loaded.preset}" if self.loaded.preset else "this configuration"
