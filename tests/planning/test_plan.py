"""What `llava-npu plan` answers, and what `train` refuses."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import Qwen2Config
from typer.testing import CliRunner

from llava_npu import UserError
from llava_npu.cli import app
from llava_npu.config import RunConfig, load_config, render_config, validate
from llava_npu.data.dataset import ConversationDataset
from llava_npu.data.plan import Plan
from llava_npu.devices import host_speeds
from llava_npu.devices.host_speeds import HostSpeeds, SecondsTable
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.published import published_model
from llava_npu.planning import check
from llava_npu.planning.host import LAUNCHER, PROCESS, host_memory
from llava_npu.planning.memory import EngineChoice, PeakMemory
from llava_npu.planning.options import MemoryModel
from llava_npu.planning.plan import plan_run
from llava_npu.planning.report import render_plan
from llava_npu.planning.roofline import StepWork, roofline
from llava_npu.planning.samples import Samples, expected_samples
from llava_npu.planning.sizing import Sizing, choose_sizing
from llava_npu.planning.target import HEADROOM, Target, product
from llava_npu.planning.tracing import Held, StepTrace, TracedOperation
from llava_npu.training.data import choose_layout
from llava_npu.training.engines import ModelSizes
from llava_npu.training.resolve import ResolvedRun
from llava_npu.training.trainer import build_model
from support import tiny

MakeRun = Callable[..., RunConfig]
RECIPES = Path(__file__).resolve().parents[2] / "src" / "llava_npu" / "recipes"
MIB = 2**20


def small_target(memory: int, count: int = 1) -> Target:
    return Target("a small device", "cpu", count, 1, memory, 1e12, "this test", None)


def plan(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.mark.slow
def test_a_split_sequence_takes_a_part_of_the_memory(make_run: MakeRun) -> None:
    changes = {"batch_size": 16, "micro_batch_size": 4, "engine": "fsdp2"}
    whole, split = (
        plan_run(ResolvedRun(make_run(**changes, sequence_parallel_size=parts)), small_target(2**40, count=4), mfu=0.4)
        for parts in (1, 4)
    )
    of_whole, of_part = (each.configured.at_configured.device for each in (whole, split))
    assert (of_part.weights, of_part.optimizer) == (of_whole.weights, of_whole.optimizer)  # shared by all, as ever
    assert of_part.activations == pytest.approx(of_whole.activations / 4, rel=0.15)
    # Each of 2 layers sends queries, keys, values and results of 4 heads (keys and values: of 2, one for each device)
    # with 12 channels of 4 bytes, forward and backward; a quarter of it stays.
    tokens = 16 * split.samples.mean_length / 4
    assert split.work.exchanges == 2 * 2 * 2
    assert split.work.exchanged == pytest.approx(tokens * 2 * 2 * 0.75 * 4 * 4 * 12 * 4, rel=1e-6)
    assert (whole.work.exchanges, whole.work.exchanged) == (0, 0)


def test_the_roofline_is_made_of_peak_bandwidth_and_links(make_run: MakeRun) -> None:
    run = ResolvedRun(make_run(batch_size=8, engine="fsdp2", pack_tokens=512))
    target = replace(small_target(2**40, count=2), bandwidth=1e30, link=1e30)

    def work(**changes: float | None) -> Any:
        return plan_run(run, replace(target, **changes), mfu=0.4).work

    computed = work()
    assert computed.roofline.vector < 1e-9 * computed.roofline.matrix  # products alone take time
    assert 0.7 < computed.best_mfu <= 1.02  # of a pack's tokens a few are padding
    slow = work(bandwidth=1e6).roofline
    assert slow.vector == pytest.approx(1e24 * computed.roofline.vector)
    assert slow.matrix > computed.roofline.matrix
    assert slow.optimizer == pytest.approx(1e24 * computed.roofline.optimizer)
    assert computed.roofline.communication < 1e-9
    linked = work(link=1.0).roofline.communication
    assert work(link=0.5).roofline.communication == pytest.approx(2 * linked, rel=0.01)  # nothing hides that much
    assert work(bandwidth=None).roofline is None


def test_a_cpu_takes_what_was_measured_of_each_kind_of_operation() -> None:
    def table(axes: int, *seconds: float) -> SecondsTable:
        return SecondsTable(((1000, 10_000), *((10, 1000),) * (axes - 1)), seconds * 2 ** (axes - 1))

    speeds = HostSpeeds(
        call=0.5,
        product=SecondsTable(((10, 1000),) * 3, (8.0, 4.0) * 4),
        streamed=table(1, 1e-3, 1e-2),
        strided=table(1, 2e-3, 2e-2),
        functions={"silu": 0.25},
        attention=table(2, 1.0, 1.0),
        causal=table(2, 2.0, 2.0),
        attention_backward=table(2, 3.0, 3.0),
        causal_backward=table(2, 4.0, 4.0),
    )
    target = replace(small_target(2**40), bandwidth=1e30, host_speeds=speeds)
    engine, sizes = EngineChoice("ddp"), ModelSizes(trained=0, frozen=0, largest_unit=0, rest=0, compute_bytes=4)

    def seconds(operation: TracedOperation) -> float:
        trace = StepTrace((), Held(), 0, {operation: 3})
        found = roofline(StepWork(trace, 2, attention_flops=0, exchanged=0), engine, sizes, target)
        assert found is not None
        assert found.total == getattr(found, operation.kind if operation.kind != "view" else "vector")
        return found.total / 6 - 0.5

    assert seconds(TracedOperation("view", 0, 0, 0)) == pytest.approx(0)
    moved = {"read": 600, "written": 200}  # what is written is read first: 1000 bytes
    assert seconds(TracedOperation("vector", 0, **moved)) == pytest.approx(1)
    assert seconds(TracedOperation("vector", 0, **moved, strided=True)) == pytest.approx(2)
    assert seconds(TracedOperation("vector", 0, 0, 50_000)) == pytest.approx(1000)  # beyond all measured sizes
    assert seconds(TracedOperation("vector", 0, **moved, name="silu_backward", shape=(100,))) == pytest.approx(25)
    assert seconds(TracedOperation("matrix", 1000, **moved, shape=(50, 50, 100))) == pytest.approx(1000 * 2**2.5)
    attention = TracedOperation("attention", 4 * 64 * 8, **moved, name="attention", shape=(8, 8, 8))
    backward = attention._replace(name="attention_backward", flops=10 * 64 * 8)
    assert seconds(attention) == pytest.approx(64)
    assert seconds(attention._replace(causal=True)) == pytest.approx(2 * 64)
    assert seconds(backward) == pytest.approx(3 * 64)
    assert seconds(backward._replace(causal=True)) == pytest.approx(4 * 64)


def test_later_micro_batches_add_their_gradients() -> None:
    target = replace(small_target(2**40), bandwidth=100.0)
    sizes = ModelSizes(trained=1000, frozen=0, largest_unit=0, rest=0, compute_bytes=4)
    work = StepWork(StepTrace((), Held(), 0), 3, attention_flops=0, exchanged=0)
    found = roofline(work, EngineChoice("ddp"), sizes, target)
    assert found is not None
    assert found.vector == pytest.approx(2 * 12 * 1000 / 100)


def test_a_cpu_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = SecondsTable(((1, 2),), (1.0, 4.0))
    measured = HostSpeeds(1e-6, table, table, table, {"exp": 1e-9}, table, table, table, table)
    times: list[torch.dtype] = []

    def measure(dtype: torch.dtype) -> HostSpeeds:
        times.append(dtype)
        return measured

    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(host_speeds, "measure_host_speeds", measure)
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.float32):
        assert host_speeds.host_speeds("a CPU", dtype) == measured
    assert times == [torch.float32, torch.bfloat16]
    (tmp_path / "a file").touch()
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "a file" / "cache"))
    assert host_speeds.host_speeds("a CPU", torch.float32) == measured
    assert len(times) == 3


def test_an_average_micro_batch_holds_an_average_share_of_the_samples() -> None:
    lengths, images = (100, 120, 140, 400), (1, 1, 1, 1)
    samples = Samples(4, lengths, images, 20.0, 1.0, 400, 1, "this test")
    padded = Sizing(False, 2, (2,), 4, samples, cached_features=False).typical(2)
    assert (padded.rows, padded.images, padded.supervised) == (2, 2, 40)
    assert padded.length == round(samples.padded_length(2))
    assert padded.lengths == (120, padded.length - 120, padded.length, 0)
    packed = Sizing(True, 400, (400,), 4, samples, cached_features=False).typical(400)
    assert (packed.rows, packed.length, packed.sequences, packed.images) == (1, 400, 2, 2)
    assert sum(packed.lengths) == 400


def test_groups_of_devices_have_to_be_whole(make_run: MakeRun) -> None:
    for changes, message in (
        ({"sequence_parallel_size": 4}, "sequence_parallel_size: 4 does not divide the number of devices, 6"),
        ({"sequence_parallel_size": 2, "batch_size": 8}, "8 does not divide over 3 groups of 2 devices; use 6 or 9"),
    ):
        with pytest.raises(UserError, match=message):
            plan_run(ResolvedRun(make_run(**changes)), small_target(2**40, count=6), mfu=0.4)


@pytest.mark.slow
def test_a_published_recipe_is_planned_offline(tmp_path: Path) -> None:
    result = plan(str(RECIPES / "llava-v1.5-7b-align.yaml"), "--device", "ascend-910b2", "--json")
    assert result.exit_code == 3  # 32 captions without recomputation are too much for 64 GiB
    found = json.loads(result.stdout)
    assert found["parameters"] == pytest.approx(7.06e9, rel=0.01)  # Vicuna-7B, CLIP-L and the projector
    assert found["trained"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert found["target"]["peak_flops"] == pytest.approx(353.9e12)
    # 16.6 TFLOP a caption with logits at every position, here at the learned ones; 40 % of the peak.
    assert found["work"]["total"] == pytest.approx(558_128 * 16.3e12, rel=0.01)
    assert found["work"]["hours"] == pytest.approx(558_128 * 16.3e12 / (0.4 * 353.9e12) / 3600, rel=0.01)
    weights = found["configured"]["at_configured"]["device"]["weights"]
    assert weights == pytest.approx(2 * 7.06e9, rel=0.01)
    assert found["recommended"]["engine"]["name"] == "ddp"
    assert 1 <= found["recommended"]["largest"] <= 32
    assert found["recommended"]["at_largest"]["device"]["activations"] < 58 * 2**30


def test_a_second_stage_is_planned_before_the_first_has_run() -> None:
    run = load_config(RECIPES / "llava-v1.5-7b-finetune.yaml")
    resolved = ResolvedRun(run, recipes=RECIPES)
    config, remarks = resolved.model, resolved.remarks
    assert config.text_config.hidden_size == 4096
    assert config.text_config.vocab_size == 32064
    assert config.num_image_tokens == 576
    assert "llava-v1.5-7b-align.yaml" in remarks[0]
    with pytest.raises(UserError, match=r"model\.checkpoint: /none/there does not exist"):
        _ = ResolvedRun(
            run.model_copy(update={"model": run.model.model_copy(update={"checkpoint": "/none/there"})})
        ).model


def test_a_model_that_cannot_be_had_is_one_clear_error(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = make_run(model={"vision_tower": "google/siglip-so400m-patch14-384", "language_model": "some/model"})
    with pytest.raises(UserError, match="language_model: some/model is not in the cache") as info:
        _ = ResolvedRun(run).model
    assert "llava-npu download some/model" in str(info.value)
    assert "lmsys/vicuna-7b-v1.5" in str(info.value)


def test_the_planned_model_is_the_one_that_is_built(make_run: MakeRun) -> None:
    for projector, options in (("mlp2x_gelu", {}), ("c_abstractor", {"num_queries": 4, "hidden_size": 16})):
        run = make_run(model={"projector": projector, "projector_options": options})
        planned = ResolvedRun(run).model
        built = build_model(run)[0].config
        assert planned.text_config.vocab_size == built.text_config.vocab_size
        assert planned.projector_options == built.projector_options
        assert planned.num_image_tokens == built.num_image_tokens
        assert planned.image_token_index == built.image_token_index


def test_a_tower_is_planned_for_the_pictures_that_its_image_processor_makes(make_run: MakeRun, tmp_path: Path) -> None:
    """A convolutional tower's configuration names no size: blocks must divide the grid that really comes."""
    tiny.write_resnet(tmp_path / "resnet")
    tower = {"vision_tower": str(tmp_path / "resnet"), "vision_feature_layer": -1, "projector": "linear"}
    for size in (None, 64):
        run = make_run(model={**tower, "image_size": size})
        resolved = ResolvedRun(run)
        planned, remarks = resolved.model, resolved.remarks
        built = build_model(run)[0].config
        assert planned.tower == built.tower
        assert planned.num_image_tokens == built.num_image_tokens
        assert remarks == []
    (tmp_path / "resnet/preprocessor_config.json").unlink()
    remarks = ResolvedRun(make_run(model=tower)).remarks
    assert "assumed to make 224 pixels" in remarks[0]


