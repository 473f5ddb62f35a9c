"""Models of ModelScope (modelscope.cn), over its HTTP interface; the `modelscope` package is not needed.

A model is in the cache when its folder is there: files are fetched next to it, resumed where an earlier attempt broke
off, checked against the hub's SHA-256, and the folder gets its name when all are.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import get_session, hf_raise_for_status, httpx
from tqdm.auto import tqdm

from llava_npu.errors import UserError
from llava_npu.files.atomic import write_folder
from llava_npu.files.cache import cache_root, locked_in_cache
from llava_npu.files.json_objects import read_json
from llava_npu.hub.folders import missing_file
from llava_npu.hub.models import HubModel, ignored_patterns, unreachable, wanted_patterns

_DEFAULT_REVISION = "master"
_RECORD = ".modelscope.json"  # the files of a fetched model and their checksums


def fetch_from_modelscope(model: HubModel, field: str, *, weights: bool, refresh: bool) -> Path:
    """See `hubs.fetch`.

    MODELSCOPE_DOMAIN names another site, MODELSCOPE_API_TOKEN gives access to private models, and HF_HUB_OFFLINE keeps
    off the network here too.
    """
    kind = "" if weights else "-without-weights"
    revision = model.revision or _DEFAULT_REVISION
    folder = cache_root() / "modelscope" / model.name.replace("/", "--") / f"{quote(revision, safe='')}{kind}"
    whole = folder.with_name(folder.name.removesuffix(kind))
    if not refresh:
        for found in (folder, whole):
            if found.is_dir():
                return found
    if constants.HF_HUB_OFFLINE:
        raise unreachable(model, field, "HF_HUB_OFFLINE is set.")
    with locked_in_cache(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir() and not refresh:  # another process fetched it meanwhile
            return folder
        try:
            files = _list_files(model, revision, field, weights)
            if not folder.is_dir() or _recorded(folder) != files:
                write_folder(folder, lambda partial: _fetch_all(model, revision, files, partial, field), resume=True)
        except UserError:
            raise
        except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError, ValueError) as error:
            raise unreachable(model, field, _first_line(error)) from error
    return folder


def _list_files(model: HubModel, revision: str, field: str, weights: bool) -> dict[str, dict[str, Any]]:
    """The files to fetch: name → size in bytes and SHA-256."""
    url = f"{_endpoint()}/api/v1/models/{model.name}/repo/files?Revision={quote(revision, safe='')}&Recursive=True"
    response = get_session().get(url, headers=_headers(), timeout=30)
    if response.status_code in (401, 403, 404):
        at = f" at revision {model.revision!r}" if model.revision else ""
        raise UserError(
            f"{field}: {model.name}{at} is not a model at {_endpoint()}, or it is private: check name and revision, "
            "or set MODELSCOPE_API_TOKEN."
        )
    hf_raise_for_status(response)
    listed = (response.json().get("Data") or {}).get("Files") or []
    entries = {entry["Path"]: entry for entry in listed if entry.get("Type") != "tree"}
    wanted, ignored = wanted_patterns(list(entries), weights), ignored_patterns()
    files = {
        name: {"size": int(entry["Size"]), "sha256": entry.get("Sha256") or ""}
        for name, entry in sorted(entries.items())
        if _matches(name, wanted) and not _matches(name, ignored)
    }
    if "config.json" not in files:
        raise UserError(f"{field}: {model} holds no config.json; it is not a model that transformers can load.")
    return files


def _fetch_all(model: HubModel, revision: str, files: dict[str, dict[str, Any]], unfinished: Path, field: str) -> None:
    needed = sum(entry["size"] for entry in files.values()) - sum(each.stat().st_size for each in unfinished.iterdir())
    free = shutil.disk_usage(unfinished).free
    if needed > free:
        raise UserError(
            f"{field}: {model} needs {needed / 1e9:.1f} GB, but {unfinished.parent} has {free / 1e9:.1f} GB left. Free "
            "some space, or point LLAVA_NPU_CACHE to another disk."
        )
    for name, entry in files.items():
        _fetch_file(model, revision, name, entry, unfinished)
    (unfinished / _RECORD).write_text(json.dumps(files, indent=1))
    missing = missing_file(unfinished) if any(name.endswith((".safetensors", ".bin")) for name in files) else ""
    if missing:
        raise UserError(f"{field}: {model} on {model.title} lacks {missing}; it is not a complete model.")


def _fetch_file(model: HubModel, revision: str, name: str, entry: dict[str, Any], folder: Path) -> None:
    target = folder / name
    if target.is_file() and target.stat().st_size == entry["size"]:
        return
    partial = folder / f"{name}.part"
    url = f"{_endpoint()}/api/v1/models/{model.name}/repo?Revision={quote(revision, safe='')}&FilePath={quote(name)}"
    with partial.open("ab") as file:
        http_get(
            url,
            file,
            resume_size=file.tell(),
            headers=_headers(),
            expected_size=entry["size"],
            displayed_filename=name,
            tqdm_class=tqdm,
        )
        file.flush()
        os.fsync(file.fileno())
    if entry["sha256"] and _sha256(partial) != entry["sha256"]:
        partial.unlink()
        raise UserError(f"{model}: {name} arrived damaged (its SHA-256 is not the hub's). Run it again.")
    partial.replace(target)


def _endpoint() -> str:
    domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    return (domain if "://" in domain else f"https://{domain}").rstrip("/")


def _headers() -> dict[str, str]:
    token = os.environ.get("MODELSCOPE_API_TOKEN")
    return {"User-Agent": "llava-npu", **({"Cookie": f"m_session_id={token}"} if token else {})}


def _recorded(folder: Path) -> dict[str, dict[str, Any]]:
    record = folder / _RECORD
    return read_json(record, advice="Delete its folder, and fetch the model again") if record.is_file() else {}


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
