"""The fused operators: real signatures, reference arithmetic, and a refusal of every call the real operator refuses.

Each file is one operator (or one family), written after the operator's own documentation in the torch-npu wheel. Where
the real operator would take a call and compute something other than what was plainly meant (full attention because a
mask is missing, a mask of inverted sense), the stand-in refuses it too.
"""

from torch_npu.fused._operator import RejectedCallError
from torch_npu.fused.fusion_attention import npu_fusion_attention
from torch_npu.fused.inference_attention import (
    npu_fused_infer_attention_score,
    npu_incre_flash_attention,
    npu_prompt_flash_attention,
)
from torch_npu.fused.rms_norm import npu_rms_norm
from torch_npu.fused.rotary_mul import npu_rotary_mul
from torch_npu.fused.swiglu import npu_swiglu

__all__ = [
    "RejectedCallError",
    "npu_fused_infer_attention_score",
    "npu_fusion_attention",
    "npu_incre_flash_attention",
    "npu_prompt_flash_attention",
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_swiglu",
]
