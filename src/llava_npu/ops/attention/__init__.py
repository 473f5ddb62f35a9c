"""Scaled dot-product attention in the forms that a language model and a vision tower need.

- `packed_attention`: sequences laid end to end, their lengths known on the host (training; no padding, no host sync).
- `batched_attention`: sequences of one length, causal or not (vision towers, unpadded prompts, decoding with a cache).
- `cached_attention`: one new token per sequence over a cache of fixed size (decoding; lengths known on the host).
- `masked_attention`: any boolean mask (padded batches with a cache, and whatever else transformers asks for).

`transformers_interface` offers them to every transformers model under one name.
"""

from llava_npu.ops.attention.functional import batched_attention, cached_attention, masked_attention, packed_attention
from llava_npu.ops.attention.implementation import Scoring

__all__ = ["Scoring", "batched_attention", "cached_attention", "masked_attention", "packed_attention"]
