"""The training loop, over accelerate: one process or many, any device, readable in one sitting."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from rich.progress import Progress

from llava_npu import devices
from llava_npu.config import RunConfig
from llava_npu.data.dataset import ConversationDataset
from llava_npu.data.parsing import Record
from llava_npu.data.plan import Plan
from llava_npu.devices import Device
from llava_npu.errors import UserError
from llava_npu.models.feature_cache import (
    FeatureCache,
    fill_feature_cache,
    open_feature_cache,
    space_left,
    space_needed,
)
from llava_npu.models.loading import MODEL_FOLDER
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.processing import LlavaNpuProcessor
from llava_npu.ops.install import install_kernels
from llava_npu.planning.flops import flop_model
from llava_npu.training.bad_samples import note_bad_samples, refuse_too_many, rewind_bad_samples
from llava_npu.training.batches import MicroBatch, steps
from llava_npu.training.checkpoints import checkpoint_path, newest, prune, write_folder
from llava_npu.training.export import build_model, export_adapters, export_whole, with_pristine_frozen_parts
from llava_npu.training.layouts import choose_layout, describe_layout
from llava_npu.training.metrics import StepMetrics, rewind_metrics
from llava_npu.training.objective import SupervisedLoss
from llava_npu.training.optimizer import build_optimizer, schedule, set_learning_rate
from llava_npu.training.parts import STAGE_TEMPLATES, prepare_parts, trained_parameters
from llava_npu.training.plots import draw_plots
from llava_npu.training.progress import training_progress
from llava_npu.training.quantization import check_quantization
from llava_npu.training.reporting import open_report
from llava_npu.training.run_data import data_fingerprint, images_of, open_run_data
from llava_npu.training.run_folder import check_disk_space, is_finished, open_run
from llava_npu.training.state import load_state, random_state, random_state_file, restore_random_state, save_state
from llava_npu.training.throughput import ThroughputMeter, find_peak
from llava_npu.training.trackers import check_trackers


def train(config: RunConfig, *, fresh: bool = False, console: Console | None = None) -> Path:
    """Trains one stage, going on from the newest checkpoint in the run folder if there is one.

    Args:
        config: the run.
        fresh: delete what a run with this output folder left, and start over.
        console: where progress goes; by default the terminal.

    Returns:
        The folder of the final model.

    Raises:
        UserError: something in the configuration, the data or the machine is wrong; nothing half-written is left.
    """
    console = console or Console(stderr=True)
    device = devices.select(config.device)
    check_quantization(config, device)
    devices.apply_environment(device, console.print)
    check_trackers(config.trackers)
    accelerator = Accelerator(cpu=device.kind == "cpu")
    parts = config.resolved_parts
    records = open_run_data(config.data)
    fingerprint = data_fingerprint(config.data)
    plan = Plan(len(records), config.batch_size, config.epochs, config.seed)
    num_steps = min(plan.num_steps, config.max_steps or plan.num_steps)
    if accelerator.is_main_process:
        folder = open_run(config, fingerprint, fresh)
    accelerator.wait_for_everyone()
    folder = config.output_path
    if is_finished(folder):
        console.print(f"{folder} is finished; --fresh starts over.")
        return folder / MODEL_FOLDER

    # What is trained, and in which numbers.
    set_seed(config.seed)
    compute_dtype = _compute_dtype(config, device)
    model, processor = build_model(config)
    prepare_parts(model, parts, compute_dtype, config.gradient_checkpointing, config.lora)
    model.to(accelerator.device)
    install_kernels(model, accelerator.device)
    optimizer = build_optimizer(model, config.optimizer, parts)
    flops = flop_model(model)
    if accelerator.is_main_process:
        check_disk_space(folder, _disk_needed(model, config))
        console.print(_introduction(config, device, model, accelerator.num_processes, num_steps, compute_dtype))

    features = _features(config, model, processor, records, accelerator, console)
    template = config.data.template or STAGE_TEMPLATES[config.stage]
    dataset = ConversationDataset(
        records, processor, template, config.data.max_length, features, config.data.bad_samples
    )
    layout = choose_layout(config, dataset, plan, fingerprint, accelerator.num_processes, console)
    if accelerator.is_main_process and (description := describe_layout(layout)):
        console.print(description)

    # Go on where an interrupted run stopped.
    done = 0
    checkpoint = newest(folder, report=lambda problem: console.print(f"[yellow]{problem}[/]"))
    if checkpoint is not None:
        load_state(checkpoint.path, model, optimizer)
        done = checkpoint.step
        console.print(f"continuing after step {done} from {checkpoint.path}")
    if accelerator.is_main_process:
        rewind_metrics(folder, done)
        rewind_bad_samples(folder, done)

    objective = accelerator.prepare_model(SupervisedLoss(model))
    batches = steps(
        dataset,
        layout,
        first_step=done,
        last_step=num_steps,
        rank=accelerator.process_index,
        workers=config.data.workers,
        pin_memory=device.kind != "cpu",
    )
    if checkpoint is not None:  # last, so that nothing above draws from the generators again
        state_file = random_state_file(checkpoint.path, accelerator.process_index)
        if state_file.is_file():
            restore_random_state(torch.load(state_file, weights_only=True), device)

    peak = find_peak(device, compute_dtype)
    if accelerator.is_main_process and peak is not None:
        console.print(f"MFU is against {peak.tflops:.4g} TFLOP/s ({peak.source})")
    meter = ThroughputMeter(flops, device, peak, cached_features=features is not None)
    with (
        training_progress(console, config.stage, num_steps, done, accelerator.is_main_process) as progress,
        open_report(config, folder, progress, console) if accelerator.is_main_process else nullcontext() as report,
    ):
        for step, micro_batches in enumerate(batches, start=done):
            factor = schedule(step, num_steps, config.optimizer.warmup_ratio)
            set_learning_rate(optimizer, factor)
            counts = _counts(micro_batches, accelerator)
            if counts[2]:
                _report_bad_samples(folder, step + 1, micro_batches, config, accelerator, console)
            loss = _accumulate(objective, micro_batches, counts[0], accelerator, compute_dtype)
            grad_norm = _clip(model, config.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            meter.add(micro_batches, tokens=counts[1], samples=config.batch_size)
            finished = step + 1
            if finished % config.log_every == 0 or finished == num_steps:
                total_loss = float(accelerator.reduce(loss))
                if not math.isfinite(total_loss):
                    raise UserError(
                        f"step {finished}: the loss is {total_loss}. The last complete checkpoint is kept. Lower "
                        "optimizer.learning_rate, or look at the data of this step with `llava-npu data inspect`."
                    )
                metrics = StepMetrics(
                    step=finished,
                    epoch=finished * config.batch_size / len(records),
                    loss=total_loss,
                    learning_rate=config.optimizer.learning_rate * factor,
                    learning_rates={
                        name: part.learning_rate * factor for name, part in parts.items() if part.train != "frozen"
                    },
                    grad_norm=float(grad_norm),
                    supervised_tokens=counts[0],
                    tokens=counts[1],
                    samples=config.batch_size,
                    **asdict(meter.report(num_steps - finished)),
                )
                if report is not None:
                    report(metrics)
            if finished % config.save_every == 0 and finished < num_steps:
                _save_checkpoint(folder, finished, config.keep_checkpoints, model, optimizer, accelerator, device)

    if accelerator.is_main_process:
        draw_plots(folder)
        optimizer.state.clear()  # its moments are of no more use, and the export needs the room
        device.empty_cache()
        trained = dict(trained_parameters(model))
        if config.has_adapters:
            write_folder(folder / MODEL_FOLDER, lambda target: export_adapters(target, config, trained, processor))
        else:
            final = model if compute_dtype is None else with_pristine_frozen_parts(config, trained)
            write_folder(folder / MODEL_FOLDER, lambda target: export_whole(target, final, processor))
        prune(folder, keep=0)  # the final model replaces them
    accelerator.wait_for_everyone()
    return folder / MODEL_FOLDER


def _accumulate(
    objective: torch.nn.Module,
    micro_batches: list[MicroBatch],
    supervised_tokens: int,
    accelerator: Accelerator,
    compute_dtype: torch.dtype | None,
) -> torch.Tensor:
    """Forward and backward over one step's micro-batches; returns this process's part of the step's mean loss."""
    loss = torch.zeros((), device=accelerator.device)
    for number, micro_batch in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        with (
            accelerator.no_sync(objective) if not last else nullcontext(),
            torch.autocast(accelerator.device.type, dtype=compute_dtype, enabled=compute_dtype is not None),
        ):
            summed = objective(micro_batch.to(accelerator.device), micro_batch.sequence_lengths)
            # The mean over all supervised tokens of the step, so that 1 × N and N × 1 give the same gradient.
            # Engines average gradients over processes: times their number makes that the sum.
            part = summed / supervised_tokens
            accelerator.backward(part * accelerator.num_processes)
        loss += part.detach()
    return loss


