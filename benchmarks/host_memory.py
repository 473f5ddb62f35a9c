"""Host memory of loading a model in 1, 2 and 4 processes, and the time to their first step.

    python benchmarks/host_memory.py                                  # every engine; aligned, adapted and finetuned
    python benchmarks/host_memory.py --engines fsdp2 --processes 4 --stages finetune --curve curve.csv
    python benchmarks/host_memory.py --source OTHER/src               # the same runs by another version

A model of random weights (0.96 GB language model in bfloat16, 0.1 GB tower in float32) is trained for one step by
`llava-npu train --devices N` on the CPU, over gloo. Meanwhile the proportional set size (`Pss` of
/proc/PID/smaps_rollup: pages that processes share count once in all) of the launcher and of all processes below it is
summed, every 50 ms.

`planned` is what `llava-npu plan` says of a node's memory, for the whole run.

"Loaded" is when every process holds its part of the model and is about to begin its first step. With `--no-step` a run
ends there: a CPU without bfloat16 instructions needs minutes for the step.

On a CPU the devices' memory is the host's: the weights that the engine keeps on its devices are part of what is
measured. A host of accelerators holds that much less.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

import small_models
from llava_npu import devices
from llava_npu.config import RunConfig
from llava_npu.config.yaml_reader import write_yaml
from llava_npu.debug_size.assets import make_assets
from llava_npu.planning.check import predict
from llava_npu.planning.target import this_machine
from llava_npu.training.resolve import ResolvedRun

MB = 10**6
PERIOD = 0.05
LOADED, STEPPED = "MFU is against", "metrics.jsonl"


@dataclass(frozen=True)
class Measured:
    """One run: bytes, and seconds from the launch on; of the step, None where none was made."""

    loading: int
    loaded_after: float
    step: int | None
    step_after: float | None
    curve: tuple[tuple[float, int], ...]


def measure(
    config: RunConfig, processes: int, folder: Path, *, step: bool = True, source: Path | None = None
) -> Measured:
    """Trains one step in so many processes, or only gets ready for it, and watches their memory.

    Args:
        source: where another version of the package is.

    Raises:
        RuntimeError: the run failed.
    """
    path, output = folder / "run.yaml", folder / "output.txt"
    # Without defaults: another version may not know all keys.
    path.write_text(write_yaml(config.model_dump(mode="json", exclude_defaults=True)))
    command = [sys.executable, "-m", "llava_npu", "train", str(path), "--fresh", "--devices", str(processes)]
    command.append("--ignore-plan")  # what only loads need not fit as a whole
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LLAVA_NPU_CACHE": str(folder.parent / "cache")}
    if source is not None:
        environment["PYTHONPATH"] = str(source)
    curve: list[tuple[float, int]] = []
    loaded: tuple[float, int] | None = None
    stepped = False
    with output.open("w") as log:
        start = time.monotonic()
        run = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while run.poll() is None and not stepped and (step or loaded is None):
                curve.append((time.monotonic() - start, sum(map(_pss, _family(run.pid)))))
                if loaded is None and LOADED in output.read_text():
                    loaded = (curve[-1][0], max(pss for _, pss in curve))
                stepped = _lines(config.output_path / STEPPED) > 0
                time.sleep(PERIOD)
        finally:
            run.kill()  # and with it all below it: what follows is saving, not loading
            run.wait()
    if loaded is None or (step and not stepped):
        raise RuntimeError(output.read_text())
    after, peak = loaded
    if not step:
        return Measured(peak, after, None, None, tuple(curve))
    return Measured(peak, after, max(pss for _, pss in curve), curve[-1][0], tuple(curve))


def planned(config: RunConfig, processes: int) -> int:
    """What a plan says of this machine's memory."""
    target = this_machine(devices.select("cpu"), processes, 1, config.precision, for_time=False)
    return predict(ResolvedRun(config), target).host.total


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


def _family(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    try:
        children = [Path(task, "children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return
    for each in children:
        for child in each:
            yield from _family(int(child))


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


# ---- material ----


def write_models(folder: Path, hidden: int, layers: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """A language model in `dtype`, a tower in float32, with random weights, and data."""
    torch.manual_seed(0)
    small_models.write_tower(folder / "tower", 512, 8, side=56, heads=8)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=27 * hidden // 10 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
    )
    small_models.write_language_model(folder / "language_model", config, small_models.word_tokenizer(), dtype)
    make_assets(folder / "data")


def run_config(
    engine: str, stage: str, processes: int, folder: Path, material: Path, precision: str = "bf16"
) -> RunConfig:
    lora = {"parts": {"language_model": {"train": "lora"}}} if stage == "lora" else {}
    return small_models.run_config(
        material,
        folder / "run",
        "align" if stage == "align" else "finetune",
        data={"path": f"data/{'captions' if stage == 'align' else 'conversations'}.json"},
        engine=engine,
        batch_size=processes,
        micro_batch_size=1,
        max_steps=1,
        device="cpu",
        precision=precision,
        **lora,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["ddp", "fsdp2", "zero3"])
    parser.add_argument("--stages", nargs="+", default=["align", "lora", "finetune"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=1280)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"], help="what is computed in")
    parser.add_argument("--stored", default="bfloat16", choices=["bfloat16", "float32"], help="of the language model")
    parser.add_argument("--no-step", action="store_true", help="end each run once it is loaded")
    parser.add_argument("--source", type=Path, help="measure another version, that of this folder; it is not planned")
    parser.add_argument("--folder", type=Path, help="where models and runs go and stay; by default a temporary folder")
    parser.add_argument("--curve", type=Path, help="write every sample here: engine, stage, processes, seconds, bytes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        material = folder / f"material-{options.hidden}-{options.layers}-{options.vocabulary}-{options.stored}"
        if not material.is_dir():
            write_models(material, options.hidden, options.layers, options.vocabulary, getattr(torch, options.stored))
        stored = sum(file.stat().st_size for file in material.rglob("*.safetensors"))
        print(f"weights as stored: {stored / MB:,.0f} MB\n")
        print(
            "| engine | stage | processes | peak while loading, MB | loaded after, s | peak to the first step, MB | "
            "planned, MB | first step after, s |"
        )
        print("|---|---|---|---|---|---|---|---|", flush=True)
        rows = []
        for stage in options.stages:
            for engine in options.engines:
                for processes in options.processes:
                    run = folder / f"{stage}-{engine}-{processes}"
                    shutil.rmtree(run, ignore_errors=True)  # an earlier run's metrics would pass for this one's step
                    run.mkdir()
                    config = run_config(engine, stage, processes, run, material, options.precision)
                    measured = measure(config, processes, run, step=not options.no_step, source=options.source)
                    stepped = "" if measured.step is None else f"{measured.step / MB:,.0f}"
                    after = "" if measured.step_after is None else f"{measured.step_after:.1f}"
                    plan = "" if options.source else f"{planned(config, processes) / MB:,.0f}"
                    print(
                        f"| {engine} | {stage} | {processes} | {measured.loading / MB:,.0f} | "
                        f"{measured.loaded_after:.1f} | {stepped} | {plan} | {after} |",
                        flush=True,
                    )
                    rows += [(engine, stage, processes, f"{at:.2f}", pss) for at, pss in measured.curve]
        if options.curve:
            with options.curve.open("w", newline="") as file:
                csv.writer(file).writerows([("engine", "stage", "processes", "seconds", "bytes"), *rows])


if __name__ == "__main__":
    main()
