"""A tiny whole model: CLIP tower, two-layer projector, Llama; random weights, Llama's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from llava_npu.models import LoadedModel

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """On the CPU, in eval mode."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        LlamaTokenizer,
    )

    from llava_npu.models import compose

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts")
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(tower).save_pretrained(folder / "tower")
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder / "tower")
    tokenizer = LlamaTokenizer.from_pretrained(_tokenizer_folder(folder / "tokenizer"), legacy=False)
    decoder = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    language_model = LlamaForCausalLM(decoder)
    with torch.no_grad():  # random, but decided: near-ties between tokens would make every comparison a coin toss
        language_model.lm_head.weight.mul_(20)
    language_model.save_pretrained(folder / "language_model")
    tokenizer.save_pretrained(folder / "language_model")
    model, processor = compose(str(folder / "tower"), str(folder / "language_model"), template="v1")
    with torch.no_grad():  # a fresh projector whispers: let the image be heard
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(8)
    from llava_npu.models import LoadedModel

    return LoadedModel(model.eval(), processor)


def _tokenizer_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((GOLDEN / "llama_tokenizer.model").read_bytes())
    return folder
