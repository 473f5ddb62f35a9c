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

import re
import shutil
from pathlib import Path

from llava_npu.errors import UserError, nearest
from llava_npu.files.atomic import write_folder
from llava_npu.files.home import expand_home
from llava_npu.hub.models import HUBS, HubModel

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


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
        if scheme in ("http", "https"):
            raise UserError(
                f"{field}: {source}: is a web address; write organisation/name, or HUB://organisation/name."
            )
        if scheme not in HUBS:
            known = ", ".join(f"{hub}://" for hub in HUBS)
            raise UserError(f"{field}: {source}: unknown hub {scheme!r}.{nearest(scheme, HUBS)} Known: {known}.")
        hub = HUBS[HUBS.index(scheme)]
        name, _, revision = rest.partition("@")
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{field}: {source}: a model on a hub is named {scheme}://organisation/name, of letters, digits, '-', "
                "'_' and '.'."
            )
        return HubModel(hub, name, revision or None)
    name, _, revision = source.partition("@")
    if expand_home(source).exists() or source.startswith((".", "/", "~")) or not _NAME.fullmatch(name):
        return expand_home(source)
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
        raise UserError(f"download: {source} does not name a model on a hub: organisation/name.")
    return fetch(parsed, "download", weights=weights, refresh=True)


def copy_model(folder: Path, target: Path) -> Path:
    """Copies a model's files into a new folder, which is complete or not there; returns it.

    Raises:
        UserError: the folder exists, or cannot be written.
    """
    target = expand_home(target)
    if target.exists():
        raise UserError(f"--to {target}: exists already; name a new folder.")

    def fill(partial: Path) -> None:
        for file in sorted(folder.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                shutil.copyfile(file, partial / file.name)  # what a link in the cache points to

    write_folder(target, fill, advice="Free some space, or give --to another folder")
    return target
