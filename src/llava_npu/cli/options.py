"""What commands share: options, loading a model, and running in several processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from llava_npu.errors import UserError, nearest

if TYPE_CHECKING:
    from llava_npu.devices import Device
    from llava_npu.models.loaded import LoadedModel

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from llava_npu.distributed.interruption import EXIT_STATUS

MODEL = typer.Option(help="A model folder, a run folder or a hub id.")
HUB = typer.Option("--source", help="Where an organisation/name is: huggingface or modelscope.")
DEVICE = typer.Option(help="auto, npu, cuda, cpu, or as npu:1.")
BITS = typer.Option(help="Bits per weight of the language model: 16, or 8 or 4 where the device can.")
DTYPE = typer.Option(help="float32, bfloat16 or float16; auto: 16 bits where the device gains by it.")
BENCHMARK_MODULE = typer.Option(
    help="A Python file (or module) that registers a benchmark of your own; may be repeated.", metavar="FILE"
)
TEMPLATE = typer.Option(help="Conversation template; by default the one the model was trained with.")
IMAGE_TOKENS = typer.Option(
    min=1, help="Tokens of each image, where the projector gives several numbers (mqt, matryoshka_pool)."
)
MAX_LENGTH = typer.Option(min=2, help="Most tokens of prompt and answer together; by default the model's, up to 4096.")


def load_model(
    source: str, device: str, dtype: str, bits: int, template: str | None = None
) -> tuple[LoadedModel, Device]:
    """The model and its device.

    Args:
        template: None is the one that the model was trained with.

    Raises:
        UserError: no such device or template, too few bits for the device, or a model that cannot be loaded.
    """
    import torch

    from llava_npu import devices
    from llava_npu.data.conversation.templates import get_template
    from llava_npu.models import load
    from llava_npu.models.loading import quantization_config

    if template is not None:
        get_template(template)  # raises UserError for an unknown name
    if bits not in (4, 8, 16):
        raise UserError(f"--bits {bits}: allowed are 4, 8 and 16.")
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in ("auto", *types):
        raise UserError(f"--dtype {dtype}: allowed are auto, {', '.join(types)}.{nearest(dtype, types)}")
    chosen = devices.select(device)
    compute = types.get(dtype) or chosen.autocast_dtype or torch.float32
    quantization = quantization_config(bits, chosen, compute)
    return load(source, chosen.torch_device, compute, quantization, template), chosen


def name_of(model: str) -> str:
    """A model's name for readers: its folder's, or its run's."""
    folder = Path(model)
    if folder.name == "model" and (folder / "config.json").is_file():  # runs/finetune/model
        folder = folder.resolve().parent
    return folder.name or model


def launch_and_exit(arguments: Sequence[str], devices: int, advice: str = "") -> NoReturn:
    """Runs `llava-npu ARGUMENTS` in `devices` processes, shows what went wrong once, and exits as they did.

    Args:
        advice: ends the message of a failure.
    """
    from llava_npu.distributed.launching import launch
    from llava_npu.files.untrusted import printable

    outcome = launch(arguments, devices)
    if outcome.message:
        stopped = outcome.status in (0, EXIT_STATUS)
        shown = outcome.message if stopped or not advice else f"{outcome.message}\n{advice}"
        typer.secho(printable(shown), fg="yellow" if stopped else "red", err=True)
    raise typer.Exit(outcome.status)
