"""Training with several numbers of tokens for an image (`data.image_tokens`), and using the model at each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from llava_npu import UserError
from llava_npu.cli import app
from llava_npu.config import DataConfig, RunConfig
from llava_npu.data.dataset import ConversationDataset, ImageTokens
from llava_npu.data.packing import TokenCounts, plan_packs
from llava_npu.data.plan import Plan
from llava_npu.data.records import load_records
from llava_npu.data.token_counts import load_token_counts
from llava_npu.models import load
from llava_npu.models.composing import compose
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.loaded import LoadedModel
from llava_npu.ops.fuse import install_kernels
from llava_npu.training import train
from llava_npu.training.batches import SequenceSplit, micro_batch, part_of
from llava_npu.training.data import image_token_choices
from support import tiny

MakeRun = Callable[..., RunConfig]
CHOICES = [1, 4, 16]  # of the tiny tower's 4×4 patches


@pytest.fixture(scope="module")
def pooling(material: Path) -> LoadedModel:
    torch.manual_seed(0)
    loaded = compose(str(material / "clip"), str(material / "lm"), projector_type="matryoshka_pool")
    install_kernels(loaded.model, torch.device("cpu"))  # whose attention keeps samples of a pack apart
    return loaded


@pytest.fixture(scope="module")
def dataset(material: Path, pooling: LoadedModel) -> ConversationDataset:
    records = load_records(material / "train.json")
    return ConversationDataset(records, pooling.processor, image_tokens=ImageTokens(CHOICES, epochs=2))


def test_lengths_are_known_before_packing(dataset: ConversationDataset) -> None:
    counts = load_token_counts(dataset, ["data"])
    for index in range(len(dataset)):
        sample = dataset[index]
        assert len(sample.input_ids) == counts.tokens[index]
        image_tokens = int((sample.input_ids == dataset.processor.image_token_id).sum())
        assert image_tokens == sum(sample.tokens_per_image or ())
        epoch, place = divmod(index, len(dataset.records))
        assert set(sample.tokens_per_image or ()) <= {dataset.image_tokens.drawn(epoch, place)}
        assert sample.name == dataset.records[place].name
    dataset = ConversationDataset(dataset.records, dataset.processor)
    assert 2 * load_token_counts(dataset, ["data"]).tokens.sum() > counts.tokens.sum()  # counted for themselves


def test_each_sample_has_every_choice_about_as_often() -> None:
    drawn = ImageTokens(CHOICES, seed=1)
    for draws in ([drawn.drawn(0, sample) for sample in range(3000)], [drawn.drawn(epoch, 7) for epoch in range(3000)]):
        assert all(900 < draws.count(count) < 1100 for count in CHOICES)
    assert [ImageTokens(CHOICES, seed=2).drawn(0, sample) for sample in range(9)] != draws[:9]


def test_a_plan_that_counts_epochs_has_the_same_samples() -> None:
    plain, counted = Plan(10, 4, epochs=2.5, seed=3), Plan(10, 4, epochs=2.5, seed=3, counts_epochs=True)
    numbers = np.concatenate([counted.step(step) for step in range(counted.num_steps)])
    assert (numbers % 10).tolist() == np.concatenate([plain.step(step) for step in range(plain.num_steps)]).tolist()
    assert (numbers // 10).tolist() == [position // 10 for position in range(28)]
    assert counted.num_epochs == 3
    packed = plan_packs(counted, TokenCounts(np.arange(30) + 1, np.ones(30, dtype=int)), 128, 1)
    assert sorted(sample for step in range(7) for pack in packed.share(step, 0) for sample in pack) == sorted(numbers)


@torch.no_grad()
def test_a_pack_of_several_numbers(pooling: LoadedModel, dataset: ConversationDataset) -> None:
    """Each sample computes what it does alone in a model with that number; parts of a row have its image tokens."""
    samples = [dataset[index] for index in range(6)]
    assert len({sample.tokens_per_image for sample in samples}) > 2
    token = pooling.processor.image_token_id
    whole = micro_batch(samples, 256, 0, token, multiple=2)
    device = torch.device("cpu")
    inputs = {key: value for key, value in whole.to(device).items() if key not in ("labels", "supervised_positions")}
    hidden = pooling.model.model(**inputs, sequence_lengths=whole.sequence_lengths).last_hidden_state[0]
    for sample, own in zip(samples, hidden.split(list(whole.sequence_lengths)), strict=False):
        counts = sample.tokens_per_image
        if not counts:
            continue
        model = pooling.with_image_tokens(counts[0]).model
        alone = model.model(input_ids=sample.input_ids[None], pixel_values=sample.pixel_values).last_hidden_state[0]
        torch.testing.assert_close(own, alone, rtol=1e-4, atol=1e-5)
    pooling.with_image_tokens(16)
    for index in range(2):
        part = part_of(whole, SequenceSplit(index, 2), pooling.processor)
        places = part.tensors["image_positions"]
        assert (part.tensors["input_ids"].flatten()[places] == token).all()
        assert len(places) == int((part.tensors["input_ids"] == token).sum())
        assert len(part.tokens_per_image or ()) == part.images
        assert int(part.tensors["image_tokens"].max()) < sum(part.tokens_per_image or ())


def test_trained_and_used_at_each_number(make_run: MakeRun, tmp_path: Path) -> None:
    model = {"projector": "mqt", "projector_options": {"num_queries": 16, "num_heads": 4}}
    run = make_run(model=model, data={"image_tokens": [2, 8, 16]}, pack_tokens=512, max_steps=2)
    folder = train(run)
    loaded = load(folder)
    image = Image.new("RGB", (28, 28), "red")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}]
    for tokens in (16, 2, 3):
        loaded = loaded.with_image_tokens(tokens)
        inputs = loaded.processor.encode_prompts([turns], [[image]])
        assert int((inputs["input_ids"] == loaded.processor.image_token_id).sum()) == tokens
        assert loaded.model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    loaded.model.config.save_pretrained(tmp_path)
    saved = LlavaNpuConfig.from_pretrained(tmp_path)
    assert saved.num_image_tokens == saved.image_seq_length == 3
    with pytest.raises(UserError, match=r"--image-tokens: 17 tokens.*'mqt' gives 1 to 16"):
        loaded.with_image_tokens(17)


@pytest.mark.parametrize("command", ["chat", "serve", "web"])
def test_commands_that_answer_take_a_number(pooling: LoadedModel, tmp_path: Path, command: str) -> None:
    pooling.save_pretrained(tmp_path)
    port = [] if command == "chat" else ["--port", "0"]
    arguments = [command, "--model", str(tmp_path), *port, "--device", "cpu", "--image-tokens", "5"]
    result = CliRunner().invoke(app, arguments)
    with pytest.raises(UserError, match=r"--image-tokens: 5 tokens.*1, 4, 16"):
        raise result.exception or AssertionError(result.output)


@pytest.mark.parametrize(
    ("projector", "image_tokens", "parts"),
    [
        ("mlp2x_gelu", [4], ("data.image_tokens: 4 tokens", "'mlp2x_gelu' gives 16", "matryoshka_pool")),
        ("mlp2x_gelu", "all", ("data.image_tokens", "'mlp2x_gelu' gives 16")),
        ("matryoshka_pool", [4, 5], ("5 tokens", "1, 4, 16", "4×4")),
        ("mqt", [300], ("300 tokens", "1 to 256")),
        ("mqt", [], ("empty list",)),
    ],
)
def test_numbers_that_cannot_be(projector: str, image_tokens: Any, parts: tuple[str, ...]) -> None:
    model = LlavaNpuConfig(
        vision_config=tiny.clip_config(),
        text_config=tiny.text_config(),
        image_token_index=302,
        projector_type=projector,
    )
    with pytest.raises(UserError) as caught:
        image_token_choices(DataConfig(path="train.json", image_tokens=image_tokens), model)
    assert all(part in str(caught.value) for part in parts), caught.value
