"""`torch.distributed` on NPUs: the backend "hccl", carried by gloo."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from torch_npu import _C


def is_hccl_available() -> bool:
    return True


def _make_hccl(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Backend:
    return _C.make_hccl(dist.ProcessGroupGloo(dist.PrefixStore("hccl", store), rank, size, timeout))


dist.Backend.register_backend("hccl", _make_hccl, devices=["npu"])
