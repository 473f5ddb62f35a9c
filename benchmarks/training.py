"""Training steps of this project against the usual way, on the same samples and weights, in one process.

    python benchmarks/training.py                                  # debug size, a minute or two on 2 cores
    python benchmarks/training.py --shape llava-1.5-7b --stage finetune --precision bf16 --batch 128 --micro-batch 16 \\
                                  --pack-tokens 16384 --checkpointing        # one 80 GB GPU or larger
    python benchmarks/training.py --shape llava-1.5-7b --stage align --precision bf16 --batch 256 --micro-batch 32 \\
                                  --pack-tokens 20480

The usual way (`theirs`) is that of official LLaVA and of most suites: `transformers.LlavaForConditionalGeneration`,
micro-batches padded to their longest sample, logits at every position. As official LLaVA's sampler does, texts without
image have micro-batches of their own, and the micro-batches of a step are made equally long in sum. `padded` is this
project without packing: kernels, and logits at supervised positions only. `packed` is this project.

Every way starts from the same weights, does the same steps on the same samples with the same optimizer, and must have
the same losses, or the program fails. Data loading is left out. The ways alternate, so that a machine that slows down
slows all. Printed are the medians over rounds; what can be held against another machine are the ratios.

At debug size the output layer weighs more than in a real model (its vocabulary of 32,000 is real, the layers are few):
the gain there is not that of a model of 7 billion parameters.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from instruction_mix import CAPTIONS, INSTRUCTIONS, draw_samples
from llava_npu import devices
from llava_npu.data.dataset import Sample, collate
from llava_npu.data.packing import PackedLayout, TokenCounts, plan_packs
from llava_npu.data.plan import Plan
from llava_npu.devices import Device
from llava_npu.devices.peaks import published
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.flops import causal_pairs, flop_model
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.ops.fuse import install_kernels
from llava_npu.training.batches import MicroBatch, micro_batch
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.parts import recompute_activations

PAD = 0


@dataclass(frozen=True)
class Result:
    """One way's measured steps: seconds and losses of each, and peak memory above what lay there before."""

    seconds: list[float]
    losses: list[float]
    peak_bytes: int


@dataclass(frozen=True)
class Way:
    """How samples become forward and backward passes.

    Args:
        build: makes the model, on the device, from the common initial weights.
        divide: a step's samples into micro-batches.
        run: forward and backward of all of them; returns the step's loss.
    """

    build: Callable[[], torch.nn.Module]
    divide: Callable[[int], list[list[int]]]
    run: Callable[[torch.nn.Module, list[list[int]]], torch.Tensor]


def main() -> None:
    options = parse_arguments()
    device = devices.select(options.device)
    devices.apply_environment(device, lambda message: print(message, file=sys.stderr))
    config = shape(options.shape)
    samples = draw_samples(
        CAPTIONS if options.stage == "align" else INSTRUCTIONS,
        options.batch * options.steps,
        vocabulary=config.text_config.vocab_size - 64,
        image_token=config.image_token_id,
        image_tokens=config.num_image_tokens,
        image_size=config.tower.image_size,
    )
    layout = pack(samples, options)
    ways = {
        name: way for name, way in all_ways(options, device, config, samples, layout).items() if name in options.ways
    }
    describe(options, device, samples, layout)

    results: dict[str, list[Result]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            results[name].append(measure(way, options, device))
    report(results, options, device, config, samples, layout)
    check_equal_losses(results, options)


def all_ways(
    options: argparse.Namespace,
    device: Device,
    config: LlavaNpuConfig,
    samples: Sequence[Sample],
    layout: PackedLayout,
) -> dict[str, Way]:
    initial = initial_weights(config, options, device)

    def ours(model: torch.nn.Module, parts: list[list[int]], pack_length: int | None) -> torch.Tensor:
        make = partial(micro_batch, pad_token_id=PAD, image_token_id=config.image_token_id)
        batches = [make([samples[index] for index in part], pack_length) for part in parts]
        supervised = sum(batch.supervised_tokens for batch in batches)
        return accumulate(device, options, ((partial(our_loss, model, batch, device), supervised) for batch in batches))

    def theirs(model: torch.nn.Module, parts: list[list[int]]) -> torch.Tensor:
        batches = [collate([samples[index] for index in part], PAD) for part in parts]
        supervised = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
        return accumulate(
            device, options, ((partial(their_loss, model, batch, supervised, device), 1) for batch in batches)
        )

    build = partial(build_model, options=options, device=device, config=config, initial=initial)
    padded = partial(grouped, samples=samples, layout=layout, micro_batch=options.micro_batch)
    return {
        "theirs": Way(partial(build, LlavaForConditionalGeneration), padded, theirs),
        "padded": Way(
            partial(build, LlavaNpuForConditionalGeneration), padded, lambda model, parts: ours(model, parts, None)
        ),
        "packed": Way(
            partial(build, LlavaNpuForConditionalGeneration),
            lambda step: [pack.tolist() for pack in layout.share(step, 0)],
            lambda model, parts: ours(model, parts, layout.pack_length),
        ),
    }


# ---- the ways ----


def our_loss(model: torch.nn.Module, batch: MicroBatch, device: Device) -> torch.Tensor:
    return model(batch.to(device.torch_device), batch.sequence_lengths)


def their_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor], supervised: int, device: Device) -> torch.Tensor:
    inputs = {name: tensor.to(device.torch_device, non_blocking=True) for name, tensor in batch.items()}
    return model(**inputs, num_items_in_batch=supervised, use_cache=False).loss


