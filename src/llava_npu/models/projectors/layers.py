"""Layers that several projectors are built of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


def init_linear_and_norm(module: nn.Module, std: float) -> None:
    """Normal weights of that deviation and zero biases in all linear layers of `module`; layer norms as torch's own."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()


class Mlp(nn.Module):
    """Linear layers `linear_1`, `linear_2`, … with an activation between: (…, in_features) → (…, out_features)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int = 2,
        bias: bool = True,
        activation: Callable[[torch.Tensor], torch.Tensor] = functional.gelu,
        linear: type[nn.Linear] = nn.Linear,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.linear_1 = linear(in_features, out_features, bias=bias)
        for number in range(2, depth + 1):
            self.add_module(f"linear_{number}", linear(out_features, out_features, bias=bias))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first, *others = self.children()
        hidden = first(hidden)
        for linear in others:
            hidden = linear(self.activation(hidden))
        return hidden


class TruncNormalLinear(nn.Linear):
    """A linear layer initialised as in the ViT lineage: weights truncated normal with deviation 0.02, zero bias."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class NormalLinear(nn.Linear):
    """A linear layer with weights from N(0, 0.02²) and zero bias."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class NormalConv2d(nn.Conv2d):
    """A convolution with weights from N(0, 0.02²) and zero bias."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of a map (batch, channels, height, width)."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return super().forward(feature_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the channels' means (Hu et al. 2018, arXiv:1709.01507).

    (batch, channels, height, width) → same.
    """

    def __init__(
        self,
        channels: int,
        squeezed_channels: int,
        activation: Callable[[torch.Tensor], torch.Tensor],
        gate: Callable[[torch.Tensor], torch.Tensor],
        conv: type[nn.Conv2d] = nn.Conv2d,
    ) -> None:
        super().__init__()
        self.fc1 = conv(channels, squeezed_channels, 1)
        self.fc2 = conv(squeezed_channels, channels, 1)
        self.activation = activation
        self.gate = gate

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        means = feature_map.mean(dim=(2, 3), keepdim=True)  # (batch, channels, 1, 1)
        return feature_map * self.gate(self.fc2(self.activation(self.fc1(means))))
