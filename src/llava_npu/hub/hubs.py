"""Where weights come from: a folder, the Hugging Face hub or ModelScope. All of them become a folder.

A source is written as

    path/to/folder                        a folder here
    organisation/name                     the Hugging Face hub (or ModelScope, where a setting says so)
    modelscope://organisation/name        ModelScope
    huggingface://organisation/name       the Hugging Face hub, whatever the setting says

and any but a folder may end in `@revision`: a branch, a tag or, to be sure of the same weights for ever, a commit. What
was fetched once is used from the cache without asking the hub again, so that a run does not change because somebody
pushes; `llava-npu download` asks.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_npu.errors import UserError, nearest
from llava_npu.files.atomic import write_folder

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


def parse_source(source: str, field: str) -> Path | HubModel:
    """A folder, or a model on a hub.

    Args:
        source: see the module's description.
        field: the setting that it comes from, for messages.

    Raises:
        UserError: an unknown scheme, or no "organisation/name".
    """
    scheme, separator, rest = source.partition("://")
    if separator:
        if scheme not in HUBS:
            known = ", ".join(f"{hub}://" for hub in HUBS)
            raise UserError(f"{field}: {source}: unknown hub {scheme!r}.{nearest(scheme, HUBS)} Known: {known}.")
        hub = HUBS[HUBS.index(scheme)]
        name, _, revision = rest.partition("@")
        if name.count("/") != 1 or not all(name.split("/")):
            raise UserError(f"{field}: {source}: a model on a hub is named {scheme}://organisation/name.")
        return HubModel(hub, name, revision or None)
    if Path(source).expanduser().exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        return Path(source).expanduser()
    name, _, revision = source.partition("@")
    return HubModel("huggingface", name, revision or None)


def is_local(source: str) -> bool:
    """Whether `source` names a folder rather than a model on a hub."""
    return isinstance(parse_source(source, "source"), Path)


def on_hub(source: str, hub: str) -> str:
    """`source`, where a bare "organisation/name" is said to be on this hub.

    Raises:
        UserError: no such hub.
    """
    if hub not in HUBS:
        raise UserError(f"source {hub!r} is unknown.{nearest(hub, HUBS)} Known: {', '.join(HUBS)}.")
    if "://" in source or is_local(source):
        return source
    return f"{hub}://{source}"


def local_folder(source: str, field: str, *, weights: bool = True) -> Path:
    """The folder of a source: itself, or where a hub's model is in the cache, fetched if it is not there.

    Args:
        source: see the module's description.
        field: the setting that it comes from, for messages.
        weights: whether its weights are needed too, or (for a tokenizer) the small files will do.

    Raises:
        UserError: it is not in the cache and cannot be fetched; the message has the command that would.
    """
    parsed = parse_source(source, field)
    return parsed if isinstance(parsed, Path) else fetch(parsed, field, weights=weights)


def fetch(model: HubModel, field: str, *, weights: bool = True, refresh: bool = False) -> Path:
    """The folder of a hub's model in the cache.

    Args:
        model: what.
        field: the setting that it comes from, for messages.
        weights: see `local_folder`.
        refresh: ask the hub for changes even if all is there.

    Raises:
        UserError: see `local_folder`.
    """
    if model.hub == "modelscope":
        from llava_npu.hub.modelscope import fetch_from_modelscope

        return fetch_from_modelscope(model, field, weights=weights, refresh=refresh)
    from llava_npu.hub.huggingface import fetch_from_huggingface

    return fetch_from_huggingface(model, field, weights=weights, refresh=refresh)


def download_model(source: str, hub: str = "huggingface", *, weights: bool = True) -> Path:
    """Fetches a hub's model, or what has changed of it there; returns its folder in the cache.

    Raises:
        UserError: see `local_folder`; or it is a folder.
    """
    parsed = parse_source(on_hub(source, hub), "download")
    if isinstance(parsed, Path):
        raise UserError(f"download: {source} is no model on a hub, which is named organisation/name.")
    return fetch(parsed, "download", weights=weights, refresh=True)


def copy_model(folder: Path, target: Path) -> Path:
    """Copies a model's files into a new folder, which is complete or not there; returns it.

    Raises:
        UserError: the folder exists, or cannot be written.
    """
    target = target.expanduser()
    if target.exists():
        raise UserError(f"--to {target}: exists already; name a new folder.")

    def fill(partial: Path) -> None:
        for file in sorted(folder.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                shutil.copyfile(file, partial / file.name)  # what a link in the cache points to

    write_folder(target, fill, advice="Free some space, or give --to another folder")
    return target


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
