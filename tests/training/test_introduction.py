"""What a run says about its operators."""

from __future__ import annotations

import torch
from transformers import Gemma2Config, Gemma2Model

from llava_npu.ops.fuse import FusedModules, fuse
from llava_npu.training.introduction import fused_operations


def test_what_is_fused_and_what_is_not_is_named() -> None:
    config = Gemma2Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8, vocab_size=16
    )
    with torch.device("meta"):
        model = Gemma2Model(config)
    text = fused_operations(fuse(model, torch.device("cpu"), ("rms_norm", "rotary", "swiglu")))
    assert text is not None
    assert text.startswith("fused operators: 1 × rotary, 5 × rms_norm; not fused: 1 × swiglu (its activation is ")
    assert fused_operations(FusedModules()) is None
