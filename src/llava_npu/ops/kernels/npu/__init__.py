"""Kernels for Huawei Ascend NPUs."""

from llava_npu.ops.kernels.npu import attention, layers

__all__ = ["attention", "layers"]
