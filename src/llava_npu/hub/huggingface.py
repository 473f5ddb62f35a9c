"""Models of the Hugging Face hub, in that hub's own cache."""

from __future__ import annotations

import difflib
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, httpx
from tqdm.auto import tqdm

from llava_npu.errors import UserError
from llava_npu.hub.folders import missing_file
from llava_npu.hub.models import HubModel, ignored_patterns, unreachable, wanted_patterns


def fetch_from_huggingface(model: HubModel, field: str, *, weights: bool, refresh: bool) -> Path:
    """See `hubs.fetch`. Environment variables are the hub's own: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE."""
    cached, missing = _cached(model, weights)
    if cached is not None and not refresh:
        return cached
    if constants.HF_HUB_OFFLINE:
        raise unreachable(model, field, f"HF_HUB_OFFLINE is set.{_nearest_here(model)}", missing)
    page = f"{constants.ENDPOINT}/{model.name}"
    try:
        # One request that is not repeated: without a network the hub's client retries for 24 seconds.
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        names = HfApi().list_repo_files(model.name, revision=model.revision)
        folder = snapshot_download(
            model.name,
            revision=model.revision,
            allow_patterns=wanted_patterns(names, weights),
            ignore_patterns=ignored_patterns(),
            tqdm_class=tqdm,
        )
    except GatedRepoError as error:
        raise UserError(
            f"{field}: {model} asks for consent to its licence. Give it at {page}, then log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{field}: {model.name} has no revision {model.revision!r}; see {page}/commits.") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{field}: {model.name} is neither a local folder nor a model at {page}, or it is private: check the "
            "name, or log in with `hf auth login`."
        ) from error
    except HFValidationError as error:
        raise UserError(f"{field}: {model} is not a valid model name on {model.title}: {_first_line(error)}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise unreachable(model, field, _first_line(error) + _nearest_here(model), missing) from error
    return Path(folder)


def _cached(model: HubModel, weights: bool) -> tuple[Path | None, str]:
    """The folder in the cache if it is complete, else None and the file that is missing."""
    missing = ""
    for name in ("model.safetensors", "pytorch_model.bin"):  # in the order of preference
        try:
            folder = snapshot_download(
                model.name,
                revision=model.revision,
                allow_patterns=wanted_patterns([name], weights),
                ignore_patterns=ignored_patterns(),
                local_files_only=True,
            )
        except (LocalEntryNotFoundError, ValueError):
            continue
        missing = missing_file(Path(folder)) if weights else ""
        if not missing:
            return Path(folder), ""
    return None, missing


def _nearest_here(model: HubModel) -> str:
    """A hint at a model of the cache whose name is much like this one, as in another case."""
    here = ["/".join(each.name.split("--", 2)[1:]) for each in Path(constants.HF_HUB_CACHE).glob("models--*--*")]
    names = {name.lower(): name for name in here if name != model.name}
    close = difflib.get_close_matches(model.name.lower(), names, n=1, cutoff=0.8)
    return f" Did you mean {names[close[0]]!r}?" if close else ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
