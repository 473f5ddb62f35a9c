"""Connectors that other models have, against the modules of those models: Qwen2-VL's merger, BLIP-2's Q-Former.

Honeybee's D-Abstractor, whose layers are transformers', against its formulas; so Cambrian-1's SVA.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

from llava_npu.models.projectors import Projector, build_projector, feature_layers
from llava_npu.models.projectors.grid import to_blocks

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


def _sampled(patches: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Bilinear, zero outside: (height·width, channels) at places in patches, of which the first's centre is 0.5."""
    height, width = GRID
    total = torch.zeros(len(x), patches.shape[1], dtype=patches.dtype)
    left, top = (x - 0.5).floor(), (y - 0.5).floor()
    for column in (left, left + 1):
        for row in (top, top + 1):
            share = (1 - (x - 0.5 - column).abs()) * (1 - (y - 0.5 - row).abs())
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = (row * width + column).clamp(0, height * width - 1).long()
            total += (share * inside)[:, None] * patches[index]
    return total


def _deformable_layer(
    w: dict[str, torch.Tensor], hidden: torch.Tensor, *place: torch.Tensor, heads: int
) -> torch.Tensor:
    """Deformable DETR's decoder layer (Zhu et al. 2020, eq. 2), spelled out for one image, point by point.

    Args:
        place: the queries' positions, their points, and the map of patches.
    """
    positions, points, patches = place

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return functional.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, value: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(value, value.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    queries, width = hidden.shape
    size = width // heads
    q, k = (linear(f"self_attn.{name}_proj", hidden + positions) for name in "qk")
    v = linear("self_attn.v_proj", hidden)
    mixed = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        mixed.append((q[:, part] @ k[:, part].T / size**0.5).softmax(dim=-1) @ v[:, part])
    hidden = norm("self_attn_layer_norm", hidden + linear("self_attn.o_proj", torch.cat(mixed, dim=1)))

    values = linear("encoder_attn.value_proj", patches)
    offsets = linear("encoder_attn.sampling_offsets", hidden + positions).reshape(queries, heads, -1, 2)
    weights = linear("encoder_attn.attention_weights", hidden + positions).reshape(queries, heads, -1).softmax(dim=-1)
    found = []
    for head in range(heads):
        part = values[:, head * size : (head + 1) * size]
        x, y = (points[:, None] * torch.tensor(GRID[::-1]) + offsets[:, head]).unbind(-1)
        samples = [_sampled(part, x[:, point], y[:, point]) for point in range(x.shape[1])]
        found.append((torch.stack(samples, dim=1) * weights[:, head, :, None]).sum(dim=1))
    hidden = norm("encoder_attn_layer_norm", hidden + linear("encoder_attn.output_proj", torch.cat(found, dim=1)))
    return norm("final_layer_norm", hidden + linear("mlp.fc2", linear("mlp.fc1", hidden).relu()))


def test_honeybees_d_abstractor() -> None:
    """Pooled patches as the queries' positions, learned places, one level; each image by itself."""
    ours = _randomised("d_abstractor", hidden_size=12, num_queries=4, num_input_tokens=48, num_layers=2, num_heads=3)
    torch.nn.init.uniform_(ours.reference_points)
    state = ours.state_dict()
    features = torch.randn(2, 48, VISION, dtype=torch.float64)
    expected = []
    for image in features:
        patches = functional.linear(image, state["input_proj.weight"], state["input_proj.bias"]) + state["pos_emb"][0]
        positions = functional.adaptive_avg_pool2d(patches.T.unflatten(1, GRID), 2).flatten(1).T
        hidden = state["query"]
        for number in range(2):
            prefix = f"layers.{number}."
            layer = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            hidden = _deformable_layer(layer, hidden, positions, state["reference_points"][0], patches, heads=3)
        expected.append(functional.linear(hidden, state["output_proj.weight"], state["output_proj.bias"]))
    torch.testing.assert_close(ours(features, GRID), torch.stack(expected), rtol=0, atol=1e-12)


def test_d_abstractor_starts_spread_over_the_image() -> None:
    points = build_projector(
        "d_abstractor", vision_hidden_size=8, text_hidden_size=8, hidden_size=8, num_queries=9, num_input_tokens=16
    ).reference_points
    assert points[0, :, 0].tolist() == [0.125, 0.5, 0.875] * 3  # x; centres of the first and the last of 4 patches
    assert points[0, :, 1].tolist() == [0.125] * 3 + [0.5] * 3 + [0.875] * 3


def _sva_query(
    w: dict[str, torch.Tensor], query: torch.Tensor, context: torch.Tensor, blocks: list[torch.Tensor], heads: int
) -> torch.Tensor:
    """One round of SVA for one query, (hidden,), and its patches of each tower, (patches, hidden); head by head."""

    def normed(name: str, value: torch.Tensor) -> torch.Tensor:
        norm = functional.layer_norm(value, value.shape[-1:], w[f"{name}.0.weight"], w[f"{name}.0.bias"])
        return norm @ w[f"{name}.1.weight"].T

    inner = w["proj_in.weight"] @ torch.cat([query, w["proj_context.weight"] @ context])
    q, keys, values = normed("q_proj", inner), [], []
    for tower, patches in enumerate(blocks):
        placed = patches + w[f"positions_{tower}"] if len(patches) > 1 else patches
        keys.append(normed(f"k_proj.{tower}", placed))
        values.append(normed(f"v_proj.{tower}", placed))
    k, v, size = torch.cat(keys), torch.cat(values), len(query) // heads
    parts = [slice(head * size, (head + 1) * size) for head in range(heads)]
    attended = torch.cat([(k[:, part] @ q[part] / size**0.5).softmax(dim=0) @ v[:, part] for part in parts])
    inner = inner + w["o_proj.weight"] @ attended
    inner = functional.layer_norm(inner, inner.shape, w["norm.weight"], w["norm.bias"])
    hidden = functional.gelu(w["proj_out.linear_1.weight"] @ inner)
    return query + w["proj_out.linear_2.weight"] @ hidden


def test_cambrians_sva() -> None:
    """Query by query; of two towers, the first with four patches where the second has one."""
    sides, widths, heads = (4, 2), (3, 4), 2
    options = {"num_queries": 4, "query_groups": [4, 1], "hidden_size": 8, "num_layers": 2, "num_heads": heads}
    ours = _randomised("sva", **options, tower_sides=sides, tower_widths=widths)
    state = ours.state_dict()

    def within(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    def mlp(prefix: str, value: torch.Tensor) -> torch.Tensor:
        weights = within(prefix)
        hidden = functional.gelu(functional.linear(value, weights["linear_1.weight"], weights["linear_1.bias"]))
        return functional.linear(hidden, weights["linear_2.weight"], weights["linear_2.bias"])

    features = [torch.randn(2, side**2, width, dtype=torch.float64) for side, width in zip(sides, widths, strict=True)]
    expected = []
    for image in zip(*features, strict=True):
        towers = [
            functional.layer_norm(mlp(f"towers.{tower}.0.", patches), (8,), *within(f"towers.{tower}.1.").values())
            for tower, patches in enumerate(image)
        ]
        context, sampled = towers[0].mean(dim=0), []
        for group, rows in enumerate((2, 1)):
            cells = []
            for row, column in ((row, column) for row in range(rows) for column in range(rows)):
                cell = []
                for patches, side in zip(towers, sides, strict=True):
                    step = side // rows
                    square = patches.unflatten(0, (side, side))
                    cell.append(
                        square[row * step : (row + 1) * step, column * step : (column + 1) * step].flatten(0, 1)
                    )
                query = state["query"][group]
                for layer in range(2):
                    query = _sva_query(within(f"groups.{group}.{layer}."), query, context, cell, heads)
                cells.append(query)
            sampled.append(torch.stack(cells).expand(4, -1))  # one value resized to 2×2 is itself four times
        expected.append(mlp("readout.", torch.cat(sampled, dim=1)))
    together = torch.cat([to_blocks(features[0], (4, 4), 2).flatten(2), features[1]], dim=-1)
    torch.testing.assert_close(ours(together, (2, 2)), torch.stack(expected), rtol=0, atol=1e-12)


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