@pytest.mark.slow
def test_tiles_are_planned_as_the_pictures_make_them(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(model={"image_aspect_ratio": "anyres"})
    planned = ResolvedRun(run).model
    model, processor = build_model(run)
    assert planned.tiling == model.config.tiling
    samples = expected_samples(ResolvedRun(run))
    dataset = ConversationDataset(check_records(run), processor)
    items = [dataset[index] for index in range(len(dataset))]
    assert samples.lengths == tuple(len(item.input_ids) for item in items)
    tiles = [0 if item.pixel_values is None else len(item.pixel_values) for item in items]
    assert samples.image_counts == tuple(tiles)
    assert max(tiles) > 2  # of two images, each several
    assert samples.tiles

    squares = plan_run(ResolvedRun(make_run()), small_target(8 * 2**30), 0.4)
    plan = plan_run(ResolvedRun(run), small_target(8 * 2**30), 0.4)
    assert plan.work.sample.forward > 1.5 * squares.work.sample.forward  # three tiles for each image, and text
    assert plan.configured.at_configured.device.total > squares.configured.at_configured.device.total
    assert not any("square" in remark for remark in plan.remarks)
    # A checkpoint's own way; a run that says otherwise.
    model.save_pretrained(tmp_path / "anyres")
    processor.save_pretrained(tmp_path / "anyres")
    checkpoint = {"checkpoint": str(tmp_path / "anyres"), "vision_tower": None, "language_model": None}
    assert ResolvedRun(make_run(model=checkpoint)).model.tiling == planned.tiling
    assert ResolvedRun(make_run(model={**checkpoint, "image_aspect_ratio": "pad"})).model.tiling is None


def test_samples_are_measured_on_the_data(make_run: MakeRun) -> None:
    run = make_run()
    samples = expected_samples(ResolvedRun(run))
    _, processor = build_model(run)
    dataset = ConversationDataset(check_records(run), processor)
    lengths = [len(dataset[index].input_ids) for index in range(len(dataset))]
    assert samples.lengths == tuple(lengths)
    assert (samples.count, samples.longest, samples.most_images) == (26, max(lengths), 2)
    assert samples.images == pytest.approx(26 / 26)  # one with two, one with none


def check_records(run: RunConfig) -> Any:
    from llava_npu.training.data import open_run_data

    return open_run_data(run.data).training


def test_the_expected_longest_of_some_samples() -> None:
    samples = Samples(None, (3, 1, 4, 1, 5), (1,) * 5, 1, 1, 5, 1, "")
    every = [max(rows) for rows in itertools.product(samples.lengths, repeat=3)]
    assert samples.padded_length(3) == pytest.approx(statistics.mean(every))
    assert samples.padded_length(1) == pytest.approx(samples.mean_length)


def test_packed_rows_are_as_long_as_packing_makes_them(make_run: MakeRun) -> None:
    run = make_run(pack_tokens=256)
    sizing = choose_sizing(run, expected_samples(ResolvedRun(run)), 1)
    _, processor = build_model(run)
    records = check_records(run)
    layout = choose_layout(
        run, ConversationDataset(records, processor), Plan(len(records), 8, seed=run.seed), "none", 1, _console()
    )
    assert sizing.configured == layout.pack_length
    assert sizing.shape(sizing.configured).rows == 1


def _console() -> Any:
    from rich.console import Console

    return Console(quiet=True)


def test_a_language_model_that_reads_no_text_is_refused(make_run: MakeRun, material: Path) -> None:
    with pytest.raises(UserError, match="a model of type 'clip_vision_model', which does not read text"):
        _ = ResolvedRun(make_run(model={"language_model": str(material / "clip")})).model


def test_a_batch_must_divide_over_the_devices(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match="batch_size: 8 does not divide over 3 devices; use 6 or 9"):
        plan_run(ResolvedRun(make_run()), small_target(64 * MIB, count=3), mfu=0.4)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_more_memory_allows_more(make_run: MakeRun, adapters: bool) -> None:
    parts = {"parts": {"language_model": {"train": "lora"}}} if adapters else {}
    ample = plan_run(ResolvedRun(make_run(**parts)), small_target(64 * MIB), mfu=0.4)
    largest_of_all = ample.options[0].at_largest
    assert largest_of_all is not None
    tight = plan_run(
        ResolvedRun(make_run(**parts)), small_target(largest_of_all.device.total), mfu=0.4
    )  # of which a part is spare
    assert ample.fits
    assert ample.recommended is not None
    assert ample.recommended.largest == 8
    assert not ample.recommended.recomputed
    assert tight.configured.at_configured == ample.configured.at_configured
    largest = [choice.largest for choice in tight.options]
    assert largest[0] < 8
    assert largest == sorted(largest)  # recomputation, the last, leaves room for more
    assert tight.work == ample.work
    assert ample.parameters > ample.trained
    if adapters:
        assert ample.trained < 0.7 * ample.parameters


@pytest.mark.slow
def test_no_more_layers_are_recomputed_than_memory_needs(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"parts": {"vision_tower": {"train": "full"}}, "gradient_checkpointing": "auto", "micro_batch_size": 8}
    run = ResolvedRun(make_run(**changes))
    sizing = choose_sizing(run.config, expected_samples(run), 1)
    memory, engine = MemoryModel(run.config, run.model, sizing, small_target(2**40)), EngineChoice("ddp")
    needed = [memory.peak(engine, count, 8).device.total for count in range(memory.layers + 1)]
    assert needed == sorted(set(needed), reverse=True)
    for count, usable in enumerate(needed):
        assert memory.least_recomputed(engine, usable) == count
        assert memory.least_recomputed(engine, usable + 1) == count
    assert memory.least_recomputed(engine, 0) == memory.layers
    target = small_target(math.ceil(needed[1] / (1 - HEADROOM)))
    made = plan_run(run, target, mfu=0.4)
    assert (made.configured.recomputed, made.layers, made.fits) == (1, memory.layers, True)
    printed = io.StringIO()
    Console(file=printed, width=200).print(render_plan(made))
    assert f"1 of {memory.layers}" in printed.getvalue()
    monkeypatch.setattr(check, "SURELY", 0)
    monkeypatch.setattr(check, "this_machine", lambda *_, **__: replace(target, kind="cuda"))
    assert check.choose_recomputation(run, 1).config.gradient_checkpointing == 1


@pytest.mark.slow
def test_the_page_names_what_to_choose(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(render_config(make_run()))
    result = plan(str(path), "micro_batch_size=2", "--device", "cpu")
    assert result.exit_code == 0
    assert "recommended: engine=ddp micro_batch_size=8 gradient_checkpointing=false" in result.stdout
    assert "measured on 26 of 26 records" in result.stdout
    wrong = plan(str(path), "--device", "ascend-910c")
    assert isinstance(wrong.exception, UserError)
    assert "not listed" in str(wrong.exception)


def test_products_have_their_memory_and_peak() -> None:
    b3, h200 = product("ascend-910b3", 8, 2, "auto"), product("H200", 1, 1, "fp32")
    assert (b3.count, b3.memory, b3.compute_dtype) == (16, 64 * 2**30, torch.bfloat16)
    assert b3.peak_flops == pytest.approx(294.9e12)
    assert (h200.peak_flops, h200.compute_dtype) == (67e12, None)


@pytest.mark.slow
def test_training_refuses_what_cannot_fit(
    make_run: MakeRun, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(device=device.type)
    assert check.refuse_what_cannot_fit(ResolvedRun(run), 1) is None  # far too small to be looked at
    path = tmp_path / "run.yaml"
    path.write_text(render_config(run))
    start = partial(CliRunner().invoke, app)
    monkeypatch.setattr(check, "this_machine", lambda *_, **__: small_target(2 * MIB))
    refused = start(["train", str(path)])
    assert isinstance(refused.exception, UserError)
    assert re.match(
        r"the run does not fit: at its peak each device would hold \d.*weights .*MiB", str(refused.exception)
    )
    assert not run.output_path.exists()
    started = start(["train", str(path), "--ignore-plan"])
    assert "warning: the run does not fit" in started.stderr
    assert (run.output_path / "model/config.json").is_file()
    assert start(["train", str(path)]).exit_code == 0  # finished: nothing is left to fit
    assert isinstance(start(["train", str(path), "--fresh"]).exception, UserError)


def test_a_layer_that_cannot_be_planned_is_trained_all_the_same(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: Any) -> None:
        raise RuntimeError("aten::nonzero depends on data\nand so on")

    monkeypatch.setattr(check, "this_machine", lambda *_, **__: small_target(2 * MIB))
    monkeypatch.setattr(check, "predict", cannot)
    outcome = check.refuse_what_cannot_fit(ResolvedRun(make_run(device="cpu")), 1)
    assert outcome == "warning: the run's memory could not be planned (aten::nonzero depends on data)"


def test_training_refuses_what_the_host_cannot_hold(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ResolvedRun(make_run(device="cpu", data={"workers": 4}))
    monkeypatch.setattr(check, "available_memory", lambda: 2**30)
    with pytest.raises(UserError, match=r"1 processes with 4 data workers each take .* GiB .* 1\.0 GiB are avail"):
        check.refuse_what_cannot_fit(run, 1)
    small = ResolvedRun(make_run(device="cpu"))
    monkeypatch.setattr(check, "available_memory", lambda: PROCESS + MIB)  # Python fits, weights and a step do not
    monkeypatch.setattr(check, "this_machine", lambda *_, **__: small_target(20 * MIB))
    with pytest.raises(UserError, match=r"does not fit into this machine's memory: it takes .* of weights as stored"):
        check.refuse_what_cannot_fit(small, 1)
    monkeypatch.setattr(check, "available_memory", lambda: 2**40)
    said = check.refuse_what_cannot_fit(small, 1)
    assert said is not None
    assert said.endswith("of 1,024.0 GiB of this machine's memory")
    monkeypatch.setattr(check, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=64 * 2**10))
    with pytest.raises(UserError, match=r"data\.workers: 1 × 4 workers .* --shm-size=.* or set data\.workers=0"):
        check.refuse_what_cannot_fit(run, 1)


def test_a_node_holds_one_copy_of_the_weights_as_stored() -> None:
    """72 B in shards of 16: two bytes a weight, whatever the number of processes."""
    values = {
        "output": "x",
        "stage": "finetune",
        "model": {"checkpoint": "some/model"},
        "data": {"path": "llava_v1_5_mix665k.json"},
        "engine": "fsdp2",
    }
    run = ResolvedRun(validate(RunConfig, values, "run.yaml"))
    with torch.device("meta"):
        model = LlavaNpuForConditionalGeneration(_seventy_two_billion())
    peak, target = PeakMemory(Held(), host=0), product("ascend-910b2", 16, 1, "bf16")
    host = host_memory(run, model, EngineChoice("fsdp2"), peak, target)
    assert host.mapped == pytest.approx(2 * 73e9, rel=0.02)
    assert host.total < 2 * 73e9 + 100 * 2**30
    more = host_memory(run, model, EngineChoice("fsdp2"), peak, product("ascend-910b2", 16, 2, "bf16"))
    assert more == host  # on each of two nodes
    one, two = (
        host_memory(run, model, EngineChoice("fsdp2"), peak, product("ascend-910b2", count, 1, "bf16")).processes
        for count in (1, 2)
    )
    assert one > (two - LAUNCHER) / 2  # no other process shares its libraries


def _seventy_two_billion() -> LlavaNpuConfig:
    """LLaVA on CLIP-L and Qwen2-72B (its config.json on the hub)."""
    text = Qwen2Config(
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=152064,
        tie_word_embeddings=False,
    )
    tower = published_model("openai/clip-vit-large-patch14-336")
    return LlavaNpuConfig(vision_config=tower, text_config=text, image_token_index=152000)
