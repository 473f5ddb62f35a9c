"""Fused operations: one signature each, an implementation per device behind it.

Besides `devices/`, this is the only folder that may call an accelerator's own operators, and it does so only for
tensors that are already on that accelerator: `torch_npu` is imported when the first such tensor arrives, never before.
"""
