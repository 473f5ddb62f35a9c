"""A model on a hub: its name, which of its files are needed, and the error when it cannot be fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llava_npu.errors import UserError

Hub = Literal["huggingface", "modelscope"]
HUBS: tuple[Hub, ...] = ("huggingface", "modelscope")
_TITLES = {"huggingface": "the Hugging Face hub", "modelscope": "ModelScope"}


@dataclass(frozen=True)
class HubModel:
    """A model on a hub."""

    hub: Hub
    name: str
    revision: str | None = None

    @property
    def title(self) -> str:
        """The hub's name in a sentence."""
        return _TITLES[self.hub]

    @property
    def command(self) -> str:
        """What to type to fetch it."""
        return f"llava-npu download {self}"

    def __str__(self) -> str:
        scheme = "" if self.hub == "huggingface" else f"{self.hub}://"
        return f"{scheme}{self.name}{f'@{self.revision}' if self.revision else ''}"


def unreachable(model: HubModel, field: str, reason: str, missing: str = "") -> UserError:
    """The error for a model that is not here and cannot be fetched.

    Args:
        model, field: see `fetch`.
        reason: why the hub does not answer.
        missing: the file that is not here; by default the whole model.
    """
    what = f"{missing} of {model}" if missing else str(model)
    nor = " (nor is it a folder here)" if model.hub == "huggingface" and not missing else ""
    return UserError(
        f"{field}: {what} is not in the cache{nor}, and {model.title} cannot be asked: {reason}\n"
        f"Where there is a network, run\n"
        f"    {model.command}\n"
        f"Then copy the cache here, or run it with `--to FOLDER`, copy that folder and name it in place of {model}."
    )


# ---- which files of a repository are a model ----

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_SAFETENSORS = ("*.safetensors",)
_PICKLES = ("*.bin",)
_NO_WEIGHTS = ("training_args.bin", "optimizer*", "scheduler*", "rng_state*")


def wanted_patterns(names: list[str], weights: bool) -> list[str]:
    """Patterns for the files to fetch, given all of a repository: safetensors, or pickles only where there are none."""
    if not weights:
        return list(SMALL_FILES)
    safe = any(name.endswith(".safetensors") and "/" not in name for name in names)
    return [*SMALL_FILES, *(_SAFETENSORS if safe else _PICKLES)]


def ignored_patterns() -> list[str]:
    """Patterns for what is never fetched: other folders (onnx/, tf/), and what training left."""
    return ["*/*", *_NO_WEIGHTS]
