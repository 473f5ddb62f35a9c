"""The planner's roofline against what happens: estimated and measured seconds of optimizer steps on the CPU.

    python benchmarks/roofline.py            # both sizes: debug, and one with five times the work
    python benchmarks/roofline.py --sizes debug --rounds 2

Each line is one setting of a run: its step is planned from its configuration, as `llava-npu plan` does, and made a few
times from the pieces of which `llava_npu.training.train` consists, on batches loaded beforehand. Both sides are in
processor time of one thread, which other programs disturb less than the clock. What the CPU takes for primitive
operations, which is all that estimates are made of, is measured several times in between, and the whole grid in
several rounds; of both sides the median counts, as a machine's speed changes within minutes.

The C library is told to keep memory that was freed (`MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_`), as accelerators'
allocators do: otherwise a step consists to a good part of the system's mapping of pages.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig

import small_models
from llava_npu import devices
from llava_npu.config import RunConfig
from llava_npu.data.dataset import ConversationDataset
from llava_npu.data.plan import Plan
from llava_npu.devices.host_speeds import HostSpeeds, SecondsTable, measure_host_speeds
from llava_npu.distributed import processes
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.ops.fuse import install_kernels
from llava_npu.planning.options import MemoryModel
from llava_npu.planning.plan import planned_step_time
from llava_npu.planning.roofline import StepTime
from llava_npu.planning.samples import expected_samples
from llava_npu.planning.sizing import choose_sizing
from llava_npu.planning.target import Target, this_machine
from llava_npu.training.batches import MicroBatch, Share, StepLoader
from llava_npu.training.checkpointing.export import build_model
from llava_npu.training.data import choose_layout
from llava_npu.training.engines import Engine, open_engine
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.optimizer import build_optimizer
from llava_npu.training.parts import STAGE_TEMPLATES, prepare_parts
from llava_npu.training.resolve import ResolvedRun

KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "OMP_NUM_THREADS": "1"}
STEPS = 1
# How many settings are measured between two measurements of the CPU.
SETTINGS_BETWEEN = 6


@dataclass(frozen=True)
class Size:
    """Of a language model and its tower."""

    hidden: int
    layers: int
    vocabulary: int
    tower_hidden: int
    tower_layers: int


SIZES = {"debug": Size(128, 4, 2112, 64, 3), "larger": Size(256, 6, 4160, 128, 4)}


@dataclass(frozen=True)
class Setting:
    """One run of the grid."""

    size: str
    stage: str
    projector: str = "mlp2x_gelu"
    recompute: bool = False
    packed: bool = False


@dataclass(frozen=True)
class Result:
    """Seconds of a step: estimated, and measured each time."""

    setting: Setting
    estimated: StepTime
    measured: list[float]

    @property
    def step(self) -> float:
        return statistics.median(self.measured)

    @property
    def error(self) -> float:
        return self.estimated.total / self.step - 1


def grid(sizes: list[str]) -> list[Setting]:
    """Stages, packed and padded, recomputation, and projectors."""
    settings = []
    for size in sizes:
        for stage, recompute, packed in itertools.product(("align", "finetune"), (False, True), (False, True)):
            settings.append(Setting(size, stage, recompute=recompute, packed=packed))
        settings += [Setting(size, "finetune", projector) for projector in list(small_models.PROJECTORS)[1:]]
    return settings


def run_config(setting: Setting, material: Path, output: Path) -> RunConfig:
    return small_models.run_config(
        material,
        output,
        setting.stage,
        setting.projector,
        batch_size=16,
        micro_batch_size=8,
        pack_tokens=1024 if setting.packed else None,
        precision="fp32",
        gradient_checkpointing=setting.recompute,
        max_steps=STEPS,
        device="cpu",
    )


def estimate(config: RunConfig, target: Target) -> StepTime:
    """What a plan says."""
    run = ResolvedRun(config)
    sizing = choose_sizing(config, expected_samples(run), 1)
    planned = planned_step_time(config, MemoryModel(config, run.model, sizing, target), sizing, target)
    assert planned is not None
    return planned


def measure(config: RunConfig, times: int = 2) -> list[float]:
    """Processor seconds of a step of training, on average over the same `STEPS` steps each time, after a first."""
    run = ResolvedRun(config)
    with processes.join(run.device, needs_group=False) as accelerator:
        engine = open_engine(config, accelerator, None)
        model, loaded_steps = _prepare(run)
        engine.prepare(SupervisedLoss(model), lambda: build_optimizer(model, config.optimizer, config.resolved_parts))
        _step(engine, loaded_steps[0])
        measured = []
        for _ in range(times):
            start = time.process_time()
            for micro_batches in loaded_steps:
                _step(engine, micro_batches)
            measured.append((time.process_time() - start) / len(loaded_steps))
        return measured


def _prepare(run: ResolvedRun) -> tuple[LlavaNpuForConditionalGeneration, list[list[MicroBatch]]]:
    """The model as it is trained, and its batches."""
    config = run.config
    loaded = build_model(config)
    prepare_parts(loaded.model, config.resolved_parts, None, config.recomputed_layers)
    install_kernels(loaded.model, run.device.torch_device)
    template = config.data.template or STAGE_TEMPLATES[config.stage]
    dataset = ConversationDataset(run.data.training, loaded.processor, template, config.data.max_length)
    plan = Plan(len(run.data.training), config.batch_size, 1, config.seed)
    layout = choose_layout(config, dataset, plan, run.data_fingerprint, 1, Console(file=io.StringIO()))
    loader = StepLoader(dataset, layout, Share.of_process(0, 1), pin_memory=False)
    return loaded.model, list(loader.steps(range(STEPS), workers=0))


def _step(engine: Engine, micro_batches: list[MicroBatch]) -> None:
    supervised = sum(each.supervised_tokens for each in micro_batches)
    for number, each in enumerate(micro_batches, start=1):
        with engine.micro_step(last=number == len(micro_batches)):
            engine.backward(engine.loss(each.to(torch.device("cpu")), each.sequence_lengths) / supervised)
    engine.step(1.0)


def write_material(folder: Path, size: Size) -> None:
    """A tower of 64 patches and a language model, random, and images with answers of very different lengths."""
    small_models.write_tower(folder / "tower", size.tower_hidden, size.tower_layers, side=112)
    language = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=27 * size.hidden // 10 // 8 * 8,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        max_position_embeddings=1024,
    )
    tokenizer = small_models.word_tokenizer(size.vocabulary - 64)
    small_models.write_language_model(folder / "language_model", language, tokenizer)
    small_models.write_records(folder, small_models.varied_squares(16 * STEPS))


def medians(measured: list[HostSpeeds]) -> HostSpeeds:
    """Of each primitive operation, the median of what was measured."""

    def middle(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, SecondsTable):
            return SecondsTable(
                first.axes, tuple(map(statistics.median, zip(*(each.seconds for each in values), strict=True)))
            )
        if isinstance(first, dict):
            return {name: statistics.median(each[name] for each in values) for name in first}
        return statistics.median(values)

    return HostSpeeds(**{name: middle([getattr(each, name) for each in measured]) for name in vars(measured[0])})


def report(results: list[Result], say: Callable[[str], None]) -> None:
    """The table, the errors, and whether settings that differ in one thing are in the order measured."""
    say(
        "| size | stage | projector | rows | recompute | matrix | attention | vector | optimizer | estimated, s | "
        "measured, s | |"
    )
    say(f"|{'---|' * 12}")
    for each in results:
        setting, parts = each.setting, each.estimated
        cells = [setting.size, setting.stage, setting.projector, "packed" if setting.packed else "padded"]
        cells += ["yes" if setting.recompute else "no"]
        cells += [
            f"{value:.3f}" for value in (parts.matrix, parts.attention, parts.vector, parts.optimizer, parts.total)
        ]
        say(f"| {' | '.join(cells)} | {each.step:.3f} | {each.error:+.0%} |")
    errors = [abs(each.error) for each in results]
    noise = max(max(each.measured) / min(each.measured) - 1 for each in results)
    say(f"\n{len(results)} settings: mean error {_mean(errors):.0%}, worst {max(errors):.0%}.")
    say(f"A setting's slowest step took up to {noise:.0%} longer than its quickest; the median is shown.")
    pairs = [pair for pair in itertools.combinations(results, 2) if _differ_in_one(pair[0].setting, pair[1].setting)]
    clear = [pair for pair in pairs if abs(pair[0].step / pair[1].step - 1) > 0.05]
    agree = sum((one.estimated.total < other.estimated.total) == (one.step < other.step) for one, other in clear)
    say(
        f"Of {len(pairs)} pairs that differ in rows, recomputation or projector alone, {len(clear)} differ by more "
        f"than 5 %; of these the estimates have {agree} in the order measured."
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _differ_in_one(one: Setting, other: Setting) -> bool:
    if (one.size, one.stage) != (other.size, other.stage):
        return False
    names = ("projector", "recompute", "packed")
    return sum(getattr(one, name) != getattr(other, name) for name in names) == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=2, help="how often the grid is measured")
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in KEPT_MEMORY.items()):  # read when a program starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT_MEMORY})
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, load average {os.getloadavg()[0]:.1f}")
    settings, speeds = grid(options.sizes), []
    measured: dict[Setting, list[float]] = {setting: [] for setting in settings}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLAVA_NPU_CACHE"] = f"{folder}/cache"
        for name in options.sizes:
            write_material(Path(folder) / name, SIZES[name])
        configs = {each: run_config(each, Path(folder) / each.size, Path(folder) / "run") for each in settings}
        for number, setting in enumerate(options.rounds * settings):
            if number % SETTINGS_BETWEEN == 0:
                speeds.append(measure_host_speeds(torch.float32))
            measured[setting] += measure(configs[setting])
            print(setting, measured[setting], file=sys.stderr, flush=True)
        target = replace(this_machine(devices.select("cpu"), 1, 1, "fp32"), host_speeds=medians(speeds))
        print(f"{target.name}: {target.host_speeds}, load average {os.getloadavg()[0]:.1f}\n")
        report([Result(each, estimate(configs[each], target), measured[each]) for each in settings], print)


if __name__ == "__main__":
    main()
