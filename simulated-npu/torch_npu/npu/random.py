"""Random numbers: every device has one generator."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from torch_npu import _C
from torch_npu.npu.utils import DeviceLike, current_device, device_count, device_index


def get_rng_state(device: DeviceLike = "npu") -> torch.Tensor:
    return _C.default_generator(device_index(device)).get_state()


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state(index) for index in range(device_count())]


def set_rng_state(new_state: torch.Tensor, device: DeviceLike = "npu") -> None:
    _C.default_generator(device_index(device)).set_state(new_state)


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


def manual_seed(seed: int) -> None:
    _C.default_generator(current_device()).manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    for index in range(device_count()):
        _C.default_generator(index).manual_seed(int(seed))


def seed() -> None:
    _C.default_generator(current_device()).seed()


def seed_all() -> None:
    fresh = _C.default_generator(0).seed()
    for index in range(1, device_count()):
        _C.default_generator(index).manual_seed(fresh)


def initial_seed() -> int:
    return _C.default_generator(current_device()).initial_seed()
