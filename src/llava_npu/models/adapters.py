"""Low-rank adapters (LoRA and its kin) on exactly named layers, through peft: added, saved, loaded, merged.

Sources: Hu et al. 2021, "LoRA" (arXiv:2106.09685); Liu et al. 2024, "DoRA" (arXiv:2402.09353); Kalajdzievski 2023,
"rsLoRA" (arXiv:2312.03732).

A folder with adapters holds everything that was trained, in peft's own layout: `adapter_config.json` and
`adapter_model.safetensors`, with the modules that were trained in full (the projector) among its `modules_to_save`.
Next to them are the processor's files and `base.json`, which says which model they belong to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava_npu.errors import UserError, nearest
from llava_npu.files.json_objects import read_json
from llava_npu.hub.folders import check_files, open_part
from llava_npu.models.checkpoints.weight_files import check_finite
from llava_npu.models.sources import ModelSource, write_source

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"

# Settings of peft that change nothing about what saved weights compute, or that both readers respect.
_HEEDED = frozenset(
    (
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "megatron_core", "runtime_config", "eva_config"),
        *("qalora_group_size", "init_lora_weights", "bias", "ensure_weight_tying"),
    )
)
# Initialisations that leave the base's weights as they are; others (PiSSA, OLoRA, …) take the adapter out of them.
_KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
_NAME = "default"  # peft's name of an adapter, where there is one only
_PREFIX = "base_model.model."  # peft's, before every name in its files


@dataclass(frozen=True)
class AdapterSettings:
    """What every adapter of a model has in common.

    Attributes:
        rank, alpha: an adapter is the product of two matrices of `rank` columns and rows, times alpha ÷ rank.
        dropout: on an adapter's input, in training.
        use_dora: learn each row's length apart from its direction.
        use_rslora: divide alpha by √rank instead of rank.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False


