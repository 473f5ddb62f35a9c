"""A language model is tried on a tiny copy of its architecture before anything large is loaded or trained.

Language models of the Llama family look alike from outside and are not: a layer may drop what it is handed, a head may
do more than multiply. What this project assumes of all of them is computed here in two ways, on random weights in a few
layers of a few channels (`tiny_json`), so that a model that would be silently wrong is refused in a sentence. It takes
a fraction of a second for each architecture and process.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CLIPVisionConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from llava_npu.errors import UserError
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.language_models import config_from_json, tiny_json
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.ops.attention.transformers_interface import use_packed_attention

_SAMPLES = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [30], [33, 34, 35, 36, 37, 38, 39]]  # some leave a window
_TOLERANCE = 1e-3  # relative, in float32; what is wrong is wrong by much more


@dataclass(frozen=True)
class Findings:
    """What is wrong with an architecture, each in a clause; None: nothing is.

    Attributes:
        model: why it cannot be used at all.
        packing: why samples cannot be packed.
        cache: why its keys and values cannot be kept from token to token.
    """

    model: str | None = None
    packing: str | None = None
    cache: str | None = None


def check_language_model(text_config: PreTrainedConfig, field: str) -> None:
    """Raises `UserError` where a language model would compute something else here than in its own class.

    Args:
        field: what the user named it in, for the message.
    """
    if reason := examine(text_config).model:
        raise UserError(
            f"{field}: language models of type {text_config.model_type!r} are not supported: {reason}. docs/parts.md "
            "has a table of those that are."
        )


def check_packing(text_config: PreTrainedConfig) -> None:
    """Raises `UserError` where packed samples would not be computed as they are one by one."""
    if reason := examine(text_config).packing:
        raise UserError(
            f"pack_tokens: samples cannot be packed for a language model of type {text_config.model_type!r}: {reason}. "
            "Take pack_tokens out; samples are then padded, `micro_batch_size` of them at a time."
        )


def check_splitting(text_config: PreTrainedConfig, parts: int) -> None:
    """Raises `UserError` where several devices cannot work on a part of each sequence each (sequence parallel)."""
    key, kind = "sequence_parallel_size", text_config.model_type
    if reason := examine(text_config).packing:  # both need attention to be told what the sequences are
        raise UserError(
            f"{key}: sequences of a language model of type {kind!r} cannot be split: {reason}. Set it to 1."
        )
    heads = text_config.num_attention_heads
    if heads % parts:
        allowed = ", ".join(str(each) for each in range(1, heads + 1) if heads % each == 0)
        raise UserError(f"{key}: {parts} does not divide the language model's {heads} attention heads; use {allowed}.")
    rope = (getattr(text_config, "rope_parameters", None) or {}).get("rope_type")
    if rope in ("dynamic", "longrope"):
        raise UserError(
            f"{key}: rotary embedding of type {rope!r} depends on the longest position of a batch, of which each "
            "device would see another. Set it to 1."
        )


def examine(text_config: PreTrainedConfig) -> Findings:
    """Tries an architecture out; what was found is kept for this process."""
    try:
        tiny = tiny_json(text_config)
    except KeyError as error:
        return Findings(f"it is not of the Llama family (its configuration has no {error.args[0]!r})")
    except (TypeError, ValueError) as error:
        return Findings(f"no tiny copy of it can be made to try it out ({type(error).__name__}: {error})")
    return _examine(tiny)


@functools.cache
def _examine(tiny: str) -> Findings:
    with _alone():
        try:
            reference, model = _build(tiny)
        except UserError as error:
            return Findings(str(error))
        except Exception as error:  # noqa: BLE001  whatever a model's own code raises
            return Findings(f"its tiny copy cannot be built ({type(error).__name__}: {error})")
        if reason := _try(lambda: _as_in_its_class(model, reference)):
            return Findings(reason)
        return Findings(
            packing=_try(lambda: _packed(model, reference)),
            cache=_try(lambda: _cached(model)),
            model=_try(lambda: _saved(model)),
        )


@contextmanager
def _alone() -> Iterator[None]:
    """On the CPU in float32, whatever is set outside; nobody's random numbers move, and no progress is shown."""
    dtype, shows_progress = torch.get_default_dtype(), logging.is_progress_bar_enabled()
    torch.set_default_dtype(torch.float32)
    logging.disable_progress_bar()
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(dtype)
        if shows_progress:
            logging.enable_progress_bar()


