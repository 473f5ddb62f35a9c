"""Projectors that give several numbers of tokens with the same weights: MQT, and Matryoshka pooling (M3)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from llava_npu.models.projectors import NestedProjector, build_projector
from llava_npu.models.projectors.positions import sincos_table

VISION, TEXT, GRID = 16, 24, (4, 6)


def _randomised(type: str, **options: object) -> NestedProjector:
    torch.manual_seed(0)
    projector = build_projector(type, vision_hidden_size=VISION, text_hidden_size=TEXT, **options).double()
    for parameter in projector.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert isinstance(projector, NestedProjector)
    return projector


@pytest.mark.parametrize("tokens", [1, 5, 9])
def test_mqts_first_queries(tokens: int) -> None:
    """Torch's attention and bicubic interpolation, for the first queries alone."""
    ours = _randomised("mqt", num_queries=9, num_heads=4, tokens=tokens)
    weights = ours.state_dict()
    attention = nn.MultiheadAttention(VISION, 4, batch_first=True).double()
    attention.load_state_dict({key.removeprefix("attn."): weights[key] for key in weights if key.startswith("attn.")})

    def norm(name: str, value: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(value, (VISION,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    table = sincos_table(3, VISION)
    resized = functional.interpolate(table.T.reshape(1, VISION, 3, 3), GRID, mode="bicubic").flatten(2)[0].T.double()
    features = torch.randn(2, 24, VISION, dtype=torch.float64)
    queries = norm("ln_q", weights["query"][:tokens] + table[:tokens].double()).expand(2, -1, -1)
    attended, _ = attention(queries, norm("ln_k", resized).expand(2, -1, -1), norm("ln_v", features))
    torch.testing.assert_close(ours(features, GRID), attended @ weights["proj"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("tokens", "side"), [(24, 1), (6, 2)])
def test_matryoshka_pooling(tokens: int, side: int) -> None:
    ours = _randomised("matryoshka_pool", tokens=tokens)
    features = torch.randn(2, 24, VISION, dtype=torch.float64)
    expected = nn.AvgPool2d(side)(ours.mlp(features).transpose(1, 2).unflatten(2, GRID)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours(features, GRID), expected, rtol=0, atol=1e-12)
    assert ours.options.token_grid(GRID) == (4 // side, 6 // side)


@pytest.mark.parametrize(
    ("type", "counts"), [("mqt", [3, 9, 1, 3]), ("matryoshka_pool", [6, 24, 24, 6]), ("matryoshka_pool", [6] * 4)]
)
def test_each_image_its_own_number(type: str, counts: list[int]) -> None:
    """As from projectors that give these numbers, with the gradients."""
    options = {"num_queries": 9, "num_heads": 4} if type == "mqt" else {}
    ours = _randomised(type, **options)
    features = torch.randn(4, 24, VISION, dtype=torch.float64)
    together = ours(features, GRID, counts)
    assert together.shape == (sum(counts), TEXT)
    target = torch.randn_like(together)
    gradients = torch.autograd.grad((together * target).sum(), list(ours.parameters()))
    alone = []
    for image, count in zip(features, counts, strict=True):
        alone.append(_randomised(type, tokens=count, **options)(image[None], GRID)[0])
        assert len(alone[-1]) == count
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)
    separate = [ours(image[None], GRID, [count]) for image, count in zip(features, counts, strict=True)]
    summed = torch.autograd.grad((torch.cat(separate) * target).sum(), list(ours.parameters()))
    torch.testing.assert_close(gradients, summed, rtol=0, atol=1e-11)