def is_adapter_folder(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def linear_layers(model: nn.Module, prefix: str, without: Collection[str] = ()) -> list[str]:
    """Exact paths of the linear layers below `prefix`, but for those whose weight is named in `without`."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix) and f"{name}.weight" not in without
    ]


def choose_layers(layers: Sequence[str], targets: Sequence[str] | None) -> list[str]:
    """Those of `layers` whose last name is one of `targets`; all of them for None.

    Raises:
        UserError: a target names no layer, or no layer is left.
    """
    names = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
    if not layers:
        raise UserError("lora: the parts with `train: lora` have no linear layers; train them in `full` or not at all.")
    for target in targets or ():
        if target not in names:
            raise UserError(
                f"lora.targets: {target!r} names no linear layer.{nearest(target, names)} There are: "
                f"{', '.join(names)}."
            )
    return [layer for layer in layers if targets is None or layer.rsplit(".", 1)[-1] in targets]


def add_adapters(model: nn.Module, layers: Sequence[str], settings: AdapterSettings) -> None:
    """Adds a new adapter to each of the named layers, in place; their names in the model stay what they were.

    An adapter starts as zero: the model computes what it did before. All else is frozen. Adapters are float32,
    whatever the layers are.
    """
    config = _peft_config(layers, settings)
    # One expression for the whole names: peft shortens long lists to suffixes.
    config.target_modules = "|".join(map(re.escape, layers))
    with _float32_stand_ins(model, layers):
        _peft().inject_adapter_in_model(config, model, adapter_name=_NAME)
    if settings.use_dora:
        for layer in layers:
            module: Any = model.get_submodule(layer)
            # The length of each row: what peft takes it from is a stand-in, and adapters start as zero.
            lengths = torch.linalg.norm(module.get_base_layer().weight.detach().float(), dim=1)
            module.lora_magnitude_vector[_NAME].weight.data = lengths


@contextmanager
def _float32_stand_ins(model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """Puts something that says it is float32, and takes no memory, in place of weights of fewer bits.

    peft rounds an adapter to the type of the layer next to it. A copy of every layer in float32 is what a model that
    is mapped from its files must not need.
    """
    weights = [model.get_parameter(f"{layer}.weight") for layer in layers]
    before = [weight.data for weight in weights]
    for weight in weights:
        weight.data = torch.zeros((), device=weight.device).expand(weight.shape)
    try:
        yield
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data


def check_kind(settings: Mapping[str, Any], place: str, heeded: Collection[str] = ()) -> None:
    """Raises `UserError` for an adapter that computes something else than α/r · B·A on its layers, by the setting.

    Args:
        settings: an adapter_config.json; `place` says where it stands.
        heeded: further settings that the reader heeds.
    """
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{place}: peft_type is {kind!r}; only 'LORA' is known.")
    strange = [key for key, value in settings.items() if value and key not in _HEEDED and key not in heeded]
    if settings.get("init_lora_weights", True) not in _KEEPS_BASE:
        strange.append("init_lora_weights")
    if settings.get("bias", "none") != "none":
        strange.append("bias")
    if strange:
        raise UserError(
            f"{place}: {strange[0]} is {settings[strange[0]]!r:.100}, which is not known here: the merged model would "
            "compute something else. Merge the adapter with peft (`merge_and_unload`) and use the result."
        )
    _check_numbers(settings, place)


def _check_numbers(settings: Mapping[str, Any], place: str) -> None:
    """Raises `UserError` for a rank or another number that no adapter has, the layers' own in patterns included."""

    def check(key: str, value: Any, allowed: str, fits: Callable[[Any], bool]) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
            raise UserError(
                f"{place}: {key} is {value!r:.100}; it takes {allowed}. Use the file saved with the adapter."
            )

    for key in ("use_rslora", "use_dora"):
        if not isinstance(settings.get(key) or False, bool):
            raise UserError(f"{place}: {key} is {settings[key]!r:.100}; it takes true or false.")
    rank = "a whole number above 0", lambda value: isinstance(value, int) and value > 0
    alpha = "a finite number", math.isfinite
    check("r", settings.get("r"), *rank)
    check("lora_alpha", settings.get("lora_alpha"), *alpha)
    check("lora_dropout", settings.get("lora_dropout") or 0, "a number from 0 to 1", lambda value: 0 <= value <= 1)
    for key, kind in (("rank_pattern", rank), ("alpha_pattern", alpha)):
        patterns = settings.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise UserError(f"{place}: {key} is {patterns!r:.100}; it takes layers' names, each with a number.")
        for pattern, value in patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{place}: {key}: {pattern!r:.100} is not a regular expression: {error}.") from None
            check(f"{key}.{pattern}", value, *kind)


def is_adapter_parameter(name: str) -> bool:
    return ".lora_" in name


def save_adapters(
    folder: Path, trained: Mapping[str, torch.Tensor], settings: AdapterSettings, source: ModelSource
) -> None:
    """Writes adapters, and the weights that were trained in full, with a note of what they belong to.

    Args:
        trained: everything that was trained, by its name in the model.
    """
    layers = sorted({name.split(".lora_")[0] for name in trained if is_adapter_parameter(name)})
    in_full = sorted({_module_of(name) for name in trained if not is_adapter_parameter(name)})
    config = _peft_config(layers, settings)
    config.modules_to_save = in_full or None
    config.base_model_name_or_path = source.absolute().checkpoint
    config.inference_mode = True
    config.save_pretrained(str(folder))
    weights = {_file_name(name): tensor.detach().cpu().contiguous() for name, tensor in trained.items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_source(folder / BASE, source)


def load_adapters(folder: Path, model: nn.Module) -> None:
    """Puts a folder's adapters, and the weights that were trained in full, into the model they belong to, unmerged.

    Raises:
        UserError: a file cannot be read, or does not fit the model; nothing is loaded half.
    """
    check_files(folder, "model")
    config = open_part(lambda: _peft().LoraConfig.from_pretrained(str(folder)), "model (adapters)", str(folder))
    saved = open_part(lambda: load_file(folder / ADAPTER_WEIGHTS), "model (adapters)", str(folder))
    check_finite(saved.items(), str(folder / ADAPTER_WEIGHTS))
    if whole := [name for name, tensor in saved.items() if not tensor.is_floating_point()]:
        raise UserError(
            f"model: {folder / ADAPTER_WEIGHTS}: {whole[0]} is {saved[whole[0]].dtype}, not floating-point."
        )
    targets = config.target_modules
    if not targets or isinstance(targets, str) or not all(isinstance(each, str) for each in targets):
        raise UserError(
            f"model: {folder / ADAPTER_CONFIG}: `target_modules` is {targets!r:.100}; it takes a list of "
            "the layers that have adapters, as this program writes it."
        )
    check_kind(read_json(folder / ADAPTER_CONFIG), str(folder / ADAPTER_CONFIG), ("use_dora", "modules_to_save"))
    layers = sorted(targets)
    missing = sorted(set(layers) - {name for name, _ in model.named_modules()})
    if missing:
        raise UserError(f"model: {folder} has adapters for layers that its base has not: {', '.join(missing[:6])}.")
    settings = AdapterSettings(config.r, config.lora_alpha, config.lora_dropout, config.use_dora, config.use_rslora)
    add_adapters(model, layers, settings)
    here = model.state_dict(keep_vars=True)
    names = {_file_name(name): name for name in here}
    wanted = {_file_name(name) for name in here if is_adapter_parameter(name)}
    problems = [f"{key} is missing" for key in sorted(wanted - saved.keys())]
    problems += [f"{key} is not part of the model" for key in sorted(saved.keys() - names.keys())]
    problems += [
        f"{key} has shape {tuple(tensor.shape)}, the model {tuple(here[names[key]].shape)}"
        for key, tensor in saved.items()
        if key in names and tensor.shape != here[names[key]].shape
    ]
    if problems:
        raise UserError(f"model: the adapters in {folder} do not fit their base:\n  " + "\n  ".join(problems[:6]))
    with torch.no_grad():
        for key, tensor in saved.items():
            target = here[names[key]]
            if is_adapter_parameter(names[key]):  # small updates vanish in 16 bits
                target.data = target.data.float()
            target.copy_(tensor)


def merge_adapters(model: nn.Module) -> None:
    """Merges every adapter into its layer, in place, and removes it: a plain model remains."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    del model.peft_config


def _peft_config(layers: Sequence[str], settings: AdapterSettings) -> Any:
    return _peft().LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        bias="none",
        target_modules=list(layers),
    )


def _module_of(parameter: str) -> str:
    """The part that a weight belongs to, as peft's `modules_to_save` name it."""
    names = parameter.split(".")
    return ".".join(names[:2]) if names[0] == "model" else names[0]


def _file_name(name: str) -> str:
    """A weight's name in peft's files: without the adapter's own name."""
    name = name.replace(f".lora_magnitude_vector.{_NAME}.weight", ".lora_magnitude_vector")
    return _PREFIX + re.sub(rf"\.(lora_\w+)\.{_NAME}\.", r".\1.", name)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("adapters need peft: pip install 'llava-npu[train]'") from error
    return peft
