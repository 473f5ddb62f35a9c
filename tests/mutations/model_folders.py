"""Model folders of every layout, broken in a file, a setting or a weight, and opened, converted or merged."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_npu.config import RunConfig
from llava_npu.inference.batch import answer_all
from llava_npu.inference.request import Sampling
from llava_npu.models import compose, load
from llava_npu.models.adapters import AdapterSettings, add_adapters, linear_layers, save_adapters
from llava_npu.models.checkpoints.convert import Help, convert
from llava_npu.models.loading import merge, open_source
from llava_npu.models.sources import ModelSource
from llava_npu.training.resolve import ResolvedRun
from mutations import Case, break_file
from support import tiny
from support.official_models import official_config, official_weights, reference_model


class ModelFolders:
    """Models in Hugging Face's layout, official LLaVA's (whole, a projector alone, LoRA), with adapters, and parts."""

    def make(self, folder: Path) -> None:
        os.environ["LLAVA_NPU_CACHE"] = str(folder.parent / "cache")
        tiny.write_clip(folder / "clip")
        tiny.write_language_model(folder / "lm", tie_word_embeddings=False)
        parts = str(folder / "clip"), str(folder / "lm")
        compose(*parts).save_pretrained(folder / "hf")
        compose(*parts, "ldpv2", {"num_queries": 4}).save_pretrained(folder / "ours")
        compose(*parts, image_aspect_ratio="anyres", image_grid_pinpoints=[[56, 28]]).save_pretrained(folder / "anyres")
        self._write_adapters(folder)
        weights = official_weights(reference_model())
        self._write_official(folder, weights)

    def _write_adapters(self, folder: Path) -> None:
        model = load(folder / "hf").model
        settings = AdapterSettings(rank=2, alpha=4)
        add_adapters(model, linear_layers(model, "model.language_model.layers.0"), settings)
        trained = {name: tensor for name, tensor in model.named_parameters() if ".lora_" in name}
        (folder / "adapters").mkdir()
        save_adapters(folder / "adapters", trained, settings, ModelSource(str(folder / "hf")))
        load(folder / "hf").processor.save_pretrained(folder / "adapters")

    def _write_official(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        for name in ("official", "projector"):
            (folder / name).mkdir()
            values = official_config(folder / "clip", _name_or_path=str(folder / "base"))
            (folder / name / "config.json").write_text(json.dumps(values))
            tiny.tokenizer().save_pretrained(folder / name)
        torch.save(weights, folder / "official" / "pytorch_model.bin")
        projector = {name: tensor for name, tensor in weights.items() if "mm_projector" in name}
        torch.save(projector, folder / "projector" / "mm_projector.bin")
        words = {
            name: tensor for name, tensor in weights.items() if "mm_projector" not in name and "vision" not in name
        }
        (folder / "base").mkdir()
        tiny.text_config(283, tie_word_embeddings=False).save_pretrained(folder / "base")
        save_file(words, folder / "base" / "model.safetensors")
        tiny.tokenizer().save_pretrained(folder / "base")

    def case(self, rng: random.Random, material: Path, folder: Path) -> Case:
        kind = rng.choice(["hf", "hf", "ours", "anyres", "adapters", "official", "projector", "clip", "lm"])
        model = folder / kind
        shutil.copytree(material / kind, model)
        breaks: list[Callable[[random.Random, Path], str]] = [_break_a_file, _break_a_file, _break_weights, _shard]
        done = rng.choice(breaks)(rng, model)
        uses: dict[str, Callable[[], str]] = {
            "load": lambda: _answer(model),
            "convert": lambda: _convert(model, folder, "hf"),
            "to official": lambda: _convert(model, folder, "official"),
            "train": lambda: _start({"checkpoint": str(model)}, folder),
        }
        if kind == "adapters":
            uses = {"load": uses["load"], "train": uses["train"], "merge": lambda: _merge(model, folder)}
        if kind == "projector":
            uses = {"convert": lambda: _convert(model, folder, "hf", Help(base=str(material / "base")))}
        if kind in ("clip", "lm"):
            tower, words = (model if kind == name else material / name for name in ("clip", "lm"))
            parts = {"vision_tower": str(tower), "language_model": str(words)}
            uses = {"compose": lambda: _compose(parts), "train": lambda: _start(parts, folder)}
        use = rng.choice(list(uses))
        never = done.startswith("weights") and not done.endswith("type")
        names = (
            str(model),
            "the tokenizer's chat template",
            "and this tokenizer has none",
            "model.vision_tower",
            "model.language_model",
        )
        return Case(f"{use} {kind}, {done}", uses[use], names, never)


def _answer(folder: Path) -> str:
    loaded = load(folder, "cpu")
    answer_all(loaded, ["What is it?", "And?"], [[Image.new("RGB", (30, 20))], []], sampling=Sampling(max_new_tokens=2))
    return "opened"


def _convert(model: Path, folder: Path, to: str, help: Help | None = None) -> str:
    convert(str(model), folder / "out", to, help)  # type: ignore[arg-type]
    return "converted"


def _merge(model: Path, folder: Path) -> str:
    merge(str(model), folder / "out")
    return "merged"


def _compose(parts: dict[str, str]) -> str:
    compose(**parts).model(torch.tensor([[1]]))
    return "composed"


def _start(model: dict[str, str], folder: Path) -> str:
    """What a training run does with its model before the first step."""
    values = {"stage": "finetune", "output": str(folder / "run"), "data": {"path": "x.json"}, "model": model}
    run = ResolvedRun(RunConfig.model_validate({**values, "optimizer": {"learning_rate": 1e-3}}))
    run.check_model()
    open_source(run.source)
    return "ready to train"


def _break_a_file(rng: random.Random, model: Path) -> str:
    return break_file(rng, rng.choice(sorted(path for path in model.iterdir() if path.is_file())))


def _break_weights(rng: random.Random, model: Path) -> str:
    path = rng.choice([path for path in sorted(model.iterdir()) if path.suffix in (".safetensors", ".bin")])
    weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    name = rng.choice(sorted(weights))
    done = rng.choice(["nan", "inf", "missing", "foreign", "shape", "type", "scalar"])
    tensor = weights.pop(name)
    if done in ("nan", "inf"):
        tensor = tensor.clone()
        tensor.view(-1)[rng.randrange(tensor.numel())] = float(done)
        weights[name] = tensor
    elif done != "missing":
        changed = {
            "foreign": tensor,
            "shape": tensor[:1].repeat(3, *[1] * (tensor.ndim - 1)).contiguous(),
            "type": tensor.to(rng.choice([torch.int64, torch.float64, torch.bool, torch.float8_e4m3fn])),
            "scalar": torch.tensor(1.0),
        }
        weights[name if done != "foreign" else f"{name}x"] = changed[done]
    if path.suffix == ".safetensors":
        save_file(weights, path, metadata={"format": "pt"})
    else:
        torch.save(weights, path)
    return f"weights in {path.name}: {name} {done}"


def _shard(rng: random.Random, model: Path) -> str:
    path = model / "model.safetensors"
    if not path.is_file():
        return _break_a_file(rng, model)
    weights = load_file(path)
    path.unlink()
    names = sorted(weights)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {}
    for part, file in zip((names[::2], names[1::2]), files, strict=True):
        save_file({name: weights[name] for name in part}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return f"in shards, {break_file(rng, rng.choice([index, model / files[0]]))}"
