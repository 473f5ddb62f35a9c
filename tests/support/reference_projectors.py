"""The originals' computations, spelled out slowly with torch's own layers, on weights in the predecessor's names.

Used as the reference for widths, grids and token counts that the golden file does not have. Each function takes the
weights, features (batch, patches, channels) and the grid.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

Weights = dict[str, torch.Tensor]


def sequential(weights: Weights, prefix: str, x: torch.Tensor, activation=functional.gelu) -> torch.Tensor:
    index = 0
    while f"{prefix}{index}.weight" in weights:
        if index:
            x = activation(x)
        x = functional.linear(x, weights[f"{prefix}{index}.weight"], weights.get(f"{prefix}{index}.bias"))
        index += 2
    return x


def mlp(weights: Weights, x: torch.Tensor, grid: tuple[int, int], options: dict) -> torch.Tensor:
    return sequential(weights, "", x)


def ldpv2(weights: Weights, x: torch.Tensor, grid: tuple[int, int], options: dict) -> torch.Tensor:
    x = sequential(weights, "mlp.mlp.", x)
    side = round(options["num_queries"] ** 0.5)
    x = nn.AdaptiveAvgPool2d(side)(x.transpose(1, 2).unflatten(2, grid))
    conv = functional.conv2d(x, weights["peg.peg.0.weight"], weights["peg.peg.0.bias"], padding=1, groups=x.shape[1])
    return (conv + x).flatten(2).transpose(1, 2)


def layer_norm_2d(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    normal = (x - mean) / (variance + 1e-5).sqrt()
    return normal * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


def squeeze_excite(weights: Weights, name: str, x: torch.Tensor, activation, gate) -> torch.Tensor:
    s = x.mean((2, 3), keepdim=True)
    s = activation(functional.conv2d(s, weights[f"{name}.fc1.weight"], weights[f"{name}.fc1.bias"]))
    return x * gate(functional.conv2d(s, weights[f"{name}.fc2.weight"], weights[f"{name}.fc2.bias"]))


def ldp(weights: Weights, x: torch.Tensor, grid: tuple[int, int], options: dict) -> torch.Tensor:
    x = functional.linear(x, weights["model.mlp.1.weight"], weights["model.mlp.1.bias"])
    x = functional.linear(functional.gelu(x), weights["model.mlp.3.weight"], weights["model.mlp.3.bias"])
    x = x.transpose(1, 2).unflatten(2, grid)
    for number, stride in ((1, 1), (2, 2)):
        name = f"model.mb_block.{number}.block."
        y = functional.conv2d(x, weights[f"{name}0.0.weight"], stride=stride, padding=1, groups=x.shape[1])
        y = functional.hardswish(layer_norm_2d(weights, f"{name}0.1", y))
        y = squeeze_excite(weights, f"{name}1", y, functional.relu, functional.hardsigmoid)
        y = layer_norm_2d(weights, f"{name}2.1", functional.conv2d(y, weights[f"{name}2.0.weight"]))
        x = x + y if number == 1 else y
    return x.flatten(2).transpose(1, 2)


def attention(weights: Weights, name: str, num_heads: int, q, k, v, project: bool) -> torch.Tensor:
    """`torch.nn.MultiheadAttention`, batch first; without the output projection, one that is the identity."""
    module = nn.MultiheadAttention(q.shape[-1], num_heads, batch_first=True, dtype=q.dtype)
    layers = [f"{name}.linear_layers.{index}" for index in range(3)]
    state = {
        "in_proj_weight": torch.cat([weights[f"{layer}.weight"] for layer in layers]),
        "in_proj_bias": torch.cat([weights[f"{layer}.bias"] for layer in layers]),
        "out_proj.weight": weights[f"{name}.output_linear.weight"] if project else torch.eye(q.shape[-1]).to(q),
        "out_proj.bias": weights[f"{name}.output_linear.bias"] if project else torch.zeros(q.shape[-1]).to(q),
    }
    return torch.func.functional_call(module, state, (q, k, v))[0]


def layer_norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def position_code(position: int, channels: int) -> list[float]:
    angles = [position / 10000 ** (i / (channels // 2)) for i in range(channels // 2)]
    angles = torch.tensor(angles, dtype=torch.float64)
    return [*angles.sin().tolist(), *angles.cos().tolist()]


def resampler(weights: Weights, x: torch.Tensor, grid: tuple[int, int], options: dict) -> torch.Tensor:
    queries, channels = weights["query"].shape
    side = round(queries**0.5)
    table = [
        position_code(column, channels // 2) + position_code(row, channels // 2)
        for row in range(side)
        for column in range(side)
    ]
    positions = torch.tensor(table, dtype=torch.float32).to(x)
    as_map = positions.T.reshape(1, channels, side, side)
    key_positions = functional.interpolate(as_map, grid, mode="bicubic").flatten(2)[0].T
    if (side, side) == grid:
        key_positions = positions
    if "kv_proj.weight" in weights:
        x = x @ weights["kv_proj.weight"].T
    x = layer_norm(weights, "ln_kv", x)
    q = (layer_norm(weights, "ln_q", weights["query"]) + positions).expand(len(x), -1, -1)
    heads = options.get("num_heads") or max(1, channels // 128)
    y = attention(weights, "attn", heads, q, x + key_positions, x, options["output_projection"])
    return layer_norm(weights, "ln_post", y) @ weights["proj"]


def tokenpacker(weights: Weights, x: torch.Tensor, grid: tuple[int, int], options: dict) -> torch.Tensor:
    width = weights["q_proj_1.weight"].shape[1]
    scale = options["scale_factor"]
    points, regions = x[..., :width], x[..., width:]
    keys = layer_norm(weights, "ln_k_1", sequential(weights, "k_proj_1.", regions)).unflatten(1, grid)
    values = layer_norm(weights, "ln_v_1", sequential(weights, "v_proj_1.", regions)).unflatten(1, grid)
    rows, columns = grid[0] // scale, grid[1] // scale
    coarse = functional.interpolate(points.transpose(1, 2).unflatten(2, grid), (rows, columns), mode="bilinear")
    outputs = []
    for row in range(rows):
        for column in range(columns):
            query = layer_norm(weights, "ln_q_1", coarse[:, None, :, row, column] @ weights["q_proj_1.weight"].T)
            block = (slice(None), slice(row * scale, (row + 1) * scale), slice(column * scale, (column + 1) * scale))
            k, v = keys[block].flatten(1, 2), values[block].flatten(1, 2)
            heads = options.get("num_heads", 8)
            outputs.append(attention(weights, "clip_attn", heads, query, k, v, options["output_projection"]))
    return sequential(weights, "mlp.", torch.cat(outputs, dim=1))


def c_abstractor(weights: Weights, x: torch.Tensor, grid: tuple[int, int], options: dict) -> torch.Tensor:
    x = (x + weights["pos_emb"]).transpose(1, 2).unflatten(2, grid)
    for stage in (0, 2):
        if stage == 2:
            x = nn.AdaptiveAvgPool2d(round(options["num_queries"] ** 0.5))(x)
        for block in range(1, options["depth"] + 1):
            name = f"net.{stage}.b{block}."
            y = functional.conv2d(x, weights[f"{name}conv1.conv.weight"])
            y = functional.silu(layer_norm_2d(weights, f"{name}conv1.bn", y))
            y = functional.conv2d(y, weights[f"{name}conv2.conv.weight"], padding=1, groups=y.shape[1])
            y = functional.silu(layer_norm_2d(weights, f"{name}conv2.bn", y))
            y = squeeze_excite(weights, f"{name}se", y, functional.silu, torch.sigmoid)
            y = layer_norm_2d(weights, f"{name}conv3.bn", functional.conv2d(y, weights[f"{name}conv3.conv.weight"]))
            if f"{name}downsample.conv.weight" in weights:
                x = functional.conv2d(x, weights[f"{name}downsample.conv.weight"])
                x = layer_norm_2d(weights, f"{name}downsample.bn", x)
            x = functional.silu(x + y)
    return sequential(weights, "readout.", x.flatten(2).transpose(1, 2), activation=functional.silu)
