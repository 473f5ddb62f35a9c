"""Settings of official checkpoints: read and prompted as official LLaVA's own code does, or refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava_npu import UserError, load
from llava_npu.models.checkpoints.convert import Help, convert, open_checkpoint
from support import tiny
from support.official_models import official_weights, reference_model, write_official

LLAMA_3_ROPE = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    return write_official(folder / "x", tiny.write_clip(folder / "tower"), official_weights(reference_model()), "bin")


@pytest.fixture
def official(original: Path, tmp_path: Path) -> Any:
    """Makes a folder with other settings; None removes one."""

    def make(name: str = "x", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for path in original.iterdir():
            (folder / path.name).symlink_to(path)
        values = {**json.loads((original / "config.json").read_text()), **changes}
        (folder / "config.json").unlink()
        text = json.dumps({key: value for key, value in values.items() if value is not None})
        (folder / "config.json").write_text(text)
        return folder

    return make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is true: the model was trained with <im_start>"),
        ({"mm_use_im_start_end": "true"}, "mm_use_im_start_end is true"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer is missing"),
        ({"mm_vision_select_layer": "last"}, "mm_vision_select_layer is 'last'"),
        ({"mm_vision_select_feature": "cls"}, "allowed are patch and cls_patch"),
        ({"mm_resampler_type": "spatial_pool"}, "mm_resampler_type 'spatial_pool'"),
        ({"image_aspect_ratio": "anyres"}, "image_grid_pinpoints None; it must be a list"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio 'anyres_max_9'"),
        ({"s2": True, "s2_scales": "336,672"}, "s2 is true"),
        ({"model_type": "llava_mpt"}, "model_type 'llava_mpt' is not known"),
    ],
)
def test_what_would_be_prompted_otherwise_is_refused(official: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(official(**changes)), Help())


def test_an_embedding_without_rows_is_refused(official: Any, tmp_path: Path) -> None:
    folder = official()
    weights = torch.load(folder / "pytorch_model.bin")
    weights["model.embed_tokens.weight"] = torch.tensor(1.0)
    (folder / "pytorch_model.bin").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"embed_tokens\.weight has shape \(\); its config calls for"):
        convert(str(folder), tmp_path / "hf", "hf")


def test_a_trained_tower_that_is_not_there_is_refused(official: Any, tmp_path: Path) -> None:
    folder = official(unfreeze_mm_vision_tower=True)
    open_checkpoint(str(folder), Help())
    weights = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    torch.save(
        {name: each for name, each in weights.items() if "vision_tower" not in name}, folder / "pytorch_model.bin"
    )
    with pytest.raises(UserError, match=r"its vision tower was trained .* weights are not among the model's"):
        convert(str(folder), tmp_path / "hf", "hf")


def test_a_whole_model_has_its_own_weights_whatever_lies_next_to_them(official: Any) -> None:
    folder = official()
    expected = dict(open_checkpoint(str(folder), Help()).weights())
    other = {name: each + 1 for name, each in torch.load(folder / "pytorch_model.bin").items()}
    torch.save({name: each for name, each in other.items() if "mm_projector" in name}, folder / "mm_projector.bin")
    torch.save(other, folder / "old.bin")
    index = {"weight_map": dict.fromkeys(other, "old.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = dict(open_checkpoint(str(folder), Help()).weights())
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def test_settings_as_text_are_read_as_what_they_say(official: Any) -> None:
    plain = open_checkpoint(str(official("plain")), Help())
    texts = {"mm_vision_select_layer": "-2", "mm_use_im_start_end": "False", "hidden_size": "48", "rope_theta": "5e4"}
    read = open_checkpoint(str(official("texts", **texts, tie_word_embeddings="false")), Help())
    assert read.config.to_dict() == plain.config.to_dict()


@pytest.mark.parametrize("rope", [LLAMA_3_ROPE["rope_scaling"], {"type": "linear", "factor": 2.0}])
def test_rotary_settings_are_kept(official: Any, tmp_path: Path, rope: dict[str, Any]) -> None:
    convert(str(official(rope_theta=500000.0, rope_scaling=rope)), tmp_path / "hf", "hf")
    for config in (
        load(tmp_path / "hf").model.config,
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").config,
    ):
        found = config.text_config.rope_parameters
        assert found["rope_theta"] == 500000.0
        assert found["rope_type"] == rope.get("rope_type", rope.get("type"))
        assert found["factor"] == rope["factor"]


@pytest.mark.parametrize(
    ("name", "model_type", "template"),
    [
        ("llava-v1.5-7b", "llava", "v1"),
        ("llava-v1.5-7b", "llava_llama", "v1"),
        ("llava-v1.6-mistral-7b", "llava_mistral", "mistral"),
        ("llava-v1.6-34b", "llava_llama", "chatml_direct"),
        ("llava-llama-2-13b-chat", "llava", "llama_2"),
        ("LLaVA-7B-v0", "llava", "v0"),
        ("llava-next-qwen", "llava_qwen", "tokenizer"),
    ],
)
def test_the_conversation_form_is_the_one_of_its_code(official: Any, name: str, model_type: str, template: str) -> None:
    folder = official(name, model_type=model_type)
    assert open_checkpoint(str(folder), Help()).processor.template == template
    assert open_checkpoint(str(folder), Help(template="chatml")).processor.template == "chatml"


def test_a_form_that_is_not_known_must_be_given(
    official: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))
    folder = official(model_type="llava_qwen", attention_bias=None)
    words = tiny.tokenizer()
    words.chat_template = None
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    words.save_pretrained(folder)
    with pytest.raises(UserError, match=r"not in the conversation form of LLaVA-1.5.*--template"):
        open_checkpoint(str(folder), Help())
    assert open_checkpoint(str(folder), Help(template="chatml")).processor.template == "chatml"
    plain = official("plain")
    assert load(plain, template="llama_2").processor.template == "llama_2"
    assert "its conversation template is 'llama_2'; --template gives another" in capsys.readouterr().err


def test_our_own_official_folders_say_their_template(official: Any, tmp_path: Path) -> None:
    convert(str(official()), tmp_path / "hf", "hf", Help(template="llama_2"))
    convert(str(tmp_path / "hf"), tmp_path / "official", "official")
    assert open_checkpoint(str(tmp_path / "official"), Help()).processor.template == "llama_2"
