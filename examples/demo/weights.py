"""Pretrained weights from package files to ordinary Hugging Face folders.

Two conversions, both verified by what the converted model does (tests/examples/demo/test_weights.py):

- SmolLM2-135M-Instruct, a Llama-architecture chat model, from a 4-bit GGUF file to float16 safetensors;
- ResNet-50 / ImageNet, Keras weights in TensorFlow.js shards, to transformers' `ResNetModel`.

The ResNet is an ImageNet classifier without its last layer, not a CLIP: it was never shown any text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from llava_npu.errors import UserError
from llava_npu.files.cache import build_once

# Raised whenever a conversion changes, so that folders written by an older one are not used.
CONVERSION = 2

# Keras' "caffe" preprocessing subtracts the mean of ImageNet's pixels, in 0–255; nothing is divided.
_KERAS_MEAN_RGB = (123.68, 116.779, 103.939)
_KERAS_EPSILON = 1e-3
_TORCH_EPSILON = 1e-5

# SmolLM2's own markup without the system prompt that its template adds to every conversation ("You are a helpful AI
# assistant named SmolLM, …"): 22 tokens that say nothing about a picture, as long as the rest of a short question.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def language_model(package: Path, cache: Path) -> Path:
    """Converts the chat model once.

    Args:
        package: the unpacked package, with `SmolLM2-135M-Instruct.Q4_1.gguf` somewhere inside.
        cache: where converted folders live.

    Returns:
        A Hugging Face folder: LlamaForCausalLM in float16 (4-bit weights times a float16 scale lose nothing that
        matters in it), and the tokenizer with its chat template, less the default system prompt.
    """
    return build_once(cache / f"smollm2-135m-instruct-v{CONVERSION}", lambda folder: _convert_gguf(package, folder))


def vision_tower(package: Path, cache: Path, image_size: int = 224) -> Path:
    """Converts the vision tower once.

    Args:
        package: the unpacked package, with `ResNet50/model.json` somewhere inside.
        cache: where converted folders live.
        image_size: side of the square images that the image processor makes (a convolutional tower takes any).

    Returns:
        A Hugging Face folder: `ResNetForImageClassification`, so that the classifier's own accuracy can be checked
        (`AutoModel` loads the tower from it without the classifier), and its image processor.
    """
    name = f"resnet-50-imagenet-{image_size}-v{CONVERSION}"
    return build_once(cache / name, lambda folder: _convert_resnet(package, folder, image_size))


# --- GGUF → Llama -----------------------------------------------------------------------------------------------------


def _convert_gguf(package: Path, folder: Path) -> None:
    gguf = only_file(package, "*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The loaded model still counts as quantised and refuses to be saved: rebuild it as a plain one.
    described = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype", "torch_dtype"):
        described.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**described))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.to(torch.float16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


# --- TensorFlow.js → ResNet -------------------------------------------------------------------------------------------


def _convert_resnet(package: Path, folder: Path, image_size: int) -> None:
    manifest = only_file(package, "model.json")
    labels = json.loads(only_file(package, "labels.json").read_text(encoding="utf-8"))
    config = ResNetConfig(
        depths=[3, 4, 6, 3],
        hidden_sizes=[256, 512, 1024, 2048],
        layer_type="bottleneck",
        downsample_in_bottleneck=True,  # Keras' ResNet v1 strides in the first 1×1 convolution
        id2label={int(index): name.replace("_", " ") for index, name in labels.items()},
        label2id={name.replace("_", " "): int(index) for index, name in labels.items()},
    )
    model = ResNetForImageClassification(config)
    model.load_state_dict(_torch_state(dict(_tfjs_weights(manifest)), config.depths))
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing(image_size), indent=2) + "\n")


def preprocessing(image_size: int) -> dict[str, Any]:
    """The tower's preprocessing: x − mean, in 0–255."""
    return plain_preprocessing(image_size, mean=_KERAS_MEAN_RGB, std=(1, 1, 1))


