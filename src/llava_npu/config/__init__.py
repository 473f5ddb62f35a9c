"""What a run is: a typed, strict, printable description, read from YAML and `key=value` overrides."""

from llava_npu.config.loading import load_as, load_config, render_config, set_key, validate
from llava_npu.config.schema import DataConfig, ModelConfig, OptimizerConfig, RunConfig

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "load_as",
    "load_config",
    "render_config",
    "set_key",
    "validate",
]
