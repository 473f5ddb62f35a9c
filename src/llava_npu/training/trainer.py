"""The training loop: one process or many, any engine, any device, readable in one sitting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from rich.progress import Progress

from llava_npu import devices
from llava_npu.config import RunConfig
from llava_npu.data.dataset import ConversationDataset
from llava_npu.data.plan import Plan
from llava_npu.devices import Device
from llava_npu.distributed import processes
from llava_npu.distributed.interruption import RunStopped, StopRequest, stop_on_signal
from llava_npu.errors import UserError
from llava_npu.models.flops import flop_model
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.sources import MODEL_FOLDER
from llava_npu.models.vision.feature_cache import (
    FeatureCache,
    fill_feature_cache,
    open_feature_cache,
    space_left,
    space_needed,
)
from llava_npu.ops.install import install_kernels
from llava_npu.training.bad_samples import note_bad_samples, refuse_too_many, rewind_bad_samples
from llava_npu.training.batch_layout import choose_layout, describe_layout
from llava_npu.training.batches import MicroBatch, steps
from llava_npu.training.checkpointing import saving
from llava_npu.training.checkpointing.checkpoints import prune, write_folder
from llava_npu.training.checkpointing.export import (
    build_model,
    export_adapters,
    with_pristine_frozen_parts,
)
from llava_npu.training.compiling import compile_layers
from llava_npu.training.data import RunData, images_of
from llava_npu.training.engines import Engine, find_engine, open_engine
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.monitoring.jsonl import NONFINITE_STEPS, rewind_lines
from llava_npu.training.monitoring.metrics import rewind_metrics
from llava_npu.training.monitoring.observing import Observer
from llava_npu.training.monitoring.plots import draw_plots
from llava_npu.training.monitoring.progress import training_progress
from llava_npu.training.monitoring.reporting import open_report
from llava_npu.training.monitoring.throughput import ThroughputMeter, find_peak
from llava_npu.training.monitoring.trackers import check_trackers
from llava_npu.training.nonfinite.guard import NonFiniteGuard
from llava_npu.training.optimizer import build_optimizer, schedule, set_learning_rate
from llava_npu.training.parts import STAGE_TEMPLATES, prepare_parts, trained_parameters
from llava_npu.training.precision import compute_dtype
from llava_npu.training.quantization import check_quantization
from llava_npu.training.resolve import ResolvedRun
from llava_npu.training.run_folder import RUN_FILE, check_disk_space, is_finished, only_process, open_run
from llava_npu.training.step_statistics import count_together
from llava_npu.training.validation import is_due, validation_loss


def train(
    run: ResolvedRun | RunConfig,
    *,
    fresh: bool = False,
    accept_changes: bool = False,
    console: Console | None = None,
) -> Path:
    """Trains one stage, going on from the newest checkpoint in the run folder if there is one.

    Every process of a launch calls it.

    Args:
        run: its configuration, or what has been found out about it already.
        fresh: delete what a run with this output folder left, and start over.
        accept_changes: go on although the configuration or the data changed since the run began.
        console: where progress goes; by default the terminal.

    Returns:
        The folder of the final model.

    Raises:
        UserError: something in the configuration, the data or the machine is wrong; nothing half-written is left.
        RunStopped: SIGTERM or SIGINT came; all is saved.
    """
    console = console or Console(stderr=True, soft_wrap=True)
    run = run if isinstance(run, ResolvedRun) else ResolvedRun(run)
    config, device = run.config, run.device
    check_quantization(config, device)
    devices.apply_environment(device, console.print)
    check_trackers(config.trackers)
    with processes.join(device, needs_group=not find_engine(config.engine).keeps_whole_layers) as accelerator:
        if not accelerator.is_main_process:
            console = Console(quiet=True)
        data, fingerprint = run.data, run.data_fingerprint
        if data.left_out:
            console.print(f"{data.left_out:,} samples are not trained on: they are in data.validation.path too.")
        if fresh or not is_finished(config.output_path):
            run.check_model()  # before anything is written
            run.check_images()
        with (
            _run_folder(config, fingerprint, accelerator, fresh, accept_changes) as folder,
            stop_on_signal(console.print) as stop,
        ):
            if is_finished(folder):
                console.print(f"{folder} is finished; --fresh starts over.")
                return folder / MODEL_FOLDER
            return _train(config, folder, data, fingerprint, device, accelerator, stop, console)


@contextmanager
def _run_folder(
    config: RunConfig, fingerprint: str, accelerator: Accelerator, fresh: bool, accept_changes: bool
) -> Iterator[Path]:
    """The run folder, opened by the main process for all, and for nobody else as long as this lasts."""
    folder = config.output_path
    if accelerator.is_main_process:
        with only_process(folder) if (folder / RUN_FILE).is_file() else nullcontext():
            open_run(config, fingerprint, fresh=fresh, accept_changes=accept_changes)
    with only_process(folder) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        yield folder


def _train(
    config: RunConfig,
    folder: Path,
    data: RunData,
    fingerprint: str,
    device: Device,
    accelerator: Accelerator,
    stop: StopRequest,
    console: Console,
) -> Path:
    plan = Plan(len(data.training), config.batch_size, config.epochs, config.seed)
    num_steps = min(plan.num_steps, config.max_steps or plan.num_steps)
    parts = config.resolved_parts

    # What is trained, and in which numbers.
    set_seed(config.seed)
    dtype = compute_dtype(config.precision, device)
    engine = open_engine(config, accelerator, dtype)
    loaded = build_model(config)
    model, processor = loaded
    prepare_parts(model, parts, dtype, config.gradient_checkpointing, config.lora)
    install_kernels(model, accelerator.device)
    compile_layers(model, device, config.compile)
    flops = flop_model(model)
    if accelerator.is_main_process:
        check_disk_space(folder, _disk_needed(model, config))
        console.print(_introduction(config, device, model, accelerator.num_processes, num_steps, dtype))
        for remark in _remarks(config, num_steps, len(data.training)):
            console.print(f"[yellow]{remark}[/]")

    features = _features(config, loaded, data, accelerator, console)
    template = config.data.template or STAGE_TEMPLATES[config.stage]
    dataset, held_out = (
        ConversationDataset(records, processor, template, config.data.max_length, features, config.data.bad_samples)
        for records in (data.training, data.validation or ())
    )
    layout = choose_layout(config, dataset, plan, fingerprint, accelerator.num_processes, console)
    if accelerator.is_main_process and (description := describe_layout(layout)):
        console.print(description)

    # Go on where an interrupted run stopped.
    checkpoint = saving.newest_for_all(folder, accelerator, lambda problem: console.print(f"[yellow]{problem}[/]"))
    done = checkpoint.step if checkpoint else 0
    if checkpoint is not None:
        weights = saving.load_weights(checkpoint.path, model)
        console.print(f"continuing after step {done} from {checkpoint.path}")
    engine.prepare(
        SupervisedLoss(
            model, always_encode=parts["vision_tower"].train != "frozen" or (engine.shards_weights and features is None)
        ),
        lambda: build_optimizer(model, config.optimizer, parts),
    )
    if checkpoint is not None:
        saving.load_optimizer(checkpoint.path, engine, weights)
    if accelerator.is_main_process:
        rewind_metrics(folder, done)
        rewind_bad_samples(folder, done)
        rewind_lines(folder / NONFINITE_STEPS, done)

    saver = saving.Saver(
        folder,
        engine,
        device,
        keep=config.keep_checkpoints,
        in_background=config.async_checkpoints,
    )
    batches_of = partial(steps, dataset, layout, rank=accelerator.process_index, pin_memory=device.kind != "cpu")
    batches = batches_of(first_step=done, last_step=num_steps, workers=config.data.workers)

    def save(step: int) -> None:
        saver.save(step, _place(config))

    guard = NonFiniteGuard(
        folder,
        engine,
        device,
        limit=config.max_nonfinite_steps,
        batches_of=lambda step: next(batches_of(first_step=step - 1, last_step=step, workers=0)),
        save=save,
        console=console,
    )
    if checkpoint is not None:  # last, so that nothing above draws from the generators again
        saving.load_random_state(checkpoint.path, accelerator, device)

    peak = find_peak(device, dtype) if accelerator.is_main_process else None
    if peak is not None:
        console.print(f"MFU is against {peak.tflops:.4g} TFLOP/s ({peak.source})")
    meter = ThroughputMeter(flops, device, peak, cached_features=features is not None)
    with (
        training_progress(console, config.stage, num_steps, done, accelerator.is_main_process) as progress,
        open_report(config, folder, progress, console) if accelerator.is_main_process else nullcontext() as report,
    ):
        observer = Observer(device, guard, report)
        for step, micro_batches in enumerate(batches, start=done):
            saver.check()
            counts = count_together(micro_batches, observer.has_arrived(), stop.made, accelerator)
            if counts.arrived == accelerator.num_processes:
                observer.look()
            if counts.stops:
                observer.finish()
                _save_and_stop(step, done, saver, config, accelerator)
            if counts.replaced:
                _report_bad_samples(folder, step + 1, micro_batches, config, accelerator, console)
            factor = schedule(step, num_steps, config.optimizer.warmup_ratio)
            set_learning_rate(engine.optimizer, factor)
            loss = _accumulate(engine, micro_batches, counts.supervised_tokens)
            finished = step + 1
            guard.add(finished, engine.step(config.optimizer.max_grad_norm))

            meter.add(micro_batches, tokens=counts.tokens, samples=config.batch_size)
            saves = finished % config.save_every == 0 and finished < num_steps
            validates = config.data.validation is not None and is_due(finished, num_steps, config.data.validation.every)
            if validates or finished % config.log_every == 0 or finished == num_steps:
                speed = meter.report(num_steps - finished)
                known = {
                    "step": finished,
                    "epoch": finished * config.batch_size / len(data.training),
                    "learning_rate": config.optimizer.learning_rate * factor,
                    "learning_rates": {
                        name: part.learning_rate * factor for name, part in parts.items() if part.train != "frozen"
                    },
                    "supervised_tokens": counts.supervised_tokens,
                    "tokens": counts.tokens,
                    "samples": config.batch_size,
                    "validation_loss": _validate(engine, held_out, device, config) if validates else None,
                }
                observer.observe(accelerator.reduce(loss), known, speed)
                if validates:
                    meter.resume()
            if saves or finished == num_steps:
                observer.finish()
            if saves:
                save(finished)

    saver.finish()
    engine.optimizer.state.clear()  # its moments are of no more use, and the export needs the room
    device.empty_cache()
    # Frozen weights leave as they came, in a shard or rounded to 16 bits as they may be here.
    anew = config.has_adapters or engine.shards_weights or dtype is not None
    trained = dict(engine.weights()) if anew else {}
    if accelerator.is_main_process:
        draw_plots(folder)
        if config.has_adapters:
            write_folder(folder / MODEL_FOLDER, lambda target: export_adapters(target, config, trained, processor))
        else:
            final = with_pristine_frozen_parts(config, trained) if anew else model
            write_folder(folder / MODEL_FOLDER, LoadedModel(final, processor).save_pretrained)
        prune(folder, keep=0)  # the final model replaces them
    accelerator.wait_for_everyone()
    return folder / MODEL_FOLDER


def _validate(engine: Engine, held_out: ConversationDataset, device: Device, config: RunConfig) -> float:
    return validation_loss(
        engine, held_out, device, micro_batch_size=config.micro_batch_size, workers=config.data.workers
    )


def _accumulate(engine: Engine, micro_batches: Sequence[MicroBatch], supervised_tokens: int) -> torch.Tensor:
    """Forward and backward over one step's micro-batches; returns this process's part of the step's mean loss."""
    device = engine.accelerator.device
    loss = torch.zeros((), device=device)
    for number, micro_batch in enumerate(micro_batches, start=1):
        with engine.micro_step(last=number == len(micro_batches)):
            summed = engine.loss(micro_batch.to(device), micro_batch.sequence_lengths)
            # The mean over all supervised tokens of the step, so that 1 × N and N × 1 give the same gradient.
            part = summed / supervised_tokens
            # A loss that is not finite makes the gradient so, on every process: all of them skip the step.
            engine.backward(engine.scaler.scale(part * (1 + 0 * part.detach())))
        loss += part.detach()
    return loss