def _build(tiny: str) -> tuple[PreTrainedModel, LlavaNpuForConditionalGeneration]:
    """A tiny language model in its own class, and the same weights as ours."""
    reference = AutoModelForCausalLM.from_config(config_from_json(tiny), attn_implementation="eager").eval()
    if not (hasattr(reference, "model") and hasattr(reference, "lm_head")):
        raise UserError(f"{type(reference).__name__} is not of the Llama family (no `model` and `lm_head`)")
    with torch.no_grad():
        for parameter in reference.parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text_config = config_from_json(tiny)
    model = LlavaNpuForConditionalGeneration(
        LlavaNpuConfig(
            vision_config=CLIPVisionConfig(**size, image_size=4, patch_size=2),
            text_config=text_config,
            image_token_index=text_config.vocab_size - 1,
            vision_feature_layer=-1,
            projector_type="linear",
            tie_word_embeddings=text_config.tie_word_embeddings,
        )
    ).eval()
    model.model.language_model.load_state_dict(reference.model.state_dict())
    model.lm_head.load_state_dict(reference.lm_head.state_dict())
    use_packed_attention(model)
    return reference, model


def _as_in_its_class(model: LlavaNpuForConditionalGeneration, reference: PreTrainedModel) -> str | None:
    """Padded as in training."""
    longest = max(map(len, _SAMPLES))
    ids = torch.tensor([sample + [0] * (longest - len(sample)) for sample in _SAMPLES])
    mask = torch.tensor([[1] * len(sample) + [0] * (longest - len(sample)) for sample in _SAMPLES])
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        theirs = torch.cat(_one_by_one(reference))
    return _difference([ours], [theirs], f"its logits here are not those of {type(reference).__name__}")


def _packed(model: LlavaNpuForConditionalGeneration, reference: PreTrainedModel) -> str | None:
    """Logits, and gradients of a random mixture of them."""
    ids = torch.tensor([[token for sample in _SAMPLES for token in sample]])
    positions = torch.tensor([[place for sample in _SAMPLES for place in range(len(sample))]])
    lengths = [len(sample) for sample in _SAMPLES]
    ours = model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=torch.ones_like(ids),
        sequence_lengths=lengths,
        use_cache=False,
    ).logits[0]
    theirs = torch.cat(_one_by_one(reference))
    if reason := _difference([ours.detach()], [theirs.detach()], "the samples of a pack influence each other"):
        return reason
    direction = torch.randn_like(theirs)
    for logits in (ours, theirs):
        (logits * direction).sum().backward()
    pairs = zip(model.model.language_model.parameters(), reference.model.parameters(), strict=True)
    gradients = [(mine.grad, other.grad) for mine, other in pairs if mine.grad is not None and other.grad is not None]
    return _difference(
        [mine for mine, _ in gradients],
        [other for _, other in gradients],
        "gradients of a pack are not those of its samples",
    )


def _cached(model: LlavaNpuForConditionalGeneration) -> str | None:
    """The text in three pieces, the last of one token."""
    ids = torch.tensor(_SAMPLES[:1])
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache, pieces = None, []
        for start, end in ((0, 5), (5, 8), (8, 9)):
            out = model(
                input_ids=ids[:, start:end],
                attention_mask=torch.ones_like(ids[:, :end]),
                position_ids=torch.arange(start, end)[None],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            pieces.append(out.logits)
    return _difference(
        [torch.cat(pieces, dim=1)], [whole], "kept keys and values give other logits than the whole text"
    )


def _saved(model: LlavaNpuForConditionalGeneration) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        # Not by `save_pretrained`, which writes in the first process alone.
        weights = model.hub_weights(model.state_dict())
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()},
            Path(folder) / SAFE_WEIGHTS_NAME,
            metadata={"format": "pt"},
        )
        model.config.save_pretrained(folder)
        again, info = LlavaNpuForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    if wrong := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        return f"it cannot be loaded again: weights {', '.join(wrong[:6])} are missing or left over"
    ids = torch.tensor(_SAMPLES[:1])
    with torch.no_grad():
        ours, theirs = (each(input_ids=ids, use_cache=False).logits for each in (again.eval(), model))
    return _difference([ours], [theirs], "it gives other logits once it is saved and loaded")


def _one_by_one(reference: PreTrainedModel) -> list[torch.Tensor]:
    """(length, vocabulary) of each sample."""
    return [reference(input_ids=torch.tensor([sample]), use_cache=False).logits[0] for sample in _SAMPLES]


def _difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], what: str) -> str | None:
    """`what` with the relative difference, if that is more than rounding; NaN is."""
    error = sum((mine - other).square().sum() for mine, other in zip(ours, theirs, strict=True)) ** 0.5
    norm = sum(other.square().sum() for other in theirs) ** 0.5
    relative = float(error / norm)
    if not torch.cat([other.flatten() for other in theirs]).isfinite().all():
        return (
            "in its own class it gives NaN or infinite numbers; see its rope settings and rms_norm_eps in config.json"
        )
    return None if relative < _TOLERANCE else f"{what} (relative difference {relative:.2g} on a tiny copy)"


def _try(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except Exception as error:  # noqa: BLE001  whatever a model's own code raises
        return f"{type(error).__name__}: {error}"
