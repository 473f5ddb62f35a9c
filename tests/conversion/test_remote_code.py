"""A model with a projector that transformers does not know, opened where this package is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_npu.models import compose
from llava_npu.models.checkpoints.convert import convert
from support import tiny

_WITHOUT_PACKAGE = """
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

class Absent(MetaPathFinder):  # as if it were not installed: only what comes after it may provide it
    def find_spec(self, name, path=None, target=None):
        return None
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__name__", "").startswith("__editable__")]
class Hidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "llava_npu" else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hidden
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert "modeling_llava_npu.py" in sys.modules["llava_npu.models.modeling"].__spec__.origin
inputs = processor(images=Image.new("RGB", (40, 30), "red"), text="<image>What is it?", return_tensors="pt")
with torch.no_grad():
    save_file({"logits": model(**inputs).logits, **inputs}, out)
model.save_pretrained(folder + "-again")
processor.save_pretrained(folder + "-again")
AutoModelForImageTextToText.from_pretrained(folder + "-again", trust_remote_code=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["ldpv2", pytest.param("resampler", marks=pytest.mark.exhaustive)])
def test_it_computes_the_same(tmp_path: Path, projector: str) -> None:
    parts = tiny.write_clip(tmp_path / "clip"), tiny.write_language_model(tmp_path / "lm")
    options = {"num_queries": 4} | ({"num_heads": 4} if projector == "resampler" else {})
    model, processor = compose(str(parts[0]), str(parts[1]), projector, options)
    model.eval().save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "exported", "hf")
    assert "auto_map" in json.loads((tmp_path / "exported/config.json").read_text())

    command = [sys.executable, "-c", _WITHOUT_PACKAGE, str(tmp_path / "exported"), str(tmp_path / "out.safetensors")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf-home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    given = load_file(tmp_path / "out.safetensors")
    logits = given.pop("logits")
    assert (given["input_ids"] == model.config.image_token_id).sum() == 4
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, logits)
