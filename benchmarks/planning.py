"""The planner against what happens: predicted and measured peak memory of whole small runs, over a grid of settings.

    python benchmarks/planning.py                                    # this machine's device
    PYTHONPATH=simulated-npu python benchmarks/planning.py --device npu > table.md

Each line is one run of `llava_npu.training.train` (three steps), planned first from its configuration. On an
accelerator the peak is its allocator's. On a CPU it is that of torch's allocator, as torch's profiler reports every
allocation: the process's resident memory would count libraries and what the C library keeps.

The simulated NPU counts the tensors that torch allocates, to the byte, on a real allocator's interface. It is no
measurement of real hardware, whose allocator rounds and whose operators have scratch memory.
"""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaConfig

import small_models
from llava_npu import devices
from llava_npu.config import RunConfig
from llava_npu.planning.check import MemoryPrediction, predict
from llava_npu.planning.target import this_machine
from llava_npu.training import train
from llava_npu.training.resolve import ResolvedRun

MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """One run of the grid."""

    stage: str
    projector: str
    micro_batch_size: int
    gradient_checkpointing: bool | int
    precision: str
    cache_features: bool
    pack_tokens: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Bytes."""

    setting: Setting
    prediction: MemoryPrediction
    measured: int

    @property
    def predicted(self) -> int:
        return self.prediction.peak.device.total

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def compare(settings: Iterable[Setting], folder: Path, kind: str) -> Iterator[Comparison]:
    """Plans and runs each setting; `folder` gets the models, the data and the runs."""
    material = folder / "material"
    if not material.exists():
        write_material(material)
    device = devices.select(kind)
    before = _allocated(device)  # of this process's first run on: tables that are made once and stay are a run's own
    for number, setting in enumerate(settings):
        config = run_config(setting, material, folder / f"run-{number}", kind)
        prediction = predict(ResolvedRun(config), this_machine(device, 1, 1, config.precision, for_time=False))
        yield Comparison(setting, prediction, measure(config, device, before))


def measure(config: RunConfig, device: devices.Device, before: int) -> int:
    """The most bytes that tensors of the run take, and what was `before` on the device not counted."""
    quiet = Console(file=io.StringIO())
    gc.collect()
    if device.kind == "cpu":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            train(config, console=quiet)
        # Weights that are computed with as they are stored stay in their files, and are the run's; of those that are
        # rounded, the files are the system's to drop (`planning/host.py` counts them).
        parts = [config.model.vision_tower, config.model.language_model] if config.precision != "fp32" else []
        files = {file.stat().st_size for part in parts if part for file in Path(part).glob("*.safetensors")}
        return _peak_of_allocations(profile, files)
    device.reset_peak_memory()
    train(config, console=quiet)
    return device.memory().peak - before


def _allocated(device: devices.Device) -> int:
    gc.collect()
    memory = device.memory()
    return memory.total - memory.free


def _peak_of_allocations(profile: torch.profiler.profile, left_out: Collection[int] = ()) -> int:
    """Between the first optimizer step and the last: a CPU also holds what loading and saving a model takes.

    Args:
        left_out: sizes of mapped files that do not count; each is mapped as a whole.
    """
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    steps = [event for event in events if event.name().startswith("Optimizer.step#")]
    first, last = steps[0].end_ns(), steps[-1].end_ns()
    held = peak = 0
    for event in events:
        if event.name() == "[memory]" and abs(event.nbytes()) not in left_out:
            held += event.nbytes()
            peak = max(peak, held) if first <= event.start_ns() <= last else peak
    return peak


def run_config(setting: Setting, material: Path, output: Path, kind: str) -> RunConfig:
    return small_models.run_config(
        material,
        output,
        setting.stage,
        setting.projector,
        data={"cache_features": setting.cache_features},
        batch_size=2 * setting.micro_batch_size,
        micro_batch_size=setting.micro_batch_size,
        pack_tokens=setting.pack_tokens,
        precision=setting.precision,
        gradient_checkpointing=setting.gradient_checkpointing,
        epochs=3,
        max_steps=3,
        device=kind,
    )


def write_material(folder: Path) -> None:
    """A tower of 64 patches, a language model of 4 layers, both with random weights, and images to describe."""
    small_models.write_tower(folder / "tower", 64, 3, side=112, inner=128)
    language = LlamaConfig(
        vocab_size=2112,  # room for the image token: on a CPU the weights that a resize replaces stay in memory
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    small_models.write_language_model(folder / "language_model", language, small_models.word_tokenizer(2047))
    small_models.write_records(folder, (20 + number % 3 for number in range(32)))


def grid() -> list[Setting]:
    """Every stage, projector, recomputation and precision, sizes and caching spread over them; packs; some layers."""
    every = itertools.product(("align", "finetune"), small_models.PROJECTORS, (False, True), ("fp32", "bf16"))
    settings = [
        Setting(stage, projector, (2, 4, 8)[number % 3], recompute, precision, cache_features=number % 4 == 1)
        for number, (stage, projector, recompute, precision) in enumerate(every)
    ]
    others = [
        Setting(stage, "mlp2x_gelu", 8, False, precision, False, pack_tokens=512)
        for stage in ("align", "finetune")
        for precision in ("fp32", "bf16")
    ]
    others += [Setting("finetune", "mlp2x_gelu", 8, layers, "fp32", False) for layers in (1, 2, 3)]
    return settings + others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = devices.select(options.device)
    columns = ("stage", "projector", "micro-batch", "recompute", "precision", "features", "predicted", "measured", "")
    print(f"{device.name}, torch {torch.__version__}; MiB\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLAVA_NPU_CACHE"] = f"{folder}/cache"
        for each in compare(grid(), Path(folder), device.kind):
            setting = each.setting
            errors.append(each.error)
            cells = (
                setting.stage,
                setting.projector,
                f"{setting.pack_tokens} tokens" if setting.pack_tokens else str(setting.micro_batch_size),
                {"False": "no", "True": "yes"}.get(layers := str(setting.gradient_checkpointing), layers),
                setting.precision,
                "cached" if setting.cache_features else "computed",
                f"{each.predicted / MIB:.2f}",
                f"{each.measured / MIB:.2f}",
                f"{each.error:+.1%}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)
    mean = sum(map(abs, errors)) / len(errors)
    print(f"\n{len(errors)} runs: mean absolute error {mean:.1%}, from {min(errors):+.1%} to {max(errors):+.1%}.")


if __name__ == "__main__":
    main()