def plain_preprocessing(image_size: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """(x − mean) / std, in 0–255, as transformers writes it: (x/255 − mean/255) / (std/255).

    CLIP's image processor is the plain one: shortest side, centre crop, rescale, normalise.
    """
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [each / 255 for each in mean],
        "image_std": [each / 255 for each in std],
    }


def _torch_state(keras: dict[str, np.ndarray], depths: list[int]) -> dict[str, torch.Tensor]:
    """Renames and rearranges Keras' weights into the state dict of `ResNetForImageClassification`."""
    state: dict[str, torch.Tensor] = {}
    # Keras reads BGR: flipping the first kernel's input channels makes it read RGB. (height, width, in, out)
    keras["conv1/kernel"] = keras["conv1/kernel"][:, :, ::-1]
    _put_convolution(state, "resnet.embedder.embedder", keras, "conv1", "bn_conv1")
    for stage, depth in enumerate(depths):
        for block in range(depth):
            source = f"{stage + 2}{chr(ord('a') + block)}_branch"  # Keras counts stages from 2, names blocks a, b, …
            target = f"resnet.encoder.stages.{stage}.layers.{block}"
            for index, part in enumerate("abc"):
                _put_convolution(state, f"{target}.layer.{index}", keras, f"res{source}2{part}", f"bn{source}2{part}")
            if block == 0:
                _put_convolution(state, f"{target}.shortcut", keras, f"res{source}1", f"bn{source}1")
    state["classifier.1.weight"] = torch.from_numpy(np.ascontiguousarray(keras["fc1000/kernel"].T))
    state["classifier.1.bias"] = torch.from_numpy(keras["fc1000/bias"])
    return state


def _put_convolution(
    state: dict[str, torch.Tensor], target: str, keras: dict[str, np.ndarray], convolution: str, norm: str
) -> None:
    kernel = keras[f"{convolution}/kernel"].transpose(3, 2, 0, 1)  # (out, in, height, width)
    state[f"{target}.convolution.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
    state[f"{target}.normalization.weight"] = torch.from_numpy(keras[f"{norm}/gamma"])
    state[f"{target}.normalization.bias"] = torch.from_numpy(keras[f"{norm}/beta"])
    # transformers' convolutions have no bias: it moves into the mean that the normalisation subtracts.
    mean = keras[f"{norm}/moving_mean"] - keras[f"{convolution}/bias"]
    variance = keras[f"{norm}/moving_variance"] + (_KERAS_EPSILON - _TORCH_EPSILON)
    state[f"{target}.normalization.running_mean"] = torch.from_numpy(mean)
    state[f"{target}.normalization.running_var"] = torch.from_numpy(variance)
    state[f"{target}.normalization.num_batches_tracked"] = torch.tensor(0)


def _tfjs_weights(manifest: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Reads a TensorFlow.js layers model: each group of weights is one byte string, cut into shard files."""
    for group in json.loads(manifest.read_text(encoding="utf-8"))["weightsManifest"]:
        data = b"".join((manifest.parent / path).read_bytes() for path in group["paths"])
        position = 0
        for weight in group["weights"]:
            if weight["dtype"] != "float32" or "quantization" in weight:
                raise UserError(f"{manifest}: {weight['name']} is {weight['dtype']}; only plain float32 is read.")
            count = int(np.prod(weight["shape"]))
            values = np.frombuffer(data, dtype="<f4", count=count, offset=position)
            position += 4 * count
            yield weight["name"], values.reshape(weight["shape"]).copy()
        if position != len(data):
            raise UserError(f"{manifest}: {len(data)} bytes of weights, but {position} are described. Fetch it again.")


def only_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.rglob(pattern))
    if len(found) != 1:
        raise UserError(f"{folder}: expected exactly one {pattern}, found {len(found)}. Delete the folder and rerun.")
    return found[0]
