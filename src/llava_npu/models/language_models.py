"""What language models of the Llama family do not have in common: what their head does, and the sizes of a tiny copy.

A language model is a decoder (`model`) and a head (`lm_head`). Most heads are one matrix. Phi-2's has a bias, Granite
and Cohere scale the logits, Gemma-2 caps them softly; transformers does this in each family's own class, which a LLaVA
model leaves out when it takes the decoder. Here the head does it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llava_npu.ops.linear_cross_entropy import IDENTITY, LogitTransform

_TINY = {"vocab_size": 64, "num_attention_heads": 4, "head_dim": 16, "hidden_size": 64, "intermediate_size": 48}
_TINY_IF_PRESENT = {  # of mixtures of experts
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_TINY_WINDOWS = ("sliding_window", "attention_chunk_size")
_OF_ONE_MODEL = ("_name_or_path", "transformers_version", "architectures", "dtype", "initializer_range", "use_cache")
TINY_WINDOW = 4  # tokens


@dataclass(frozen=True)
class HeadShape:
    """What a language model's head does: a matrix, perhaps a bias, then `transform`."""

    bias: bool = False
    transform: LogitTransform = IDENTITY


class LanguageModelHead(nn.Linear):
    """The head with all that its family does to the logits; its weights are named as any `lm_head`'s."""

    def __init__(self, text_config: PreTrainedConfig):
        shape = describe_head(text_config)
        super().__init__(text_config.hidden_size, text_config.vocab_size, bias=shape.bias)
        self.transform = shape.transform

    def with_weights(self, other: nn.Linear) -> LanguageModelHead:
        """This head with the parameters of `other`, which are shared, not copied."""
        self.weight, self.bias = other.weight, other.bias
        self.out_features, self.in_features = other.weight.shape
        return self

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., hidden size) → (..., vocabulary)."""
        return self.transform(super().forward(hidden))


def describe_head(text_config: PreTrainedConfig) -> HeadShape:
    """The head of a language model, from its configuration alone.

    The fields' names are those of transformers' families; whether they say all is what `proof.py` finds out.
    """
    scale = getattr(text_config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(text_config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(text_config, "final_logit_softcapping", None) or None  # Gemma-2
    try:
        bias = _has_bias(tiny_json(text_config))
    except (KeyError, TypeError, ValueError):  # not of the Llama family: refused before a model of it is made
        bias = False
    return HeadShape(bias, LogitTransform(scale, softcap))


@functools.cache
def _has_bias(tiny: str) -> bool:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_from_json(tiny))
    return getattr(getattr(model, "lm_head", None), "bias", None) is not None


def tiny_json(config: PreTrainedConfig) -> str:
    """The configuration of a tiny copy of a language model, as JSON: the same operations, few and small layers.

    One layer of each kind is left, two of an only kind. Windows shrink with the sizes, so that a short text leaves
    them. Models of one architecture have the same tiny copy, whatever their size.
    """
    values = config.to_dict()
    grouped = (values.get("num_key_value_heads") or values["num_attention_heads"]) != values["num_attention_heads"]
    has_head_dim = "head_dim" in values and "qk_rope_head_dim" not in values  # multi-head latent attention has several
    _keep_layers(values)
    values.update({name: size for name, size in _TINY.items() if name != "head_dim" or has_head_dim})
    values.update({name: size for name, size in _TINY_IF_PRESENT.items() if values.get(name)})
    values.update({name: TINY_WINDOW for name in _TINY_WINDOWS if values.get(name)})
    values["num_key_value_heads"] = 2 if grouped else 4
    values.update({name: number for number, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id"))})
    for parameters in _rope_parameters(values):
        pairs = int(_TINY["head_dim"] * parameters.get("partial_rotary_factor", 1.0)) // 2
        for name in ("short_factor", "long_factor"):  # LongRoPE: one factor for each pair of channels
            if factors := parameters.get(name):
                parameters[name] = factors[:pairs]
    for name in _OF_ONE_MODEL:
        values.pop(name, None)
    return json.dumps(values, sort_keys=True)


def config_from_json(text: str) -> PreTrainedConfig:
    values = json.loads(text)
    config: PreTrainedConfig = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    return config


def _keep_layers(values: dict[str, Any]) -> None:
    """Of the layers, the first of each kind, at least two; of lists with an entry per layer, theirs."""
    count = values["num_hidden_layers"]
    lists = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == count > 1}
    kinds = [tuple(str(value[layer]) for value in lists.values()) for layer in range(count)]
    kept = [layer for layer, kind in enumerate(kinds) if kind not in kinds[:layer]]
    kept = kept if len(kept) > 1 else [0, count - 1][:count]
    values.update({name: [value[layer] for layer in kept] for name, value in lists.items()})
    values["num_hidden_layers"] = len(kept)


def _rope_parameters(values: dict[str, Any]) -> list[dict[str, Any]]:
    """One dictionary, or one for each kind of layer."""
    parameters = values.get("rope_parameters") or {}
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    return nested or [parameters]
