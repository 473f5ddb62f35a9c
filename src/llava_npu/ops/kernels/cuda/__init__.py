"""Kernels for NVIDIA GPUs."""

from llava_npu.ops.kernels.cuda import attention

__all__ = ["attention"]
