"""The vLLM plug-in against stand-ins of the classes that it touches; `make test-vllm` opens models in vLLM itself."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from in_vllm.outcomes import table
from llava_npu import LlavaNpuConfig, LlavaNpuForConditionalGeneration, UserError
from llava_npu.models.projectors import build_projector
from support import tiny

IMAGE_TOKEN_ID = 300


class _Registry:
    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def get_supported_archs(self) -> list[str]:
        return list(self.models)

    def register_model(self, name: str, where: str) -> None:
        self.models[name] = where


class _ProcessingInfo:
    def __init__(self, config: LlavaNpuConfig):
        self.ctx = SimpleNamespace(get_hf_config=lambda kind: config)


class _Llava(nn.Module):
    """As vLLM's: the tower's features go to `multi_modal_projector` as they are."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.multi_modal_projector: nn.Module = nn.Identity()


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Registry]:
    registry = _Registry()
    names = {
        "vllm": {"ModelRegistry": registry},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.llava": {
            "LlavaForConditionalGeneration": _Llava,
            "LlavaProcessingInfo": _ProcessingInfo,
            "LlavaMultiModalProcessor": object,
            "LlavaDummyInputsBuilder": object,
        },
        "vllm.multimodal": {
            "MULTIMODAL_REGISTRY": SimpleNamespace(register_processor=lambda *args, **kwargs: lambda cls: cls)
        },
    }
    for name, values in names.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    yield registry
    sys.modules.pop("llava_npu.serving.vllm.model", None)


def test_the_outcomes_in_vllm_are_in_the_docs() -> None:
    """Each row is held by tests/in_vllm."""
    assert table() in (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def _config(projector: str, **options: Any) -> LlavaNpuConfig:
    return LlavaNpuConfig(
        vision_config=tiny.clip_config(),
        text_config=tiny.text_config(),
        image_token_index=IMAGE_TOKEN_ID,
        projector_type=projector,
        projector_options=options,
    )


def test_the_installed_entry_point_registers_the_model(vllm: _Registry) -> None:
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="llava_npu")
    register = entry.load()
    register()
    register()  # vLLM calls it in every process, and may do so twice
    ((name, where),) = vllm.models.items()
    module, _, attribute = where.partition(":")
    assert name == LlavaNpuForConditionalGeneration.__name__  # what checkpoints call their architecture
    assert issubclass(getattr(importlib.import_module(module), attribute), _Llava)


@pytest.mark.parametrize("projector", ["ldpv2", "resampler", "adaptive_pool"])
def test_projector_and_number_of_tokens_are_the_models(vllm: _Registry, projector: str) -> None:
    from llava_npu.serving.vllm.model import LlavaNpuProcessingInfo, VllmLlavaNpu

    config = _config(projector, num_queries=4)
    assert LlavaNpuProcessingInfo(config).get_num_image_tokens(image_width=640, image_height=480) == 4
    model = VllmLlavaNpu(vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_config=config)))
    reference = build_projector(projector, vision_hidden_size=32, text_hidden_size=48, num_queries=4)
    names = {f"multi_modal_projector.{name}" for name in reference.state_dict()}
    assert {name for name in model.state_dict() if name.startswith("multi_modal_projector.")} == names
    reference.load_state_dict(model.multi_modal_projector.state_dict())
    features = torch.randn(2, 16, 32)
    torch.testing.assert_close(model.multi_modal_projector(features), reference(features, grid=(4, 4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_layers": [22, 12, 16]}, r"takes 3 layers.*llava-npu serve"),
        ({"scales": [1, 2]}, r"scales \[1, 2\].*llava-npu serve"),
        ({"vision_config": SimpleNamespace(model_type="dinov2")}, r"a vision tower of type 'dinov2'.*llava-npu serve"),
        ({"vision_config": SimpleNamespace(model_type="llava_npu_two_towers")}, r"has two vision towers"),
        ({"tiling": object()}, r"several tiles.*llava-npu serve"),
    ],
)
def test_what_vllm_would_not_notice_is_refused(vllm: _Registry, changes: dict[str, Any], message: str) -> None:
    from llava_npu.serving.vllm.model import VllmLlavaNpu

    plain = {
        "vision_config": tiny.clip_config(),
        "feature_layers": [22],
        "projector_type": "tokenpacker",
        "scales": [1],
        "tiling": None,
    }
    config = SimpleNamespace(**{**plain, **changes})
    with pytest.raises(UserError, match=message):
        VllmLlavaNpu(vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_config=config)))
