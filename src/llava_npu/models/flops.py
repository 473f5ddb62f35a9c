"""How many floating-point operations training takes, from what is computed: frozen parts count as what they cost.

    flops = flop_model(model)                       # any device, the meta device too: only shapes are looked at
    work = flops.count(tokens, causal_pairs(sequence_lengths), supervised, images)
    mfu = work.total / seconds / peak

The common rule "6 × parameters × tokens" is wrong for a vision-language model: a frozen tower has no backward pass, a
frozen language model passes gradients through itself but forms none of its weights', logits are needed at supervised
positions alone. Here

- a product with a weight costs 2 operations per weight and token forward, as many again for the gradient of its input
  (`data_gradient`), and as many again for its own (`weight_gradient`), each only where it is needed;
- attention is causal within each sequence: a query and a key that it sees cost 4 operations per channel forward and 8
  backward (what a fused kernel computes twice to save memory is not counted);
- a tower counts up to the deepest layer that the projector sees;
- embedding look-ups, norms, activations and rotary embedding count nothing, as everywhere.

Tower and projector are counted by running one image through them on the meta device under torch's own counter
(`torch.utils.flop_counter`), so that every projector is counted as it is written; the language model by its layers.

Source of the rule: Kaplan et al. 2020 (arXiv:2001.08361), appendix B; of model operations against a peak ("MFU"):
Chowdhery et al. 2022, PaLM (arXiv:2204.02311), appendix B.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from llava_npu.models.modeling import LlavaNpuForConditionalGeneration, LlavaNpuModel
from llava_npu.models.vision.towers import Tower


@dataclass(frozen=True)
class Flops:
    """Floating-point operations; a multiplication and an addition are two.

    Attributes:
        forward: of the forward pass.
        data_gradient: of the backward pass through what is computed, to reach what learns.
        weight_gradient: of the gradients of what learns.
    """

    forward: int = 0
    data_gradient: int = 0
    weight_gradient: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.data_gradient + self.weight_gradient

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.forward + other.forward,
            self.data_gradient + other.data_gradient,
            self.weight_gradient + other.weight_gradient,
        )

    def __mul__(self, times: int) -> Flops:
        return Flops(self.forward * times, self.data_gradient * times, self.weight_gradient * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class FlopModel:
    """What each piece of work costs in a model of which certain parts learn.

    Attributes:
        token: a token through the language model's layers, attention between tokens not counted.
        pair: a query and a key that it sees, in all layers.
        supervised: a position at which logits are computed, and their loss.
        tower, projector: an image.
    """

    token: Flops
    pair: Flops
    supervised: Flops
    tower: Flops
    projector: Flops

    @property
    def image(self) -> Flops:
        """An image through tower and projector."""
        return self.tower + self.projector

    def count(self, tokens: int, pairs: int, supervised: int, images: int, *, cached_features: bool = False) -> Flops:
        """Of one micro-batch, or step, or run.

        Args:
            tokens: of the language model, image tokens included.
            pairs: `causal_pairs` of the sequences.
            supervised: positions that are learned from.
            images: how many are encoded.
            cached_features: the tower's output comes from a cache (`data.cache_features`).
        """
        image = self.projector if cached_features else self.image
        return self.token * tokens + self.pair * pairs + self.supervised * supervised + image * images

    @property
    def inference(self) -> FlopModel:
        """The forward pass alone: what a prompt costs."""
        return FlopModel(
            **{name: replace(each, data_gradient=0, weight_gradient=0) for name, each in vars(self).items()}
        )


def causal_pairs(sequence_lengths: Iterable[int]) -> int:
    """How many pairs of a query and a key that it sees there are: none between sequences."""
    return sum(length * (length + 1) // 2 for length in sequence_lengths)


def flop_model(model: LlavaNpuForConditionalGeneration) -> FlopModel:
    """Counts a model, of which the parameters that require a gradient learn.

    Args:
        model: on any device; nothing is computed, so that one on the meta device does as well. Before it is sharded:
            the shapes of the parameters are asked for. Adapters (peft) count as the layers that they are.
    """
    inner = model.model
    decoder = inner.language_model
    before = (
        inner.vision_tower,
        inner.multi_modal_projector,
        model.get_input_embeddings(),
        getattr(decoder.layers[0], "input_layernorm", nn.Identity()),  # OLMo-2 has its norms behind attention
    )
    gradient_at_input = any(map(_learns, before))
    passes_back = gradient_at_input or _learns(decoder)
    config = model.config.text_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_pair = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim  # scores, and the weighted sum
    return FlopModel(
        token=_sum(
            _linear(layer, gradient_at_input or not _reads_the_embeddings(name))
            for name, layer in _linear_layers(decoder)
        )
        if passes_back
        else Flops(sum(_products(layer) for _, layer in _linear_layers(decoder))),
        pair=Flops(per_pair, 2 * per_pair * passes_back),
        supervised=_linear_layer_or_adapter(model.lm_head, passes_back),
        tower=_tower(inner) * sum(scale * scale for scale in inner.config.scales),
        projector=_projector(inner),
    )


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear))


def _products(layer: nn.Linear) -> int:
    return 2 * layer.in_features * layer.out_features  # not of `weight`: a quantised one is packed


def _linear(layer: nn.Linear, gradient_at_input: bool) -> Flops:
    products = _products(layer)
    return Flops(products, products * gradient_at_input, products * layer.weight.requires_grad)


def _linear_layer_or_adapter(module: nn.Module, gradient_at_input: bool) -> Flops:
    return _sum(_linear(layer, gradient_at_input) for _, layer in _linear_layers(module))


def _reads_the_embeddings(name: str) -> bool:
    """Whether this layer of the language model takes its input: its gradient is that of the input."""
    places = name.split(".")
    if places[:3] != ["layers", "0", "self_attn"] or places[3] not in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        return False
    return not any(place.startswith("lora_B") for place in places)


def _sum(parts: Iterable[Flops]) -> Flops:
    return sum(parts, Flops())


def _tower(model: LlavaNpuModel) -> Flops:
    whole, layers = model.config.tower, model.config.feature_layers
    towers = model.vision_tower.towers if whole.members else (model.vision_tower,)
    return _sum(_one_tower(*each, layers) for each in zip(towers, whole.members or (whole,), strict=True))


def _one_tower(tower: nn.Module, description: Tower, layers: Sequence[int]) -> Flops:
    pixels = torch.empty(1, *description.pixels, device="meta")
    learns = _learns(tower)
    module = _OnMeta(tower)
    blocks = _blocks(tower, description.num_layers)
    deepest = max(layer % (len(blocks) + 1) for layer in layers)  # of the hidden states, 0 the first

    reached = 0
    with FlopCounterMode(display=False) as counter:

        def note(*_: Any) -> None:
            nonlocal reached
            reached = counter.get_total_flops()

        last = blocks[deepest] if deepest < len(blocks) else blocks[-1]
        mark = last.register_forward_pre_hook(note) if deepest < len(blocks) else last.register_forward_hook(note)
        try:
            hidden_states = module(pixels, output_hidden_states=True).hidden_states
        finally:
            mark.remove()
    if not learns:
        return Flops(reached)

    def backward(trained: bool, gradient_at_input: bool) -> int:
        states = _OnMeta(tower, trained)(pixels.requires_grad_(gradient_at_input), output_hidden_states=True)
        return _backward(states.hidden_states[deepest])

    del hidden_states
    return Flops(reached, *_split(backward, gradient_at_input=False))


def _projector(model: LlavaNpuModel) -> Flops:
    tower, projector = model.config.tower, model.multi_modal_projector
    tokens = tower.num_patches + (tower.num_prefix_tokens if model.config.keep_prefix_tokens else 0)
    gradient_at_input = _learns(model.vision_tower)

    def of(images: int) -> Flops:
        features = torch.empty(images, tokens, projector.input_channels, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            # Views of what learns would ask the counter for gradients that there are not.
            _OnMeta(projector, trained=False)(features, grid=tower.grid)

        def backward(trained: bool, gradient_at_input: bool) -> int:
            return _backward(_OnMeta(projector, trained)(features.requires_grad_(gradient_at_input), grid=tower.grid))

        return Flops(counter.get_total_flops(), *_split(backward, gradient_at_input))

    # A resampler projects its queries once for all images of a batch: only what each further image costs is counted.
    return of(2) + -1 * of(1)


def _split(backward: Any, gradient_at_input: bool) -> tuple[int, int]:
    """(data gradient, weight gradient): the second is what learning adds to passing gradients all the way through."""
    weights = backward(True, True) - backward(False, True)
    return backward(True, gradient_at_input) - weights, weights


def _backward(out: torch.Tensor) -> int:
    if not out.requires_grad:
        return 0
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(out, torch.empty_like(out))
    return counter.get_total_flops()


class _OnMeta:
    """A module that runs on the meta device, wherever its own tensors are; they are not touched."""

    def __init__(self, module: nn.Module, trained: bool = True) -> None:
        self._module = module
        self._tensors = {
            name: _empty(parameter, trained and parameter.requires_grad)
            for name, parameter in module.named_parameters(remove_duplicate=False)
        } | {name: _empty(buffer, False) for name, buffer in module.named_buffers(remove_duplicate=False)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        dtype = next((tensor.dtype for tensor in self._tensors.values() if tensor.is_floating_point()), torch.float32)
        args = tuple(arg.to(dtype) for arg in args)
        modes = [(module, module.training) for module in self._module.modules()]
        # Activations are recomputed in training mode alone: what is computed twice does not count, and would be
        # computed in the backward pass, with the module's own tensors.
        self._module.eval()
        try:
            return functional_call(self._module, self._tensors, args, kwargs)
        finally:
            for module, training in modes:
                module.training = training


def _empty(tensor: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta").requires_grad_(requires_grad)


def _blocks(tower: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of layers after each of which the tower notes a hidden state."""
    return next(module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers)
