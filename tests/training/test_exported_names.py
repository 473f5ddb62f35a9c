"""Whatever leaves a run names its weights as the models on the hub do (llava-hf/llava-1.5-7b-hf): vLLM reads no other
names. What `convert --to hf` writes is held by tests/conversion.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llava_npu import load
from llava_npu.config import RunConfig
from llava_npu.models import compose
from llava_npu.models.loading import merge
from llava_npu.training import train
from support import tiny

MakeRun = Callable[..., RunConfig]
HUB_NAME = re.compile(
    r"language_model\.model\.(embed_tokens|layers\.\d+|norm)\..+|language_model\.lm_head\.weight"
    r"|multi_modal_projector\..+|vision_tower\.vision_model\..+|image_newline"
)


def _names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            names.update(weights.keys())
    return names


def _foreign(names: set[str]) -> set[str]:
    return {name for name in names if not HUB_NAME.fullmatch(name)}


@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "merged adapters"])
@pytest.mark.parametrize("projector", ["mlp2x_gelu", "ldpv2"])
def test_of_a_trained_model(make_run: MakeRun, tmp_path: Path, projector: str, adapters: bool) -> None:
    options = {"num_queries": 4} if projector == "ldpv2" else {}
    parts = {"parts": {"language_model": {"train": "lora"}}} if adapters else {}
    run = make_run(max_steps=1, model={"projector": projector, "projector_options": options}, **parts)
    folder = train(run)
    if adapters:
        merge(str(folder), tmp_path / "merged")
        folder = tmp_path / "merged"
    names = _names(folder)
    assert _foreign(names) == set()
    assert {"language_model.model.embed_tokens.weight", "vision_tower.vision_model.post_layernorm.weight"} <= names


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_of_save_pretrained_in_shards(tmp_path: Path, tied: bool) -> None:
    model, processor = compose(
        vision_tower=str(tiny.write_siglip(tmp_path / "tower")),
        language_model=str(tiny.write_language_model(tmp_path / "lm", tie_word_embeddings=tied)),
        projector_type="linear",
    )
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    processor.save_pretrained(tmp_path / "model")
    names = _names(tmp_path / "model")
    assert _foreign(names) == set()
    assert ("language_model.lm_head.weight" in names) != tied
    again = load(tmp_path / "model").model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
