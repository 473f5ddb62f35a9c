"""Our exports in a real vLLM: they open, prompts have our token ids, greedy answers in float32 are ours.

`make test-vllm` runs this in an environment of its own. The outcomes are a table in docs/serving.md (`outcomes.py`).
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM has an environment of its own: make test-vllm", allow_module_level=True)
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from in_vllm.outcomes import EXPORTS, ROWS, Row
from llava_npu import answer_all, load
from llava_npu.inference.prompts import prepare_prompt
from llava_npu.inference.request import Sampling
from llava_npu.models import compose
from llava_npu.models.checkpoints.convert import convert
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.loading import merge
from llava_npu.models.projectors import registered_name
from llava_npu.training import train
from support import tiny
from support.message_forms import FORMS, REFUSED, as_url
from support.small_run import small_run

QUESTION = "What is it?"
NUM_TOKENS = 12
SIDE = {"height": 56, "width": 56}
WITH_OFFICIAL_LAYOUT = ("mlp{N}x_gelu", "linear", "ldp", "ldpv2", "c_abstractor")


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model and towers with heads of 32 channels, the fewest that vLLM's attention on CPUs takes."""
    folder = tmp_path_factory.mktemp("material")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
    tiny.write_language_model(folder / "lm", **sizes, tie_word_embeddings=False, initializer_range=0.2)
    tower = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 56, "patch_size": 7}
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(**tower, intermediate_size=128)).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=SIDE).save_pretrained(folder / "clip")
    siglip = SiglipVisionConfig(**tower, intermediate_size=128, vision_use_head=False)
    SiglipVisionModel(siglip).save_pretrained(folder / "siglip")
    SiglipImageProcessor(size=SIDE).save_pretrained(folder / "siglip")
    Dinov2Model(Dinov2Config(**tower)).save_pretrained(folder / "dinov2")
    BitImageProcessor(size={"shortest_edge": 56}, crop_size=SIDE).save_pretrained(folder / "dinov2")
    tiny.write_resnet(folder / "resnet")
    tiny.write_records(folder)
    return folder


def _export(material: Path, row: Row, export: str) -> Path:
    """The model of a row as `export` writes it: a fresh one, or one trained with adapters (`merge`) or without."""
    folder = material / f"{row.projector}-{row.tower}-{export}"
    parts = {"vision_tower": str(material / row.tower), "language_model": str(material / "lm")}
    projector = {"vision_feature_layer": -1 if row.tower == "resnet" else -2}
    if export in ("train", "merge"):
        model = {**parts, **projector, "projector": row.projector, "projector_options": row.options}
        adapters = {"parts": {"language_model": {"train": "lora"}}} if export == "merge" else {}
        output = folder.with_name(f"{folder.name}-run")
        trained = Path(train(small_run(material, output, "cpu", max_steps=1, model=model, **adapters)))
        if export == "train":
            return trained
        merge(str(trained), folder)
        return folder
    torch.manual_seed(2)
    composed = compose(**parts, **projector, projector_type=row.projector, projector_options=row.options)
    if export == "save_pretrained":
        composed.save_pretrained(folder)
        return folder
    source = folder.with_name(f"{folder.name}-source")
    composed.save_pretrained(source)
    if registered_name(row.projector) in WITH_OFFICIAL_LAYOUT:
        convert(str(source), folder.with_name(f"{folder.name}-official"), "official")
        source = folder.with_name(f"{folder.name}-official")
    convert(str(source), folder, "hf")
    return folder


@dataclass
class Everywhere:
    """A model as we load it, in transformers and in vLLM."""

    row: Row
    folder: Path
    ours: LoadedModel
    engine: Any

    def vllm(self, messages: list[dict[str, Any]], num_tokens: int = 1) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the answer."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=num_tokens)
        (told,) = self.engine.chat(messages, sampling, use_tqdm=False)
        return list(told.prompt_token_ids), list(told.outputs[0].token_ids)

    def transformers(self, images: list[Image.Image]) -> list[tuple[list[int], list[int]]]:
        """Token ids of prompts and answers, of transformers' own classes where the checkpoint is plain LLaVA."""
        processor = AutoProcessor.from_pretrained(self.folder)
        model = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32).eval()
        told = []
        for image in images:
            content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            )  # fmt: skip
            ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)[0].tolist()
            length = inputs["input_ids"].shape[1]
            told.append((ids[:length], ids[length:]))
        return told


def _open(row: Row, folder: Path) -> Iterator[Everywhere]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(
        model=str(folder), dtype="float32", max_model_len=512, enforce_eager=True, max_num_seqs=4, seed=0,
        limit_mm_per_prompt={"image": 2},
    )  # fmt: skip
    yield Everywhere(row, folder, load(str(folder), dtype=torch.float32), engine)
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


OPENED = [(row, export) for row in ROWS if row.refusal is None for export in EXPORTS]


@pytest.fixture(scope="module", params=OPENED, ids=[f"{row.name}, {export}" for row, export in OPENED])
def model(request: pytest.FixtureRequest, material: Path) -> Iterator[Everywhere]:
    row, export = request.param
    yield from _open(row, _export(material, row, export))


def _images() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 255, (40 + 8 * i, 60, 3), dtype=np.uint8)) for i in range(6)]


def _question(image: Image.Image) -> list[dict[str, Any]]:
    return FORMS["image, text"].messages({"type": "image_url", "image_url": {"url": as_url(image)}})


def test_ids_and_answers_are_ours(model: Everywhere) -> None:
    images = _images()
    in_vllm = [model.vllm(_question(image), NUM_TOKENS) for image in images]
    assert in_vllm == model.transformers(images)
    decode = model.ours.processor.tokenizer.decode
    texts = [decode(ids, skip_special_tokens=True).strip() for _, ids in in_vllm]
    ours = answer_all(
        model.ours, [QUESTION] * len(images), [[image] for image in images], sampling=Sampling(NUM_TOKENS)
    )
    assert texts == [text.strip() for text in ours]
    assert len(set(texts)) > 1 or not model.row.sees, "all images have one answer, so equal answers say nothing"


def test_prompts_have_our_ids(model: Everywhere) -> None:
    """The column vLLM of the table of message forms."""
    picture = _images()[0]
    for name, form in FORMS.items():
        messages = form.messages({"type": "image_url", "image_url": {"url": as_url(picture)}})
        if form.at("vLLM") == REFUSED:
            with pytest.raises(Exception, match=r"role|empty|words|image"):
                model.vllm(messages)
            continue
        images = [picture] * form.num_images
        ids = prepare_prompt(model.ours.processor, form.turns, images, system=form.system).input_ids
        assert model.vllm(messages)[0] == ids, name


@pytest.mark.parametrize("row", [row for row in ROWS if row.refusal], ids=lambda row: row.name)
def test_what_vllm_cannot_do_is_said(material: Path, row: Row) -> None:
    with pytest.raises(Exception, match=rf"{row.refusal}.*Use `llava-npu serve`"):
        next(_open(row, _export(material, row, "save_pretrained")))