def accumulate(
    device: Device,
    options: argparse.Namespace,
    losses: Iterator[tuple[Callable[[], torch.Tensor], int]],
) -> torch.Tensor:
    """Backward over micro-batches; the step's loss, a mean over its supervised tokens."""
    total = torch.zeros((), device=device.torch_device)
    for compute, divisor in losses:
        with autocast(options.precision, device):
            loss = compute() / divisor
        loss.backward()
        total += loss.detach()
    return total


def grouped(step: int, samples: Sequence[Sample], layout: PackedLayout, micro_batch: int) -> list[list[int]]:
    """Micro-batches as official LLaVA's sampler makes them (`get_modality_length_grouped_indices`).

    Texts alone are apart; then, the longest first, each sample goes to the shortest micro-batch that has room.
    """
    parts = []
    chosen = sorted(layout.alike.step(step).tolist(), key=lambda index: -len(samples[index].input_ids))
    for kind in (True, False):
        members = [index for index in chosen if (samples[index].pixel_values is None) == kind]
        number = -(-len(members) // micro_batch)
        chunks: list[list[int]] = [[] for _ in range(number)]
        for index in members:
            open_chunks = [chunk for chunk in chunks if len(chunk) < micro_batch]
            min(open_chunks, key=lambda chunk: sum(len(samples[i].input_ids) for i in chunk)).append(index)
        parts += chunks
    return parts


def pack(samples: Sequence[Sample], options: argparse.Namespace) -> PackedLayout:
    counts = TokenCounts(
        np.array([len(sample.input_ids) for sample in samples]),
        np.array([0 if sample.pixel_values is None else len(sample.pixel_values) for sample in samples]),
    )
    return plan_packs(Plan(len(samples), options.batch), counts, options.pack_tokens, num_processes=1)


# ---- the models ----


def shape(name: str) -> LlavaNpuConfig:
    if name == "tiny":  # for the test of this program
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,  # 16 tokens
        )
        text = LlamaConfig(
            vocab_size=32064, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
    elif name == "debug":
        vision = CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=112,
            patch_size=14,  # 64 tokens
        )
        text = LlamaConfig(
            vocab_size=32064,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            max_position_embeddings=4096,
        )
    else:
        vision = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        )
        text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096)  # the defaults are those of Llama 7B
    return LlavaNpuConfig(vision_config=vision, text_config=text, image_token_index=32000, vision_feature_layer=-2)


