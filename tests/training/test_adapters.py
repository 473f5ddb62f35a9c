"""Runs with adapters: exact targets, all that was trained in one folder, one path to load it, plain once merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_npu import UserError
from llava_npu.config import RunConfig
from llava_npu.models import load
from llava_npu.models.loading import load_with_adapters, merge
from llava_npu.training import train
from llava_npu.training.checkpointing.export import build_model
from llava_npu.training.monitoring.metrics import read_metrics
from llava_npu.training.parts import kept_types, part_of, place_weights, prepare_parts, trained_parameters

MakeRun = Callable[..., RunConfig]
LORA = {"language_model": {"train": "lora"}}
BOTH = {**LORA, "vision_tower": {"train": "lora"}}
SMALL = {"rank": 4, "alpha": 8}


def _losses(run: RunConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(run.output_path)]


def _logits(model: Any, processor: Any, material: Path) -> torch.Tensor:
    from llava_npu.data.images import load_image

    picture = load_image(material / "images/0.png", "test")
    inputs = processor(images=[picture], text="<image>\nWhat is it?", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "lora"),
    [(LORA, {}), (BOTH, {}), (LORA, {"use_dora": True}), (LORA, {"use_rslora": True, "targets": ["q_proj", "v_proj"]})],
    ids=["language model", "tower too", "DoRA", "rsLoRA"],
)
def test_train_load_and_merge(
    make_run: MakeRun, material: Path, tmp_path: Path, parts: dict[str, Any], lora: dict[str, Any]
) -> None:
    run = make_run(parts=parts, lora={**SMALL, **lora}, max_steps=8, optimizer={"learning_rate": 1e-2})
    folder = train(run)
    assert _losses(run)[-1] < _losses(run)[0] - 0.2
    assert not (folder / "model.safetensors").exists(), "adapters and projector, not the base"
    saved = load_file(folder / "adapter_model.safetensors")
    assert any("multi_modal_projector" in name for name in saved)
    assert any("vision_tower" in name for name in saved) == (parts is BOTH)

    before, processor = build_model(run)
    unmerged = load_with_adapters(folder)
    loaded, processor = load(run.output_path)
    expected = _logits(unmerged, processor, material)
    assert not torch.allclose(_logits(before, processor, material), expected, atol=1e-3), "the adapters do something"
    torch.testing.assert_close(_logits(loaded, processor, material), expected, atol=1e-5, rtol=0)

    merge(str(run.output_path), tmp_path / "plain")
    plain, processor = load(tmp_path / "plain")
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in before.named_parameters()}
    torch.testing.assert_close(_logits(plain, processor, material), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_peft_reads_what_was_trained(make_run: MakeRun, material: Path, tmp_path: Path) -> None:
    """Reference: transformers' own loading of a peft folder, into its own LLaVA: adapters and projector."""
    from transformers import AutoModelForImageTextToText

    align = train(make_run("align", stage="align", max_steps=1))
    model = {"checkpoint": str(align), "vision_tower": None, "language_model": None}
    run = make_run("lora", model=model, parts=LORA, lora=SMALL, max_steps=4, optimizer={"learning_rate": 1e-2})
    folder = train(run)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ours, processor = load(folder)
    torch.testing.assert_close(
        _logits(theirs, processor, material), _logits(ours, processor, material), atol=1e-5, rtol=0
    )


@pytest.mark.slow
def test_a_folder_with_adapters_can_be_trained_on(make_run: MakeRun, material: Path) -> None:
    first = make_run("first", parts=LORA, lora=SMALL, max_steps=4)
    folder = train(first)
    model = {"checkpoint": str(first.output_path), "vision_tower": None, "language_model": None}
    second = make_run("second", model=model, parts=LORA, lora=SMALL, max_steps=1, optimizer={"warmup_ratio": 0.9})
    train(second)  # a warm-up step has rate 0: nothing moves
    model, processor = load(folder)
    torch.testing.assert_close(
        _logits(load(second.output_path)[0], processor, material), _logits(model, processor, material)
    )


def test_targets_are_exact(make_run: MakeRun) -> None:
    run = make_run(parts=LORA, lora={**SMALL, "targets": ["q_proj"]})
    model, _ = build_model(run)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare_parts(model, run.resolved_parts, torch.bfloat16, checkpointing=False, lora=run.lora)
    place_weights(model, torch.device("cpu"), kept_types(model, torch.bfloat16))
    adapted = {name.split(".lora_")[0] for name, _ in trained_parameters(model) if ".lora_" in name}
    assert adapted == {f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}
    assert {part_of(name) for name, _ in trained_parameters(model)} == {"projector", "language_model"}
    assert all(parameter.dtype == torch.float32 for _, parameter in trained_parameters(model))
    assert (
        model.get_parameter("model.language_model.layers.0.self_attn.q_proj.base_layer.weight").dtype == torch.bfloat16
    )
    assert before.keys() >= {name.replace(".base_layer", "") for name in model.state_dict() if ".lora_" not in name}