def _save_and_stop(
    step: int, first_step: int, saver: saving.Saver, config: RunConfig, accelerator: Accelerator
) -> None:
    """Saves what is not saved yet, after `step` steps, and leaves."""
    if step not in (first_step, saver.last_step):
        saver.save(step, _place(config))
    saver.finish()
    accelerator.wait_for_everyone()  # a launcher may end the others once one has left
    raise RunStopped(f"stopped after step {step}, all saved; the same command continues.")


def _place(config: RunConfig) -> dict[str, object]:
    """What a checkpoint says of the run beside its step, from which all else follows: the plan, the schedule."""
    return {"samples_per_step": config.batch_size, "seed": config.seed, "engine": config.engine}


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


def _features(
    config: RunConfig,
    loaded: LoadedModel,
    data: RunData,
    accelerator: Accelerator,
    console: Console,
) -> FeatureCache | None:
    """The frozen tower's output for all images of the run, computed where it is not on disk yet."""
    if not config.data.cache_features:
        return None
    images = images_of(data, config.data.bad_samples)
    model = loaded.model
    cache = open_feature_cache(loaded)
    needed, left = space_needed(cache, model, images, config.data.bad_samples == "skip"), space_left(cache)
    if max(gather_object([needed > left])):  # one decision for all processes
        problem = f"vision features of {len(images):,} images need {needed / 2**30:.1f} GiB more in {cache.folder}, "
        problem += f"where {max(left, 0) / 2**30:.1f} GiB can be taken"
        if config.data.cache_features == "auto":
            console.print(f"{problem}: they are computed in every pass.")
            return None
        raise UserError(f"data.cache_features: {problem}. Free some space, move the cache, or set it to false.")
    model.model.vision_tower.to(accelerator.device)
    with accelerator.main_process_first(), Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("vision features", total=len(images))
        fill_feature_cache(
            cache,
            loaded,
            images,
            report=lambda count: progress.advance(task, count),
            skip_bad=config.data.bad_samples == "skip",
        )
    return cache


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
    steps = "1 step" if num_steps == 1 else f"{num_steps} steps"
    return (
        f"[bold]{config.stage}[/] on {num_processes} × {device.name}, {numbers}: {trained / 1e6:,.1f} M of "
        f"{total / 1e6:,.1f} M parameters, {steps} of {config.batch_size} samples → {config.output}"
    )


def _remarks(config: RunConfig, num_steps: int, num_samples: int) -> Iterator[str]:
    """What whoever has little data may not expect."""
    if num_samples < config.batch_size:
        yield f"batch_size is {config.batch_size}, the data {num_samples} samples: a step sees each more than once"
    if not any(schedule(step, num_steps, config.optimizer.warmup_ratio) for step in range(num_steps)):
        yield (
            "the only step is warmup, with a learning rate of 0: nothing is learned. "
            "Take more data or epochs, a smaller batch_size, or optimizer.warmup_ratio=0"
        )