def _counts(micro_batches: list[MicroBatch], accelerator: Accelerator) -> tuple[int, int, int]:
    """(supervised tokens, tokens, replaced samples) of a step, over micro-batches and processes."""
    supervised = sum(micro_batch.supervised_tokens for micro_batch in micro_batches)
    tokens = sum(micro_batch.tokens for micro_batch in micro_batches)
    replaced = sum(len(micro_batch.replaced) for micro_batch in micro_batches)
    if accelerator.num_processes > 1:
        total = accelerator.reduce(torch.tensor([supervised, tokens, replaced], device=accelerator.device))
        supervised, tokens, replaced = total.tolist()
    return supervised, tokens, replaced


def _report_bad_samples(
    folder: Path,
    step: int,
    micro_batches: list[MicroBatch],
    config: RunConfig,
    accelerator: Accelerator,
    console: Console,
) -> None:
    """Names the samples that were replaced in this step, on any process; stops the run if they are too many."""
    problems = gather_object([problem for micro_batch in micro_batches for problem in micro_batch.replaced])
    if accelerator.is_main_process:
        note_bad_samples(folder, step, problems, console)
    accelerator.wait_for_everyone()
    refuse_too_many(folder, config.data.max_bad_samples)


def _clip(model: torch.nn.Module, max_norm: float) -> torch.Tensor:
    parameters = [parameter for _, parameter in trained_parameters(model)]
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))


