"""What is trained, part by part: that and nothing else, at its own rate, and what is frozen costs nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_npu import UserError
from llava_npu.config import RunConfig
from llava_npu.config.loading import validate
from llava_npu.data.dataset import ConversationDataset
from llava_npu.data.records import load_records
from llava_npu.models import load
from llava_npu.training import train
from llava_npu.training.batches import micro_batch
from llava_npu.training.checkpointing.export import build_model
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.monitoring.metrics import read_metrics
from llava_npu.training.parts import (
    part_of,
    prepare_parts,
    recomputable_layers,
    recompute_first,
    trained_parameters,
    unused_tower_parameters,
)

MakeRun = Callable[..., RunConfig]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "parts", "learning"),
    [
        ("align", {}, {"projector"}),
        ("finetune", {}, {"projector", "language_model"}),
        ("finetune", {"vision_tower": {"train": "full"}}, {"vision_tower", "projector", "language_model"}),
        ("finetune", {"projector": {"train": "frozen"}}, {"language_model"}),
        ("align", {"vision_tower": {"train": "full"}, "projector": {"train": "frozen"}}, {"vision_tower"}),
    ],
)
def test_what_is_named_is_trained_and_nothing_else(
    make_run: MakeRun, stage: str, parts: dict[str, dict[str, str]], learning: set[str]
) -> None:
    run = make_run(stage=stage, parts=parts, max_steps=3, micro_batch_size=4)  # some micro-batches hold text alone
    before = build_model(run)[0].state_dict()
    train(run)
    after = load(run.output_path)[0].state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {part_of(name) for name in changed} == learning
    layers = {name.split("layers.")[1][0] for name in changed if part_of(name) == "vision_tower" and "layers." in name}
    assert layers <= {"0", "1"}, "the projector sees the second last layer: the last one learns nothing"


def test_weights_behind_the_chosen_layer_are_found(make_run: MakeRun) -> None:
    unused = unused_tower_parameters(build_model(make_run())[0].config)
    assert {name.split("vision_model.")[-1].split("model.vision_tower.")[-1].split(".")[0] for name in unused} == {
        "encoder",
        "post_layernorm",
    }
    assert all("layers.2." in name for name in unused if "encoder" in name)


@pytest.mark.slow
def test_each_part_has_its_own_rate(make_run: MakeRun) -> None:
    parts = {"projector": {"learning_rate": 1e-2}, "language_model": {"learning_rate": 0.5e-3}}
    run = make_run(parts=parts, max_steps=2, optimizer={"warmup_ratio": 0.0})
    train(run)
    assert read_metrics(run.output_path)[0]["learning_rates"] == {"projector": 1e-2, "language_model": 0.5e-3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": {"projector": {"train": "frozen"}}, "stage": "align"}, "freezes everything"),
        ({"parts": {"projector": {"train": "lora"}}}, "parts.projector.train` is 'lora'"),
        (
            {"parts": {"language_model": {"train": "lora"}}, "lora": {"use_dora": True, "base_bits": 8}},
            "no DoRA for 8-bit weights; set `base_bits` to 4",
        ),
        ({"lora": {"base_bits": 4}}, "needs a part with `train: lora`, and there is none"),
        ({"parts": {"projektor": {}}}, "Did you mean 'projector'"),
        (
            {"parts": {"vision_tower": {"train": "full"}}, "data": {"path": "x.json", "cache_features": True}},
            "cache_features` stores the output of a frozen vision tower, but `parts.vision_tower.train` is `full`",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    values = {"output": "x", "stage": "finetune", "model": {"checkpoint": "x"}, "data": {"path": "x.json"}}
    with pytest.raises(UserError, match=message):
        validate(RunConfig, {**values, **changes}, "run.yaml")


def _work(run: RunConfig, device: torch.device) -> tuple[int, int]:
    """FLOPs of one forward and of its backward pass, as torch counts the operators that ran."""
    model, processor = build_model(run)
    prepare_parts(model, run.resolved_parts, None, checkpointing=False)
    model.to(device)
    dataset = ConversationDataset(load_records(run.data.path), processor)
    first = micro_batch(
        [dataset[index] for index in range(4)], None, processor.tokenizer.pad_token_id, processor.image_token_id
    )
    objective = SupervisedLoss(model)
    with FlopCounterMode(display=False) as forward:
        loss = objective(first.to(device), first.sequence_lengths)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert all(parameter.grad is not None for _, parameter in trained_parameters(model))
    return forward.get_total_flops(), backward.get_total_flops()


def test_any_number_of_recomputed_layers_gives_the_same_gradients(make_run: MakeRun, device: torch.device) -> None:
    run = make_run(parts={"vision_tower": {"train": "full"}}, precision="fp32")
    model, processor = build_model(run)
    prepare_parts(model, run.resolved_parts, None, checkpointing=True)
    model.to(device)
    dataset = ConversationDataset(load_records(run.data.path), processor)
    batch = micro_batch([dataset[0], dataset[1]], None, processor.tokenizer.pad_token_id, processor.image_token_id)
    objective, found = SupervisedLoss(model), []
    layers = len(recomputable_layers(model))
    unused = 1  # the tower's last layer, behind the one whose output is taken
    vision, text = model.config.vision_config, model.config.text_config
    assert layers == vision.num_hidden_layers - unused + text.num_hidden_layers
    for count in range(layers + 1):
        recompute_first(model, count)
        model.zero_grad()
        loss = objective(batch.to(device), batch.sequence_lengths)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        gradients = [weight.grad.clone() for _, weight in trained_parameters(model) if weight.grad is not None]
        found.append((loss.item(), gradients, backward.get_total_flops()))
    for loss, gradients, _ in found:
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        torch.testing.assert_close(gradients, found[0][1], atol=1e-6, rtol=1e-5)
    work = [flops for *_, flops in found]
    assert work == sorted(set(work))  # each layer more is computed once more
    with pytest.raises(UserError, match=f"gradient_checkpointing: 99, but .* in {layers} layers of this model"):
        prepare_parts(model, run.resolved_parts, None, checkpointing=99)


def test_training_wants_the_layers_to_recompute_chosen(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match="`auto` is chosen by the plan of `llava-npu train`"):
        train(make_run(gradient_checkpointing="auto"))


@pytest.mark.slow
def test_frozen_weights_cost_no_gradient(make_run: MakeRun, device: torch.device) -> None:
    """Source of the counts: a linear layer of n weights costs 2n in forward, 2n for its input's gradient, 2n for its
    weights' gradient."""
    if device.type != "cpu":
        pytest.skip("torch counts operators that it knows; the simulated device has its own")
    align = _work(make_run(stage="align", data={"path": make_run().data.path}), device)
    finetune = _work(make_run(), device)
    tower = _work(make_run(parts={"vision_tower": {"train": "full"}}), device)
    assert align[1] < align[0] < finetune[1] < tower[1]  # align: none in the tower, half of it in the language model
