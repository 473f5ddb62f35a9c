"""Packed training computes what padded training computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_npu.config import RunConfig
from llava_npu.data.dataset import ConversationDataset, Sample
from llava_npu.data.records import load_records
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.ops.fuse import install_kernels
from llava_npu.training import train
from llava_npu.training.batches import MicroBatch, micro_batch
from llava_npu.training.checkpointing.export import build_model
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.monitoring.metrics import read_metrics
from llava_npu.training.parts import prepare_parts, trained_parameters
from support.crashed_run import crash_after

MakeRun = Callable[..., RunConfig]
Collate = Callable[..., MicroBatch]


def _losses(run: RunConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(run.output_path)]


def _setting(run: RunConfig, device: torch.device) -> tuple[LlavaNpuForConditionalGeneration, list[Sample], Collate]:
    """A model as in training, samples of every kind (one image, two, none) and the way they become a micro-batch."""
    model, processor = build_model(run)
    prepare_parts(model, run.resolved_parts, None, checkpointing=False)
    model.to(device)
    install_kernels(model, device)
    dataset = ConversationDataset(load_records(run.data.path), processor)
    collate = partial(
        micro_batch, pad_token_id=processor.tokenizer.pad_token_id, image_token_id=processor.image_token_id
    )
    kinds = [0, 1, 24, 25, 2, 3] if run.stage == "finetune" else [0, 1, 2, 3, 4, 5]
    return model, [dataset[index] for index in kinds], collate


def _loss_and_gradients(
    model: LlavaNpuForConditionalGeneration, micro_batches: list[MicroBatch], device: torch.device
) -> tuple[float, dict[str, torch.Tensor]]:
    """Of a step of these micro-batches, divided by its supervised tokens, as in the loop."""
    objective = SupervisedLoss(model)
    supervised = sum(each.supervised_tokens for each in micro_batches)
    model.zero_grad()
    total = 0.0
    for each in micro_batches:
        loss = objective(each.to(device), each.sequence_lengths) / supervised
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.detach().cpu() for name, p in trained_parameters(model) if p.grad is not None}


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_loss_and_gradients_equal_padded_ones(make_run: MakeRun, device: torch.device, stage: str) -> None:
    model, samples, collate = _setting(make_run(stage=stage), device)
    padded = [collate(samples[:3], None), collate(samples[3:], None)]
    packed = [collate(samples[2:], 256), collate(samples[:2], 256)]
    expected, expected_gradients = _loss_and_gradients(model, padded, device)
    loss, gradients = _loss_and_gradients(model, packed, device)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=0, msg=name)


def test_a_sample_sees_nothing_of_its_neighbours(make_run: MakeRun, device: torch.device) -> None:
    model, samples, collate = _setting(make_run(), device)
    pack = collate(samples, 384)
    own = len(samples[0].input_ids)
    tensors = pack.to(device)

    def hidden(ids: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        inputs = {**tensors, "input_ids": ids}
        inputs = {name: inputs[name] for name in ("input_ids", "position_ids", "attention_mask")}
        with torch.no_grad():
            return model.model(**inputs, sequence_lengths=lengths, use_cache=False).last_hidden_state

    text = torch.where(tensors["input_ids"] == model.config.image_token_id, 5, tensors["input_ids"])
    other = text.clone()
    other[:, :own] = 7
    before, after = (hidden(ids, pack.sequence_lengths)[:, own:] for ids in (text, other))
    assert torch.equal(before, after)
    # And it would show: as one sequence, they do see each other.
    before, after = (hidden(ids, (384,))[:, own:] for ids in (text, other))
    assert not torch.allclose(before, after, atol=1e-3)


def test_the_first_token_of_a_sample_is_not_predicted_from_the_sample_before(
    make_run: MakeRun, device: torch.device
) -> None:
    _, samples, collate = _setting(make_run(), device)
    learning_all = [Sample(s.input_ids, s.input_ids.clone(), s.pixel_values, None, s.name) for s in samples]
    pack = collate(learning_all, 384)
    assert pack.supervised_tokens == sum(len(sample.input_ids) - 1 for sample in samples)
    assert pack.supervised_tokens == collate(learning_all, None).supervised_tokens


def test_a_packed_run_learns_and_repeats_to_the_bit(make_run: MakeRun) -> None:
    runs = [make_run(name, pack_tokens=512, max_steps=10, epochs=8) for name in ("first", "second")]
    for run in runs:
        train(run)
    assert _losses(runs[0])[-1] < _losses(runs[0])[0] - 0.5
    assert _losses(runs[0]) == _losses(runs[1])
    first, second = (load_file(run.output_path / "model/model.safetensors") for run in runs)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert {line["samples"] for line in read_metrics(runs[0].output_path)} == {8}


@pytest.mark.usefixtures("once")
def test_more_and_smaller_packs_change_nothing(make_run: MakeRun) -> None:
    one, several = make_run("one", pack_tokens=1024), make_run("several", pack_tokens=128, data={"workers": 1})
    train(one)
    train(several)
    assert _losses(several) == pytest.approx(_losses(one), abs=1e-5)
    expected = load_file(one.output_path / "model/model.safetensors")
    actual = load_file(several.output_path / "model/model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("image_tokens", [None, [1, 4, 16]], ids=["", "numbers of tokens drawn in each epoch"])
def test_an_interrupted_packed_run_goes_on_bit_for_bit(
    make_run: MakeRun, tmp_path: Path, image_tokens: list[int] | None
) -> None:
    drawn = {"model": {"projector": "matryoshka_pool"}, "data": {"image_tokens": image_tokens}} if image_tokens else {}
    whole = make_run("whole", pack_tokens=128, save_every=2, **drawn)
    train(whole)
    cut = make_run("cut", pack_tokens=128, save_every=2, **drawn)
    crash_after(cut, 5)
    train(cut)
    assert _losses(cut) == _losses(whole)
