"""Training one stage: one process or many, any engine, any device. Begin at `Trainer.fit`.

Four things attach to the trainer, each through a few methods: `Monitor` (metrics, progress, validation), `Saver`
(checkpoints), `NonFiniteGuard` (steps whose gradient is not finite) and `StepProfiler` (where a step's time goes).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from rich.console import Console

from llava_npu import devices
from llava_npu.config import RunConfig
from llava_npu.data.dataset import ConversationDataset, ImageTokens
from llava_npu.data.plan import Plan
from llava_npu.distributed import processes
from llava_npu.distributed.agreement import check_agreement, check_shared, package_version
from llava_npu.distributed.interruption import RunStopped, StopRequest, stop_on_signal
from llava_npu.errors import UserError
from llava_npu.files.console import SafeConsole
from llava_npu.models.flops import flop_model
from llava_npu.models.sources import MODEL_FOLDER, changed_in_place, weight_stamps
from llava_npu.ops.fuse import install_kernels
from llava_npu.training.bad_samples import report_bad_samples, rewind_bad_samples
from llava_npu.training.batches import WHOLE, MicroBatch, Share, StepLoader
from llava_npu.training.checkpointing import saving
from llava_npu.training.checkpointing.checkpoints import BEST, linked, prune, write_folder
from llava_npu.training.checkpointing.export import Export, build_model, with_trained_template
from llava_npu.training.data import cache_features, choose_layout, describe_layout, image_token_choices, num_groups
from llava_npu.training.engines import Engine, find_engine, open_engine
from llava_npu.training.introduction import disk_needed, fused_operations, introduction, remarks
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.monitoring.jsonl import NONFINITE_STEPS, rewind_lines
from llava_npu.training.monitoring.metrics import rewind_metrics
from llava_npu.training.monitoring.monitor import Monitor, MonitoredRun, TrainedStep
from llava_npu.training.monitoring.plots import draw_plots
from llava_npu.training.monitoring.profiling import PROFILES, ProfiledSteps, StepProfiler
from llava_npu.training.monitoring.throughput import ThroughputMeter, find_peak
from llava_npu.training.monitoring.trackers import check_trackers
from llava_npu.training.nonfinite.guard import NonFiniteGuard
from llava_npu.training.optimizer import build_optimizer, schedule, set_learning_rate
from llava_npu.training.parts import STAGE_TEMPLATES, compile_layers, compute_dtype, frozen_weights, prepare_parts
from llava_npu.training.quantization import check_quantization
from llava_npu.training.resolve import ResolvedRun
from llava_npu.training.run_folder import RUN_FILE, check_disk_space, is_finished, only_process, open_run
from llava_npu.training.step_statistics import sum_over_processes

# What the numbers of a run depend on, and how its processes talk to each other.
_PACKAGES = ("llava-npu", "torch", "transformers", "accelerate", "safetensors", "peft", "deepspeed", "torch-npu")


def train(
    run: ResolvedRun | RunConfig,
    *,
    fresh: bool = False,
    accept_changes: bool = False,
    profile: str | None = None,
    console: Console | None = None,
) -> Path:
    """Trains one stage; resumes from the newest checkpoint in the run folder if there is one.

    Every process of a launch calls it.

    Args:
        run: its configuration, or what has been found out about it already.
        fresh: delete what a run with this output folder left, and start over.
        accept_changes: resume although the configuration or the data changed since the run began.
        profile: steps to profile, as "20" or "20-22"; their traces go to `profile/` in the run folder.
        console: where progress is shown; by default the terminal.

    Returns:
        The folder of the final model.

    Raises:
        UserError: something in the configuration, the data or the machine is wrong; nothing half-written is left.
        RunStopped: SIGTERM or SIGINT came; everything is saved.
    """
    console = console or SafeConsole(stderr=True, soft_wrap=True)
    run = run if isinstance(run, ResolvedRun) else ResolvedRun(run)
    config, device = run.config, run.device
    profiled = None if profile is None else ProfiledSteps.parse(profile)
    check_quantization(config, device)
    _ = config.recomputed_layers  # or this is an error now
    devices.apply_environment(device, console.print)
    check_trackers(config.trackers)
    with processes.join(device, needs_group=not find_engine(config.engine).keeps_whole_layers) as accelerator:
        if not accelerator.is_main_process:
            console = SafeConsole(quiet=True)
        check_agreement(_facts(run), accelerator)
        if run.data.left_out:
            console.print(f"{run.data.left_out:,} samples are not trained on: they are in data.validation.path too.")
        if fresh or not is_finished(config.output_path):
            run.check_model()  # before anything is written
            run.check_images()
        with _run_folder(run, accelerator, fresh, accept_changes) as folder, stop_on_signal(console.print) as stop:
            if is_finished(folder):
                if accelerator.is_main_process:  # of checkpoints that an interruption of the export left
                    prune(folder, keep=0, spare=linked(folder, BEST))
                console.print(f"{folder} is finished; --fresh starts over.")
                return folder / MODEL_FOLDER
            return Trainer(run, accelerator, stop, console, profiled).fit()


def _facts(run: ResolvedRun) -> dict[str, str]:
    """What must be the same in all processes of a run."""
    values = run.config.model_dump(mode="json")
    return {
        "Python": platform.python_version(),
        **{name: package_version(name) for name in _PACKAGES},
        **{f"the configuration's {key}": json.dumps(value) for key, value in values.items()},
        "the data's fingerprint": run.data_fingerprint,
        **{f"the fingerprint of model.{key}": value for key, value in run.model_fingerprints.items()},
    }


@contextmanager
def _run_folder(run: ResolvedRun, accelerator: Accelerator, fresh: bool, accept_changes: bool) -> Iterator[Path]:
    """The run folder, opened by the main process for all, and locked against other runs while this lasts."""
    folder, fingerprint = run.config.output_path, run.data_fingerprint
    if accelerator.is_main_process:
        with only_process(folder) if (folder / RUN_FILE).is_file() else nullcontext():
            open_run(run.config, fingerprint, run.model_fingerprints, fresh=fresh, accept_changes=accept_changes)
    with only_process(folder) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        check_shared(folder / RUN_FILE, accelerator)
        yield folder


class Trainer:
    """The state of one run in this process, and what is done with it from its first step to its model.

    Attributes:
        run, config, device: the run and where it computes.
        accelerator: the processes of the run.
        engine: moves the weights; the model is inside it once `_resume` is through.
        num_steps, first_step: how many steps the run has, and how many of them an earlier start has made.
        monitor, saver, guard, profiler: what attaches to the steps.
    """

    engine: Engine
    monitor: Monitor
    saver: saving.Saver
    guard: NonFiniteGuard

    def __init__(
        self,
        run: ResolvedRun,
        accelerator: Accelerator,
        stop: StopRequest,
        console: Console,
        profiled: ProfiledSteps | None = None,
    ) -> None:
        self.run, self.config, self.device = run, run.config, run.device
        self.folder = self.config.output_path
        self.accelerator = accelerator
        self.console = console
        self._stop = stop
        config = self.config
        self.parts = config.resolved_parts
        varied = config.data.image_tokens is not None
        self.plan = Plan(len(run.data.training), config.batch_size, config.epochs, config.seed, counts_epochs=varied)
        self.num_steps = min(self.plan.num_steps, config.max_steps or self.plan.num_steps)
        self.first_step = 0
        num_groups(config, accelerator.num_processes)  # or this is an error now
        if profiled is not None:
            profiled.check(self.num_steps)
        traces = self.folder / PROFILES / f"steps-{profiled}" / f"process-{accelerator.process_index}"
        self.profiler = StepProfiler(profiled, self.device, traces, console)

    def fit(self) -> Path:
        """Trains to the last step; returns the folder of the model."""
        set_seed(self.config.seed)
        self._build_model()
        self._build_data()
        checkpoint = self._resume()
        self._attach_saver_and_guard()
        devices.share_host_threads(self.config.data.workers)
        batches = self._loader.steps(range(self.first_step, self.num_steps), self.config.data.workers)
        if checkpoint is not None:  # last, so that nothing above draws from the generators again
            saving.load_random_state(checkpoint, self.accelerator, self.device)
        self._attach_monitor()
        with self.monitor.open(), self.profiler.open(self.first_step), self.saver:
            if self.monitor.misses_validation(self.first_step):
                self.saver.note_validation(self.first_step, self.monitor.validate(self.first_step))
            for step in range(self.first_step, self.num_steps):
                with self.profiler.step(step + 1):
                    self.train_step(step, batches)
        return self.finish()

    def train_step(self, step: int, batches: Iterator[list[MicroBatch]]) -> None:
        """Makes the step after `step` steps. Nothing here waits for the device.

        Args:
            batches: the micro-batches of this process, next those of this step.

        Raises:
            UserError: they could not be loaded, in one process or another; all steps before are saved.
        """
        self.saver.check()
        with self.monitor.waiting_for_data():
            with self.profiler.input():
                micro_batches, problem = _next(batches)
            statistics = sum_over_processes(
                None if problem else micro_batches, self.monitor.ready(), self._stop.made, self.accelerator
            )
        if statistics.ready == self.accelerator.num_processes:
            self.monitor.poll()
        if statistics.stops:
            self._save_and_stop(step)
        if statistics.replaced:
            problem = self._report_bad_samples(step + 1, micro_batches) or problem
        if statistics.failures or problem:
            self._save_and_fail(step, problem)
        factor = schedule(step, self.num_steps, self.config.optimizer.warmup_ratio)
        set_learning_rate(self.engine.optimizer, factor)
        loss = _accumulate(self.engine, micro_batches, statistics.supervised_tokens)
        finished = step + 1
        self.guard.add(finished, self.engine.step(self.config.optimizer.max_grad_norm))
        self.monitor.record(TrainedStep(finished, loss, factor, statistics, micro_batches))
        is_last, validates = finished == self.num_steps, self.monitor.validates(finished)
        # After the last step the model is written, but what comes before that may fail.
        saves = validates if is_last else finished % self.config.save_every == 0
        if saves or validates or is_last:
            self.monitor.flush()
        if saves:
            self.save(finished)
        if validates:
            self.saver.note_validation(finished, self.monitor.validate(finished))

    def save(self, step: int) -> None:
        """Writes a checkpoint of the state after `step` steps; every process calls it."""
        config = self.config
        # From the step and these all else follows: the plan, the schedule.
        self.saver.save(step, {"samples_per_step": config.batch_size, "seed": config.seed, "engine": config.engine})

    def finish(self) -> Path:
        """Writes the final model, which takes the place of the checkpoints."""
        config, engine, folder = self.config, self.engine, self.folder
        self.saver.finish()
        problem = self._changed_weights()
        if any(gather_object([problem is not None])):
            self._save_and_fail(self.num_steps, problem)
        engine.optimizer.state.clear()  # the export needs the room of its moments
        self.device.empty_cache()
        trained = engine.weights()
        if not self.accelerator.is_main_process:
            for _ in trained:  # it takes part in gathering them
                pass
        else:
            draw_plots(folder)
            model, processor = self._loaded
            export = Export(config, processor, model, self._frozen)
            write_folder(folder / MODEL_FOLDER, lambda target: export.write(target, trained))
            best = linked(folder, BEST)
            if best is not None and best.step == self.num_steps:
                best = None
            prune(folder, keep=0, spare=best)
            if best is not None:
                self.console.print(
                    f"the validation loss was lowest after step {best.step}: {best.path} stays "
                    f"(`llava-npu checkpoint export {best.path} FOLDER` makes a model of it)"
                )
        self.accelerator.wait_for_everyone()
        return folder / MODEL_FOLDER

    # ---- setting up, in this order ----

    def _build_model(self) -> None:
        """The model, its weights still in their files, with its trained and frozen parts; the run introduces itself."""
        config, device = self.config, self.device
        self._dtype = compute_dtype(config.precision, device)
        self.engine = open_engine(config, self.accelerator, self._dtype)
        self._stamps = weight_stamps(self.run.source)
        self._loaded = with_trained_template(build_model(config, mapped=True), config)
        model = self._loaded.model
        prepare_parts(model, self.parts, self._dtype, config.recomputed_layers, config.lora)
        fused = install_kernels(model, self.accelerator.device)
        compile_layers(model, device, config.compile)
        self._flops = flop_model(model)
        if self.accelerator.is_main_process:
            self._frozen = frozen_weights(model)
            check_disk_space(self.folder, disk_needed(model, config))
            numbers = self._dtype or torch.float32
            self.console.print(introduction(self.run, model, self.accelerator.num_processes, self.num_steps, numbers))
            if (operators := fused_operations(fused)) is not None:
                self.console.print(operators)
            for remark in remarks(config, self.num_steps, len(self.run.data.training)):
                self.console.print(f"[yellow]{remark}[/]")

    def _build_data(self) -> None:
        """The samples to train and to validate on, and how each step's are laid out."""
        config, data, processor = self.config, self.run.data, self._loaded.processor
        self._features = (
            cache_features(self._loaded, data, config.data, self.engine, self.console)
            if config.data.cache_features
            else None
        )
        template = config.data.template or STAGE_TEMPLATES[config.stage]
        choices = image_token_choices(config.data, self._loaded.model.config)
        drawn = None if choices is None else ImageTokens(choices, config.seed, self.plan.num_epochs)
        dataset, self._held_out = (
            ConversationDataset(
                records, processor, template, config.data.max_length, self._features, config.data.bad_samples, tokens
            )
            for records, tokens in ((data.training, drawn), (data.validation or (), None))
        )
        layout = choose_layout(
            config, dataset, self.plan, self.run.data_fingerprint, self.accelerator.num_processes, self.console
        )
        share = Share.of_process(self.accelerator.process_index, config.sequence_parallel_size)
        self._loader = StepLoader(dataset, layout, share, pin_memory=self.device.kind != "cpu")
        if self.accelerator.is_main_process and (description := describe_layout(layout, config.sequence_parallel_size)):
            self.console.print(description)

    def _resume(self) -> Path | None:
        """Prepares the engine with the weights of the newest checkpoint, which it returns, or with those at hand."""
        folder, model, console = self.folder, self._loaded.model, self.console
        found = saving.newest_for_all(folder, self.accelerator, lambda problem: console.print(f"[yellow]{problem}[/]"))
        self.first_step = found.step if found else 0
        encodes = self.parts["vision_tower"].train != "frozen"
        self.engine.prepare(
            SupervisedLoss(
                model,
                always_encode=encodes or (self.engine.shards_weights and self._features is None),
                sequence_group=processes.neighbours(self.config.sequence_parallel_size),
            ),
            lambda: build_optimizer(model, self.config.optimizer, self.parts),
        )
        if problem := self._changed_weights():
            raise problem
        if found is not None:
            saving.load_state(found.path, self.engine)
            console.print(f"resuming after step {found.step} from {found.path}")
        if self.accelerator.is_main_process:
            rewind_metrics(folder, self.first_step)
            rewind_bad_samples(folder, self.first_step)
            rewind_lines(folder / NONFINITE_STEPS, self.first_step)
        return found.path if found else None

    def _changed_weights(self) -> UserError | None:
        """What is wrong if a file was written to from which this process has mapped its weights."""
        changed = ", ".join(map(str, changed_in_place(self._stamps)))
        if not changed:
            return None
        return UserError(
            f"{changed}: was written to since this run began to read its weights, so they may be a mix of old and new "
            "ones. Put the old file back and start again. (Replacing a file by another, as `mv` does, is safe.)"
        )

    def _attach_saver_and_guard(self) -> None:
        config = self.config
        self.saver = saving.Saver(
            self.folder, self.engine, self.device, keep=config.keep_checkpoints, in_background=config.async_checkpoints
        )
        self.saver.last_step = self.first_step
        self.guard = NonFiniteGuard(self.run, self.engine, self.console, batches_of=self._batches_again, save=self.save)

    def _attach_monitor(self) -> None:
        peak = find_peak(self.device, self._dtype) if self.accelerator.is_main_process else None
        if peak is not None:
            self.console.print(f"MFU is against {peak.tflops:.4g} TFLOP/s ({peak.source})")
        meter = ThroughputMeter(self._flops, self.device, peak, cached_features=self._features is not None)
        run = MonitoredRun(self.run, self.engine, self.first_step, self.num_steps, self.console)
        self.monitor = Monitor(run, meter, self.guard, self._held_out)

    def _batches_again(self, step: int, whole: bool) -> list[MicroBatch]:
        loader, share = self._loader, self._loader.share
        if whole:
            if share.split.index:  # the first of those that share a sequence has it
                return []
            loader = replace(loader, share=replace(share, split=WHOLE))
        return next(loader.steps(range(step - 1, step), workers=0))

    def _report_bad_samples(self, step: int, micro_batches: Sequence[MicroBatch]) -> UserError | None:
        """Names the samples that were replaced; what is returned says that there were too many by now."""
        replaced = [problem for micro_batch in micro_batches for problem in micro_batch.replaced]
        try:
            report_bad_samples(self.config, step, replaced, self.accelerator, self.console)
        except UserError as error:
            return error
        return None

    def _save_and_stop(self, step: int) -> None:
        self._save_unsaved(step)
        raise RunStopped(f"stopped after step {step}, everything is saved; the same command resumes.")

    def _save_and_fail(self, step: int, problem: UserError | None) -> None:
        """Saves, and raises in every process what went wrong in one."""
        self._save_unsaved(step)
        problems = gather_object([None if problem is None else str(problem)])
        saved = f"\nAll is saved after step {step}: once this is fixed, the same command continues." if step else ""
        raise UserError(f"{next(each for each in problems if each is not None)}{saved}")

    def _save_unsaved(self, step: int) -> None:
        """Saves what is not saved yet, after `step` steps."""
        self.monitor.flush()
        if step != self.saver.last_step:
            self.save(step)
        self.saver.finish()
        self.accelerator.wait_for_everyone()  # a launcher may end the others once one has left


def _next(batches: Iterator[list[MicroBatch]]) -> tuple[list[MicroBatch], UserError | None]:
    """The next step's micro-batches, or none and why they cannot be loaded."""
    try:
        return next(batches), None
    except UserError as error:
        return [], error


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