def _compute_dtype(config: RunConfig, device: Device) -> torch.dtype | None:
    if config.precision == "fp32":
        return None
    return torch.bfloat16 if config.precision == "bf16" else device.autocast_dtype


def _features(
    config: RunConfig,
    model: LlavaNpuForConditionalGeneration,
    processor: LlavaNpuProcessor,
    records: Sequence[Record],
    accelerator: Accelerator,
    console: Console,
) -> FeatureCache | None:
    """The frozen tower's output for all images of the run, computed where it is not on disk yet."""
    if not config.data.cache_features:
        return None
    images = images_of(records, config.data.bad_samples)
    cache = open_feature_cache(model, processor)
    needed, left = space_needed(cache, model, images, config.data.bad_samples == "skip"), space_left(cache)
    if max(gather_object([needed > left])):  # one decision for all processes
        problem = f"vision features of {len(images):,} images need {needed / 2**30:.1f} GiB more in {cache.folder}, "
        problem += f"where {max(left, 0) / 2**30:.1f} GiB can be taken"
        if config.data.cache_features == "auto":
            console.print(f"{problem}: they are computed in every pass.")
            return None
        raise UserError(f"data.cache_features: {problem}. Free some space, move the cache, or set it to false.")
    with accelerator.main_process_first(), Progress(console=console) as progress:
        task = progress.add_task("vision features", total=len(images))
        fill_feature_cache(
            cache,
            model,
            processor,
            images,
            report=lambda count: progress.advance(task, count),
            skip_bad=config.data.bad_samples == "skip",
        )
    return cache


def _save_checkpoint(
    folder: Path,
    step: int,
    keep: int,
    model: LlavaNpuForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    device: Device,
) -> None:
    """Writes a complete checkpoint; every process adds its random state before the folder gets its name."""
    states = folder / ".random.partial"
    if accelerator.is_main_process:
        shutil.rmtree(states, ignore_errors=True)
        states.mkdir()
    accelerator.wait_for_everyone()
    torch.save(random_state(device), random_state_file(states, accelerator.process_index))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:

        def fill(target: Path) -> None:
            save_state(target, model, optimizer)
            shutil.copytree(states, target, dirs_exist_ok=True)

        write_folder(checkpoint_path(folder, step), fill)
        prune(folder, keep)
        draw_plots(folder)
    accelerator.wait_for_everyone()


def _disk_needed(model: torch.nn.Module, config: RunConfig) -> int:
    """Bytes: checkpoints (weights and two moments of what is trained; one more while saving), and the final model."""
    trained = sum(parameter.numel() * 4 for _, parameter in trained_parameters(model))
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return 3 * trained * (config.keep_checkpoints + 1) + (trained if config.has_adapters else whole)


def _introduction(
    config: RunConfig,
    device: Device,
    model: torch.nn.Module,
    num_processes: int,
    num_steps: int,
    compute_dtype: torch.dtype | None,
) -> str:
    trained = sum(parameter.numel() for _, parameter in trained_parameters(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    numbers = str(compute_dtype or torch.float32).removeprefix("torch.")
    return (
        f"[bold]{config.stage}[/] on {num_processes} × {device.name}, {numbers}: {trained / 1e6:,.1f} M of "
        f"{total / 1e6:,.1f} M parameters, {num_steps} steps of {config.batch_size} samples → {config.output}"
    )
