"""What a run is: a typed, strict, printable description, read from YAML and `key=value` overrides."""

from llava_npu.config.loading import load_as, load_config, render_config, set_key, validate
from llava_npu.config.schema import DataConfig, Fsdp2Config, ModelConfig, OptimizerConfig, RunConfig, ZeroConfig

__all__ = [
    "DataConfig",
    "Fsdp2Config",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "ZeroConfig",
    "load_as",
    "load_config",
    "render_config",
    "set_key",
    "validate",
]
