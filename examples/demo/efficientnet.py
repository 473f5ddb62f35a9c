"""A second vision tower for comparisons: EfficientNet-Lite2 / ImageNet, as transformers' `EfficientNetModel`.

Lite networks are EfficientNets without squeeze-and-excitation, with ReLU6, and with a stem and head that do not grow
(M. Tan 2020, github.com/tensorflow/tpu, `models/official/efficientnet/lite`). transformers always builds the squeeze
gates: here they are held open, at exactly 1, so that the network computes what the original does.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import EfficientNetConfig, EfficientNetForImageClassification

from demo.weights import only_file, plain_preprocessing
from llava_npu.files.cache import build_once

CONVERSION = 1  # raised whenever the conversion changes
_REPEATS = (1, 3, 3, 4, 4, 5, 1)  # of each stage; Lite scales neither the first nor the last
_CHANNELS = (32, 16, 24, 48, 88, 120, 208, 352)  # of the stem, then of each stage
_OPEN = 32.0  # sigmoid(32) is 1 in every floating-point type that networks are computed in


def efficientnet_lite2(package: Path, labels: Path, cache: Path, image_size: int) -> Path:
    """Converts the tower once.

    Args:
        package: the unpacked package, with `efficientnet-lite2-*.pth` somewhere inside.
        labels: a folder with ImageNet's `labels.json` somewhere inside.
        cache: where converted folders live.
        image_size: side of the square images that it sees; a multiple of 32, so that every stride divides evenly.

    Returns:
        A Hugging Face folder: `EfficientNetForImageClassification` (`AutoModel` loads the tower from it without the
        classifier), and its image processor.
    """
    name = f"efficientnet-lite2-imagenet-{image_size}-v{CONVERSION}"
    return build_once(cache / name, lambda folder: _convert(package, labels, folder, image_size))


def _convert(package: Path, labels: Path, folder: Path, image_size: int) -> None:
    original = torch.load(only_file(package, "efficientnet-lite2-*.pth"), map_location="cpu", weights_only=True)
    names = json.loads(only_file(labels, "labels.json").read_text(encoding="utf-8"))
    config = lite2_config(image_size)
    config.id2label = {int(index): name.replace("_", " ") for index, name in names.items()}
    config.label2id = {name: index for index, name in config.id2label.items()}
    model = EfficientNetForImageClassification(config)
    model.load_state_dict(lite_state(original, model.state_dict()))
    model.eval().save_pretrained(folder)
    preprocessing = plain_preprocessing(image_size, mean=[127] * 3, std=[128] * 3)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")


def lite2_config(image_size: int, num_labels: int = 1000) -> EfficientNetConfig:
    """EfficientNet-Lite2 in the words of transformers: every width and depth spelled out, none scaled."""
    return EfficientNetConfig(
        image_size=image_size,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        in_channels=list(_CHANNELS[:-1]),
        out_channels=list(_CHANNELS[1:]),
        num_block_repeats=list(_REPEATS),
        hidden_dim=1280,
        hidden_act="relu6",
        dropout_rate=0.3,
        num_labels=num_labels,
    )


def lite_state(original: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames a Lite network's weights, and opens the gates that it does not have.

    Args:
        original: as saved by efficientnet-lite-pytorch.
        wanted: the state dict of transformers' model, for the gates' names and shapes.
    """
    state = {_renamed(name): tensor for name, tensor in original.items()}
    for name, tensor in wanted.items():
        if ".squeeze_excite." in name:
            state[name] = torch.full_like(tensor, _OPEN if name.endswith("expand.bias") else 0.0)
    return state


_IN_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
_OUTSIDE = {
    "_conv_stem": "efficientnet.embeddings.convolution",
    "_bn0": "efficientnet.embeddings.batchnorm",
    "_conv_head": "efficientnet.encoder.top_conv",
    "_bn1": "efficientnet.encoder.top_bn",
    "_fc": "classifier",
}


def _renamed(name: str) -> str:
    module, *rest = name.split(".")
    if module != "_blocks":
        return ".".join([_OUTSIDE[module], *rest])
    number, part, *rest = rest
    return ".".join(["efficientnet.encoder.blocks", number, _IN_BLOCK[part], *rest])