def new_model(
    kind: type[torch.nn.Module], config: object, options: argparse.Namespace, device: Device
) -> torch.nn.Module:
    """Made where it will live: a model of 7 billion parameters takes minutes to draw on a CPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if options.precision == "bf16" else torch.float32)
    try:
        with device.torch_device:
            return kind(config)
    finally:
        torch.set_default_dtype(torch.float32)


def initial_weights(config: LlavaNpuConfig, options: argparse.Namespace, device: Device) -> dict[str, torch.Tensor]:
    model = new_model(LlavaNpuForConditionalGeneration, config, options, device)
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def build_model(
    kind: type[torch.nn.Module],
    *,
    options: argparse.Namespace,
    device: Device,
    config: LlavaNpuConfig,
    initial: dict[str, torch.Tensor],
) -> torch.nn.Module:
    """A model with the common weights, in which what the stage trains learns."""
    ours = kind is LlavaNpuForConditionalGeneration
    model = new_model(kind, config if ours else LlavaConfig.from_dict(config.to_dict()), options, device)
    model.load_state_dict(initial)
    for name, parameter in model.named_parameters():
        learns = "vision_tower" not in name and (options.stage == "finetune" or "multi_modal_projector" in name)
        parameter.requires_grad_(learns)
        if options.precision == "mixed" and not learns:
            parameter.data = parameter.data.bfloat16()
    model.train()
    model.model.vision_tower.eval()
    if options.checkpointing:
        recompute_activations(model.model.language_model)
    if not ours:
        model.set_attn_implementation("sdpa")
        return model
    install_kernels(model, device.torch_device)
    return SupervisedLoss(model)


def autocast(precision: str, device: Device) -> AbstractContextManager[object]:
    if precision != "mixed":
        return nullcontext()
    return torch.autocast(device.torch_device.type, dtype=torch.bfloat16)


# ---- measuring ----


def measure(way: Way, options: argparse.Namespace, device: Device) -> Result:
    """All steps, the first of which runs once before, to warm up."""
    gc.collect()
    device.empty_cache()
    model = way.build()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True) if options.optimizer == "adamw" else None
    way.run(model, way.divide(0))
    model.zero_grad(set_to_none=True)
    device.synchronize()
    device.reset_peak_memory()
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds, losses = [], []
    for step in range(options.steps):
        started = clock()
        loss = way.run(model, way.divide(step))
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(clock() - started)
    return Result(seconds, losses, device.memory().peak)


def check_equal_losses(results: dict[str, list[Result]], options: argparse.Namespace) -> None:
    tolerance = 2e-4 if options.precision == "fp32" else 3e-2
    reference = next(iter(results.values()))[0].losses
    for name, rounds in results.items():
        for result in rounds:
            difference = max(abs(a - b) for a, b in zip(result.losses, reference, strict=True))
            if not difference <= tolerance:
                sys.exit(f"FAILED: losses of {name} differ by {difference:.2g}: {result.losses} against {reference}")
    print(f"all losses equal within {tolerance:g}: {', '.join(f'{loss:.4f}' for loss in reference)}")


def describe(options: argparse.Namespace, device: Device, samples: Sequence[Sample], layout: PackedLayout) -> None:
    tokens = [len(sample.input_ids) for sample in samples]
    learned = sum(int((sample.labels >= 0).sum()) for sample in samples)
    parts = [part for step in range(options.steps) for part in grouped(step, samples, layout, options.micro_batch)]
    padded = sum(len(part) * max(tokens[index] for index in part) for part in parts)
    print(
        f"{device.name}: {options.shape}, {options.stage}, {options.precision}, {options.steps} steps of "
        f"{options.batch} samples, {statistics.mean(tokens):.0f} tokens on average ({min(tokens)} to {max(tokens)}), "
        f"{learned / sum(tokens):.0%} supervised, checkpointing {'on' if options.checkpointing else 'off'}\n"
        f"padded: micro-batches of {options.micro_batch}, {sum(tokens) / padded:.0%} of their tokens real; packed: "
        f"{layout.packs_per_process} × {layout.pack_length} tokens, {layout.fill():.0%} real"
    )


def report(
    results: dict[str, list[Result]],
    options: argparse.Namespace,
    device: Device,
    config: LlavaNpuConfig,
    samples: Sequence[Sample],
    layout: PackedLayout,
) -> None:
    tokens = sum(len(sample.input_ids) for sample in samples) / options.steps
    tflop = useful_flops(options, config, samples) / options.steps / 1e12
    dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16
    peak = None if options.cpu_time or device.simulated else device.peak_tflops(dtype)
    rows = {
        name: (
            statistics.median(second for result in rounds for second in result.seconds),
            max(result.peak_bytes for result in rounds),
        )
        for name, rounds in results.items()
    }
    print(f"{'':>8}  s/step   tokens/s  samples/s  TFLOP/s   MFU  peak GiB")
    for name, (seconds, memory) in rows.items():
        mfu = "–" if peak is None else f"{tflop / seconds / peak:.0%}"
        print(
            f"{name:>8}  {seconds:6.2f}  {tokens / seconds:9.0f}  {options.batch / seconds:9.2f}  "
            f"{tflop / seconds:7.3f}  {mfu:>4}  {memory / 2**30:8.2f}"
        )
    if peak is not None:
        print(f"MFU is against {peak:.4g} TFLOP/s, {'published' if published(device.name) else 'measured'}")
    if options.cpu_time:
        print("seconds are CPU seconds of this process")
    if {"theirs", "packed"} <= rows.keys():
        ratios = (
            f"{name} {rows['theirs'][0] / seconds:.2f}×" for name, (seconds, _) in rows.items() if name != "theirs"
        )
        memory_ratio = rows["packed"][1] / rows["theirs"][1]
        print(f"speed against theirs: {', '.join(ratios)}; peak memory of packed: {memory_ratio:.2f}×")


def useful_flops(options: argparse.Namespace, config: LlavaNpuConfig, samples: Sequence[Sample]) -> int:
    """What the samples cost without any padding or superfluous logits, whichever way computes them."""
    with torch.device("meta"):
        model = LlavaNpuForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        learns = "vision_tower" not in name and (options.stage == "finetune" or "multi_modal_projector" in name)
        parameter.requires_grad_(learns)
    lengths = [len(sample.input_ids) for sample in samples]
    images = sum(0 if sample.pixel_values is None else len(sample.pixel_values) for sample in samples)
    supervised = sum(int((sample.labels >= 0).sum()) for sample in samples)
    return flop_model(model).count(sum(lengths), causal_pairs(lengths), supervised, images).total


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shape", default="debug", choices=["tiny", "debug", "llava-1.5-7b"])
    parser.add_argument("--stage", default="finetune", choices=["align", "finetune"])
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=["fp32", "bf16", "mixed"],
        help="bf16: all weights; mixed: as `llava-npu train`, what learns in float32 under autocast",
    )
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "none"])
    parser.add_argument("--batch", type=int, default=32, help="samples per step")
    parser.add_argument("--micro-batch", type=int, default=16, help="samples at once, where they are padded")
    parser.add_argument("--pack-tokens", type=int, default=1536)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count this process's CPU seconds, on a CPU that others use too (with OMP_NUM_THREADS=1)",
    )
    parser.add_argument(
        "--ways", nargs="+", default=["theirs", "padded", "packed"], choices=["theirs", "padded", "packed"]
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
