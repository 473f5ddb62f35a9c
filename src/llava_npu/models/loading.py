"""Loading a trained model with its processor from one folder.

Where memory is short, the language model's weights are rounded to 4 or 8 bits while loading, by bitsandbytes (NF4 with
double quantisation, Dettmers et al. 2023, arXiv:2305.14314; LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339). Tower,
projector and head stay as they are: they are small, and images suffer first.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from llava_npu.devices.base import Device
from llava_npu.errors import UserError
from llava_npu.files.atomic import write_folder
from llava_npu.files.cache import build_once, cache_root, digest_of
from llava_npu.hub.folders import check_loaded, check_model_folder, open_part
from llava_npu.hub.hubs import local_folder
from llava_npu.models.adapters import BASE, is_adapter_folder, load_adapters, merge_adapters
from llava_npu.models.agreement import check_agreement
from llava_npu.models.checkpoints.convert import as_hugging_face
from llava_npu.models.checkpoints.mapped import load_mapped
from llava_npu.models.checkpoints.weight_files import check_finite
from llava_npu.models.composing import change_aspect_ratio, compose
from llava_npu.models.loaded import LoadedModel, check_capacity, load_processor, open_config
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.proof import check_language_model
from llava_npu.models.sources import MODEL_FOLDER, ModelSource, model_fingerprint, read_source
from llava_npu.ops.fuse import install_kernels


def load(
    source: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    quantization: Any = None,
    template: str | None = None,
    *,
    mapped: bool = False,
) -> LoadedModel:
    """Loads a model, ready for inference, and its processor.

    Args:
        source: a model folder (ours, plain Hugging Face LLaVA, or one with adapters, which are merged into the base
            that it names), a run folder, or a model on a hub (`hubs.py`).
        device: where to put it, with the operations that this device has; None leaves it as transformers loads it.
        dtype: of the weights; None keeps what the file has.
        quantization: what `quantization_config` gives, to load the language model's
            weights in fewer bits.
        template: name of the conversation template; None is the one that the model was trained with.
        mapped: in place of a `dtype`: every weight stays in its file, in the type that it has there (`mapped.py`).

    Raises:
        UserError: a file is missing or damaged, weights do not fit the configuration, or the tokenizer has no image
            token.
    """
    source = resolve(str(source), template)
    if mapped and is_adapter_folder(Path(source)):
        source = _merged_once(Path(source))
    if is_adapter_folder(Path(source)):
        if quantization is not None:
            raise UserError(
                f"model: {source} has adapters, which are merged into its base: weights in fewer bits are made while "
                f"loading a plain model. Make one: llava-npu merge {source} FOLDER"
            )
        model = load_with_adapters(Path(source), dtype)
        merge_adapters(model)
    else:
        model = _load_whole(source, device, dtype, quantization, mapped)
    processor = load_processor(source, model.config)
    model.eval()
    if device is not None:
        if quantization is None:
            model.to(device)
        install_kernels(model, torch.device(device))
    return LoadedModel(model, processor).with_template(template)


def load_with_adapters(folder: Path, dtype: torch.dtype | None = None) -> LlavaNpuForConditionalGeneration:
    """The base that a folder with adapters names, with these adapters attached to its layers, not merged."""
    model = open_source(read_source(folder / BASE), dtype).model
    load_adapters(folder, model)
    return model


def merge(source: str, output: Path) -> None:
    """Writes the model of a folder with adapters as one that needs no other, in the number type of its base checkpoint.

    Raises:
        UserError: `source` has no adapters or cannot be loaded, or `output` is there already.
    """
    folder = resolve(source)
    if not is_adapter_folder(Path(folder)):
        raise UserError(f"merge: {folder} has no adapters; it is a plain model already, or none.")
    if output.exists():
        raise UserError(f"merge: {output} is there already; name a new folder.")
    loaded = load(folder)
    write_folder(output, loaded.save_pretrained)


def open_source(source: ModelSource, dtype: torch.dtype | None = None, *, mapped: bool = False) -> LoadedModel:
    """Loads or composes what `source` describes, on the CPU.

    Args:
        dtype: of all weights; None keeps a checkpoint's.
        mapped: in place of a `dtype`: pretrained weights stay in their files, in the types that they have there, and
            new ones are float32.
    """
    if source.checkpoint is not None:
        loaded = load(source.checkpoint, dtype=dtype, mapped=mapped)
        check_agreement(source.explicit, source.checkpoint, loaded.model.config)
        return change_aspect_ratio(loaded, **source.changes) if source.changes else loaded
    return compose(**source.parts, dtype=dtype or torch.float32, mapped=mapped)


def _merged_once(folder: Path) -> str:
    """A folder in the user's cache with adapters merged into their base, in float32: processes share what is in files.

    One process of the host merges, the others wait for it.
    """
    read_source(folder / BASE)  # is the base what it was?
    copy = cache_root() / "merged" / digest_of(model_fingerprint(folder))
    if not copy.is_dir():
        _report(f"{folder} has adapters; a copy with them merged into their base is made once, in {copy}")
        build_once(copy, lambda target: load(folder, dtype=torch.float32).save_pretrained(target))
    return str(copy)


def _report(message: str) -> None:
    print(message, file=sys.stderr)


def _load_whole(
    source: str, device: torch.device | str | None, dtype: torch.dtype | None, quantization: Any | None, mapped: bool
) -> LlavaNpuForConditionalGeneration:
    check_model_folder(Path(source), "model")
    config = open_config(Path(source), "model")
    check_capacity(config, LlavaNpuForConditionalGeneration, Path(source), "model")
    # Quantised weights are made where they stay: they cannot be moved afterwards.
    placed = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": device or "cpu"}}
    check_language_model(config.text_config, "model")
    model, info = open_part(
        lambda: (
            load_mapped(LlavaNpuForConditionalGeneration, Path(source), config)
            if mapped
            else LlavaNpuForConditionalGeneration.from_pretrained(
                source,
                config=config,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **placed,
            )
        ),
        "model",
        source,
    )
    check_loaded(info, "model", source)
    check_finite(model.named_parameters(), f"model: {source}", shared=True)
    ends = model.generation_config.eos_token_id
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends or 0])):
        raise UserError(
            f"model: {source}/generation_config.json: `eos_token_id` is {ends!r:.60}; it takes one token id, or a list."
        )
    return model


def resolve(source: str, template: str | None = None) -> str:
    """The model folder that `source` means: a model folder, a run folder, or a model on a hub.

    `template` is the conversation template of a folder of official LLaVA's, which does not say.
    """
    folder = local_folder(source, "model")
    if not folder.exists():
        raise UserError(f"model: {source} does not exist. Give a model folder, a run folder or a hub id.")
    inner = folder / MODEL_FOLDER
    folder = inner if _is_model_folder(inner) and not _is_model_folder(folder) else folder
    return str(as_hugging_face(folder, _report, template))


def _is_model_folder(folder: Path) -> bool:
    return (folder / "config.json").is_file() or is_adapter_folder(folder)


_KEPT_WHOLE = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def quantization_config(bits: int, device: Device, compute_dtype: torch.dtype) -> Any:
    """What `load` needs to hold weights in this many bits; None for 16.

    Raises:
        UserError: this kind of device cannot, or bitsandbytes is missing.
    """
    if bits == 16:
        return None
    if bits not in device.quantized_bits:
        can = ", ".join(str(each) for each in (*device.quantized_bits, 16))
        hint = f" {device.quantization_hint}" if device.quantization_hint else ""
        raise UserError(f"weights in {bits} bits on {device.kind}: not offered. This device can: {can}.{hint}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"weights in {bits} bits need bitsandbytes: pip install 'llava-npu[quantize]'.")
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_KEPT_WHOLE)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=_KEPT_WHOLE,
    )
