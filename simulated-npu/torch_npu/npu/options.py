"""Switches that change how a real device computes. They are stored, so that a test can see them set; nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class _Config:
    allow_internal_format: bool = True


@dataclass
class _AllowHf32:
    """HF32 is the NPU's reduced-precision float32, as TF32 is on CUDA."""

    allow_hf32: bool


config = _Config()
matmul = _AllowHf32(allow_hf32=False)
conv = _AllowHf32(allow_hf32=True)

_jit_compile = True


def set_compile_mode(jit_compile: bool = False) -> None:
    """jit_compile=False uses precompiled kernels instead of compiling one for every new shape."""
    global _jit_compile
    _jit_compile = jit_compile


def is_jit_compile_false() -> bool:
    return not _jit_compile
