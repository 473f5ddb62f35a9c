"""Connectors that other models have, against the modules of those models: Qwen2-VL's merger, BLIP-2's Q-Former."""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

from llava_npu.models.projectors import Projector, build_projector, feature_layers

VISION, TEXT, GRID = 16, 24, (6, 8)


def _randomised(type: str, **options: object) -> Projector:
    torch.manual_seed(0)
    projector = build_projector(type, vision_hidden_size=VISION, text_hidden_size=TEXT, **options).double()
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return projector


def test_qwen2_vls_merger() -> None:
    ours = _randomised("patch_merger")
    theirs = PatchMerger(TEXT, VISION).double()
    names = {"norm": "ln_q", "linear_1": "mlp.0", "linear_2": "mlp.2"}
    state = ours.state_dict()
    theirs.load_state_dict({f"{names[key.split('.')[0]]}.{key.split('.')[1]}": state[key] for key in state})
    features = torch.randn(2, 48, VISION, dtype=torch.float64)
    rows, columns = GRID
    blocks = [  # Qwen2-VL's image processor puts the four patches of a block next to each other
        (row + y) * columns + column + x
        for row in range(0, rows, 2)
        for column in range(0, columns, 2)
        for y in (0, 1)
        for x in (0, 1)
    ]
    expected = theirs(features[:, blocks].flatten(0, 1)).reshape(2, 12, TEXT)
    torch.testing.assert_close(ours(features, GRID), expected, rtol=0, atol=1e-12)


def test_blip_2s_qformer() -> None:
    ours = _randomised("qformer", num_queries=5, hidden_size=12, num_layers=4, num_heads=3)
    config = Blip2QFormerConfig(
        hidden_size=12,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=48,
        encoder_hidden_size=VISION,
        attn_implementation="eager",
    )
    theirs = Blip2QFormerModel(config).double().eval()
    own = ("query_tokens", "language_projection")
    state = ours.state_dict()
    theirs.load_state_dict({key: value for key, value in state.items() if not key.startswith(own)})
    features = torch.randn(2, 48, VISION, dtype=torch.float64)
    encoded = theirs(query_embeds=state["query_tokens"].expand(2, -1, -1), encoder_hidden_states=features)
    projection = state["language_projection.weight"], state["language_projection.bias"]
    expected = functional.linear(encoded.last_hidden_state, *projection)
    torch.testing.assert_close(ours(features, GRID), expected, rtol=0, atol=1e-12)


def test_dense_connector_from_hidden_states() -> None:
    """The paper's three forms, computed from a tower's list of hidden states (here of 25, as CLIP-L has)."""
    torch.manual_seed(1)
    hidden = torch.randn(25, 2, 48, VISION, dtype=torch.float64)

    def pooled(layer: int) -> torch.Tensor:
        return hidden[layer].unflatten(1, (6, 8)).mean(dim=2)

    expected = {
        "dense_sti": torch.cat([hidden[-2], pooled(7), pooled(15)], dim=1),
        "dense_sci": torch.cat([hidden[-2], hidden[7], hidden[15]], dim=2),
        "dense_dci": torch.cat([hidden[-2], hidden[:12].mean(dim=0), hidden[12:24].mean(dim=0)], dim=2),
    }
    for type, combined in expected.items():
        projector = _randomised(type)
        features = torch.cat([hidden[layer] for layer in feature_layers(type, -2)], dim=2)
        torch.testing.assert_close(projector(features, GRID), projector.mlp(combined), rtol=0, atol=1e-12)
