"""What a checkpoint costs: how long training stands still for it, and how many bytes each process writes.

    python benchmarks/checkpoints.py                      # 2 and 4 processes on the CPU, 1.2 GB of state; a few minutes
    python benchmarks/checkpoints.py --processes 8 --device cuda --layers 32 --hidden 4096      # one node

Each number of processes shards a model of random weights (`engine: fsdp2`), makes one step of the optimizer, so that
its moments are there, and saves several times, as a run does. Printed are medians over saves of the slowest process:

    stall        seconds until training continues, with the checkpoint complete
    stall async  the same with `async_checkpoints: true`: until the state is copied to the host's memory
    complete     seconds until that checkpoint is complete

It can be run with an earlier version of the package (`PYTHONPATH=OLD/src`), as its methods have the same names: up to
9ebd3a9 one process gathered and wrote everything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import CLIPVisionConfig, LlamaConfig

from llava_npu import devices
from llava_npu.config import RunConfig
from llava_npu.devices import Device
from llava_npu.distributed import processes
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.training.checkpointing.checkpoints import checkpoint_path
from llava_npu.training.checkpointing.saving import Saver
from llava_npu.training.engines import Engine, open_engine
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.optimizer import build_optimizer


def main() -> None:
    options = parse_arguments()
    if "RANK" in os.environ:
        measure(options)
        return
    print("processes  state (MB)  stall (s)  stall async (s)  complete (s)  MB per process")
    for number in options.processes:
        launcher = [sys.executable, "-m", "llava_npu.distributed.launching", str(number)]
        subprocess.run([*launcher, __file__, *sys.argv[1:]], check=True)


def measure(options: argparse.Namespace) -> None:
    """One process of a launch: saves, and on the main process prints a row."""
    device = devices.select(options.device)
    with processes.join(device, needs_group=True) as accelerator:
        engine = prepare(options, accelerator)
        folder = [tempfile.mkdtemp(dir=options.folder)] if accelerator.is_main_process else []
        root = Path(gather_object(folder)[0])
        (root / "run.yaml").write_text("{}")  # which a checkpoint holds a copy of
        stalls, _ = save(root, engine, device, options.saves, in_background=False)
        hidden, complete = save(root, engine, device, options.saves, in_background=True)
        written = gather_object([bytes_of(newest(root), accelerator.process_index)])
        if accelerator.is_main_process:
            each = " ".join(f"{size / 1e6:.0f}" for size in written)
            print(
                f"{accelerator.num_processes:9}  {sum(written) / 1e6:10.0f}  {stalls:9.2f}  {hidden:15.2f}"
                f"  {complete:12.2f}  {each}",
                flush=True,
            )
            subprocess.run(["rm", "-rf", str(root)], check=True)
        accelerator.wait_for_everyone()


def prepare(options: argparse.Namespace, accelerator: Accelerator) -> Engine:
    """A sharded model whose optimizer has moved once, by random gradients."""
    settings = {"output": "unused", "stage": "finetune", "model": {"checkpoint": "unused"}, "data": {"path": "unused"}}
    config = RunConfig.model_validate({**settings, "engine": "fsdp2"})
    heads = options.hidden // 64
    torch.manual_seed(0)
    model = LlavaNpuForConditionalGeneration(
        LlavaNpuConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            ),
            text_config=LlamaConfig(
                hidden_size=options.hidden,
                intermediate_size=options.hidden * 11 // 4,
                num_hidden_layers=options.layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                vocab_size=options.vocabulary,
            ),
        )
    )
    model.model.vision_tower.requires_grad_(False)
    engine = open_engine(config, accelerator, None)
    engine.prepare(SupervisedLoss(model), lambda: build_optimizer(model, config.optimizer, config.resolved_parts))
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 1e-3)
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    return engine


def save(root: Path, engine: Engine, device: Device, saves: int, *, in_background: bool) -> tuple[float, float]:
    """Medians of seconds in which training stands still, and until a checkpoint is complete."""
    saver = Saver(root, engine, device, keep=1, in_background=in_background)
    stalls, complete = [], []
    for number in range(1, saves + 1):
        device.synchronize()
        engine.accelerator.wait_for_everyone()
        started = time.perf_counter()
        saver.save(number, {"samples_per_step": 1, "seed": 0, "engine": "fsdp2"})
        engine.accelerator.wait_for_everyone()  # the next step needs all
        stalls.append(time.perf_counter() - started)
        saver.finish()
        engine.accelerator.wait_for_everyone()
        complete.append(time.perf_counter() - started)
    return statistics.median(stalls), statistics.median(complete)


def newest(root: Path) -> Path:
    return max(root.glob(f"{checkpoint_path(root, 1).name[:-6]}*"))


def bytes_of(checkpoint: Path, process: int) -> int:
    """What a process wrote of a checkpoint, by the names of its files."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    own = {name: each["bytes"] for name, each in manifest.items() if name.startswith(f"state/__{process}_")}
    rest = {name: each["bytes"] for name, each in manifest.items() if not name.startswith("state/__")}
    return sum(own.values()) + (sum(rest.values()) if process == 0 else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=768, help="width of the language model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", help="where to write; by default the system's folder for temporary files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
