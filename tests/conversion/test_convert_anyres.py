"""LLaVA-1.6 (anyres, spatial_unpad) to official LLaVA's layout and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llava_npu import UserError
from llava_npu.models import compose, load
from llava_npu.models.checkpoints.convert import convert
from support import tiny


def test_there_and_back(tmp_path: Path) -> None:
    tiny.write_language_model(tmp_path / "lm")
    tiny.write_clip(tmp_path / "clip")
    parts = (str(tmp_path / "clip"), str(tmp_path / "lm"))
    model, processor = compose(*parts, image_aspect_ratio="anyres", template="v1")
    model.save_pretrained(tmp_path / "hf")
    processor.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "official", to="official")
    values = json.loads((tmp_path / "official/config.json").read_text())
    assert values["mm_patch_merge_type"] == "spatial_unpad"
    assert values["image_grid_pinpoints"] == [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]  # (width, height)
    convert(tmp_path / "official", tmp_path / "back", to="hf")
    back, back_processor = load(tmp_path / "back")
    assert back.config.image_grid_pinpoints == model.config.image_grid_pinpoints
    assert torch.equal(back.model.image_newline, model.model.image_newline)
    assert back_processor.tiling == processor.tiling


@pytest.mark.slow
def test_special_tokens_in_tiles_are_llavas_flat_form(tmp_path: Path) -> None:
    tiny.write_language_model(tmp_path / "lm")
    tiny.write_clip(tmp_path / "clip")
    parts = (str(tmp_path / "clip"), str(tmp_path / "lm"))
    model, processor = compose(*parts, image_aspect_ratio="anyres", keep_prefix_tokens=True, template="v1")
    model.save_pretrained(tmp_path / "hf")
    processor.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "official", to="official")
    path = tmp_path / "official/config.json"
    values = json.loads(path.read_text())
    assert (values["mm_patch_merge_type"], values["mm_vision_select_feature"]) == ("flat", "cls_patch")
    convert(tmp_path / "official", tmp_path / "back", to="hf")
    back, back_processor = load(tmp_path / "back")
    assert back_processor.tiling == processor.tiling
    assert back.model.image_newline is None

    path.write_text(json.dumps({**values, "mm_vision_select_feature": "patch"}))
    with pytest.raises(UserError, match=r"type 'flat' is not known here; .* those with 'spatial_unpad' are"):
        convert(tmp_path / "official", tmp_path / "other", to="hf")
