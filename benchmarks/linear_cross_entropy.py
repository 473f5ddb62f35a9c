"""Linear + cross-entropy over supervised positions in chunks, against the plain way, in one run.

    python benchmarks/linear_cross_entropy.py [--device auto] [--tokens 4096] [--hidden 4096] [--vocab 32000]
                                              [--supervised 0.5] [--frozen] [--dtype bfloat16] [--chunk-size 1024]

Both ways do forward and backward from the same hidden states. "Plain" is what transformers does: logits of every
position, then cross-entropy in float32. The two alternate, so that a machine that slows down slows both. Printed are
the peak memory above that of the inputs, the median time, and the ratios, which are what a benchmark can be held to.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llava_npu import devices
from llava_npu.ops.linear_cross_entropy import linear_cross_entropy

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Measurement:
    loss: float
    peak_bytes: int
    seconds: float


def main() -> None:
    options = parse_arguments()
    device = devices.select(options.device)
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    hidden = torch.randn(options.tokens, options.hidden, device=device.torch_device).to(dtype).requires_grad_()
    weight = (torch.randn(options.vocab, options.hidden, device=device.torch_device) * options.hidden**-0.5).to(dtype)
    weight.requires_grad_(not options.frozen)
    labels = torch.randint(options.vocab, (options.tokens,))
    labels[torch.rand(options.tokens) >= options.supervised] = -100
    positions = (labels != -100).nonzero().squeeze(1).to(device.torch_device)
    labels = labels.to(device.torch_device)

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    def chunked(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, labels, positions=positions, chunk_size=options.chunk_size)

    ways: dict[str, Loss] = {"plain": plain, "chunked": chunked}
    rounds = [
        {name: measure(loss, hidden, weight, device) for name, loss in ways.items()} for _ in range(options.rounds + 1)
    ][1:]  # the first warms up
    summary = {
        name: Measurement(
            rounds[0][name].loss,
            max(each[name].peak_bytes for each in rounds),
            statistics.median(each[name].seconds for each in rounds),
        )
        for name in ways
    }

    print(
        f"{device.name}: {options.tokens} tokens, {len(positions)} supervised, hidden {options.hidden}, "
        f"vocabulary {options.vocab}, {options.dtype}, weight {'frozen' if options.frozen else 'trained'}, "
        f"chunks of {options.chunk_size}"
    )
    for name, result in summary.items():
        peak = result.peak_bytes / 2**20
        print(f"{name:>8}: loss {result.loss:.4f}  peak {peak:9.1f} MiB  {result.seconds * 1e3:9.1f} ms")
    ours, theirs = summary["chunked"], summary["plain"]
    print(f"   ratio: memory {ours.peak_bytes / theirs.peak_bytes:.3f}, time {ours.seconds / theirs.seconds:.3f}")


def measure(loss: Loss, hidden: torch.Tensor, weight: torch.Tensor, device: devices.Device) -> Measurement:
    hidden.grad = weight.grad = None
    gc.collect()
    device.synchronize()
    device.reset_peak_memory()
    before = device.memory().peak
    start = time.perf_counter()
    value = loss(hidden, weight)
    value.backward()
    device.synchronize()
    seconds = time.perf_counter() - start
    return Measurement(value.item(), device.memory().peak - before, seconds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--supervised", type=float, default=0.5, help="share of the tokens")
    parser.add_argument("--frozen", action="store_true", help="the output layer is not trained")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