def test_a_target_that_names_nothing(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match=r"lora.targets: 'q_prj' names no linear layer. Did you mean 'q_proj'\?"):
        train(make_run(parts=LORA, lora={**SMALL, "targets": ["q_prj"]}))


@pytest.mark.slow
def test_an_interrupted_run_with_adapters_goes_on_bit_for_bit(make_run: MakeRun) -> None:
    whole = make_run("whole", parts=BOTH, lora=SMALL, save_every=2, max_steps=6)
    train(whole)
    cut = make_run("cut", parts=BOTH, lora=SMALL, save_every=2, max_steps=6)
    _stop_after(cut, 4)
    train(cut)
    assert _losses(cut) == _losses(whole)
    weights = [load_file(run.output_path / "model/adapter_model.safetensors") for run in (whole, cut)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def _stop_after(run: RunConfig, step: int) -> None:
    from llava_npu.training.monitoring import monitor

    class CrashError(Exception):
        pass

    append = monitor.append_metrics

    def crash(folder: Path, metrics: Any) -> None:
        append(folder, metrics)
        if metrics.step == step + 1:
            raise CrashError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "append_metrics", crash)
        with pytest.raises(CrashError):
            train(run)


@pytest.mark.slow
def test_a_base_that_is_gone_or_another_is_named(make_run: MakeRun, material: Path, tmp_path: Path) -> None:
    shutil.copytree(material / "lm", tmp_path / "lm")
    model = {"vision_tower": str(material / "clip"), "language_model": str(tmp_path / "lm")}
    folder = train(make_run(parts=LORA, lora=SMALL, max_steps=1, model=model))
    weights = tmp_path / "lm/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"base\.json: the weights in .*lm are not those that its adapters"):
        load(folder)
    shutil.move(tmp_path / "lm", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"lm, which does not exist. Put it back, or write its new place"):
        load(folder)
    content[-1] ^= 1
    (tmp_path / "elsewhere/model.safetensors").write_bytes(content)
    base = json.loads((folder / "base.json").read_text())
    base["parts"]["language_model"] = str(tmp_path / "elsewhere")
    (folder / "base.json").write_text(json.dumps(base))
    load(folder)


@pytest.mark.slow
def test_adapters_that_do_not_fit_are_refused(make_run: MakeRun) -> None:
    from safetensors.torch import save_file

    folder = train(make_run(parts=LORA, lora=SMALL, max_steps=1))
    saved = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in saved if ".lora_A." in name)
    save_file({key: tensor for key, tensor in saved.items() if key != name}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is missing"):
        load(folder)


@pytest.mark.slow
def test_merging_what_has_no_adapters(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(stage="align", max_steps=1)
    train(run)
    with pytest.raises(UserError, match="has no adapters"):
        merge(str(run.output_path), tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_learns_nearly_the_same(
    make_run: MakeRun, device: torch.device, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes computes on a CPU too, slowly; that shows the way through, and CUDA's own numbers remain its own."""
    pytest.importorskip("bitsandbytes")
    if device.type == "npu":
        pytest.skip("bitsandbytes has no operators there")
    from llava_npu.devices.cpu import CpuDevice

    monkeypatch.setattr(CpuDevice, "quantized_bits", (4, 8))  # 8 bits round to float16 there: not offered to users
    recipe: dict[str, Any] = {"parts": LORA, "max_steps": 6, "optimizer": {"learning_rate": 1e-2}}
    plain, quantised = (
        make_run("plain", lora=SMALL, **recipe),
        make_run("q", lora={**SMALL, "base_bits": bits}, **recipe),
    )
    train(plain)
    train(quantised)
    assert _losses(quantised) != _losses(plain)
    assert _losses(quantised) == pytest.approx(_losses(plain), abs=0.05)
    load(quantised.output_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_refused_where_it_cannot_be(make_run: MakeRun, device: torch.device, bits: int) -> None:
    if device.type == "cuda" or (device.type, bits) == ("cpu", 4):
        pytest.skip("bitsandbytes has operators for it there")
    with pytest.raises(
        UserError, match=rf"in {bits} bits \(QLoRA\), has no operators for that on {device.type}.*Remove"
    ):
        train(make_run(parts=LORA, lora={**SMALL, "base_bits": bits}))
