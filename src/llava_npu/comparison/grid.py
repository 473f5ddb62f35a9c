"""From a comparison's configuration to its trials: one model each, with the runs that train it."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_npu.comparison.results import model_name
from llava_npu.config import ModelConfig, RunConfig, set_key, validate
from llava_npu.config.comparison import ComparisonConfig
from llava_npu.config.schema import FREE_KEYS, OF_A_NEW_MODEL
from llava_npu.errors import UserError
from llava_npu.models.projectors import make_options
from llava_npu.models.sources import model_fingerprint
from llava_npu.training.data import data_fingerprint

TRIALS = "trials"
_SET_BY_GRID = ("output", "stage", "seed", "device")
_NOT_THE_TOWER = ("checkpoint", "language_model", "projector", "projector_options")


@dataclass(frozen=True)
class Trial:
    """One model of the grid.

    Attributes:
        encoder, projector: their names in tables.
        varied: what else distinguishes it: key → value.
        align, finetune: its runs; their device is the worker's.
        folder: of everything that belongs to it.
    """

    encoder: str
    projector: str
    varied: Mapping[str, Any]
    align: RunConfig
    finetune: RunConfig | None
    folder: Path

    @property
    def name(self) -> str:
        return model_name(self.encoder, self.projector, self.varied)

    @property
    def last(self) -> RunConfig:
        """The run whose model is measured."""
        return self.finetune or self.align


def expand(config: ComparisonConfig, where: str) -> list[Trial]:
    """All trials, encoders first, then projectors, then what varies.

    Args:
        config: the comparison.
        where: the file that it comes from, for messages.

    Raises:
        UserError: two entries have one name; an unknown projector type or option; an invalid run.
    """
    variants = list(_variants(config, where))
    fingerprints: dict[str, str] = {}
    trials = []
    for encoder, projector in itertools.product(_encoders(config, where), _projectors(config, where)):
        for varied, variant in variants:
            trials.append(replace(_trial(variant, encoder, projector, where, fingerprints), varied=varied))
    digests = [trial.folder.name.rpartition("-")[2] for trial in trials]
    for trial, digest in zip(trials, digests, strict=True):
        if digests.count(digest) > 1:
            raise UserError(f"{where}: {trial.name} appears twice: two trials of the grid are the same run.")
    return trials


@dataclass(frozen=True)
class _Encoder:
    name: str
    model: dict[str, Any]


@dataclass(frozen=True)
class _Projector:
    name: str
    type: str
    options: dict[str, Any]


def _encoders(config: ComparisonConfig, where: str) -> list[_Encoder]:
    encoders = []
    for number, entry in enumerate(config.encoders):
        place = f"{where}: encoders[{number}]"
        model: dict[str, Any] = {"vision_tower": entry} if isinstance(entry, str) else dict(entry)
        name = model.pop("name", None)
        towers = model.get("vision_tower")
        towers = [towers] if isinstance(towers, str) else towers
        if not isinstance(towers, list) or not towers or not all(isinstance(each, str) for each in towers):
            raise UserError(f"{place}: `vision_tower` is missing: the folder or hub id of the encoder, or of two.")
        if wrong := [key for key in model if key in _NOT_THE_TOWER]:
            allowed = ["name", *(key for key in ModelConfig.model_fields if key not in _NOT_THE_TOWER)]
            raise UserError(f"{place}: `{wrong[0]}` is not a key of an encoder. Valid here: {', '.join(allowed)}.")
        encoders.append(_Encoder(str(name or " + ".join(Path(each).name for each in towers)), model))
    _check_names([encoder.name for encoder in encoders], f"{where}: encoders")
    return encoders


def _projectors(config: ComparisonConfig, where: str) -> list[_Projector]:
    projectors = []
    for number, entry in enumerate(config.projectors):
        place = f"{where}: projectors[{number}]"
        options = {"type": entry} if isinstance(entry, str) else dict(entry)
        name, kind = options.pop("name", None), options.pop("type", None)
        if not isinstance(kind, str):
            raise UserError(f"{place}: `type` is missing; see docs/projectors.md for the types.")
        try:
            make_options(kind, **options)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        shown = ", ".join(f"{key}={_plain(value)}" for key, value in options.items())
        projectors.append(_Projector(str(name or (f"{kind} ({shown})" if shown else kind)), kind, options))
    _check_names([projector.name for projector in projectors], f"{where}: projectors")
    return projectors


def _variants(config: ComparisonConfig, where: str) -> Iterator[tuple[dict[str, Any], ComparisonConfig]]:
    """Every combination of what varies: what tells it from others, and the comparison with these values."""
    names = _short_names(list(config.varied))
    for values in itertools.product(*config.varied.values()):
        chosen = dict(zip(config.varied, values, strict=True))
        changed = copy.deepcopy(config.model_dump(exclude={"seeds"}))
        for key, value in chosen.items():
            set_key(changed, key, value, f"{where}: vary")
        label = {names[key]: _plain(value) for key, value in chosen.items()}
        yield label, validate(ComparisonConfig, changed, f"{where}: vary {label}")


def _trial(
    config: ComparisonConfig,
    encoder: _Encoder,
    projector: _Projector,
    where: str,
    fingerprints: dict[str, str],
) -> Trial:
    model = {
        **encoder.model,
        "language_model": config.language_model,
        "projector": projector.type,
        "projector_options": projector.options,
    }
    align = _run(config, "align", config.align, model, where)
    finetune = None
    if config.finetune is not None:
        finetune = _run(config, "finetune", config.finetune, {"checkpoint": "align"}, where)
    digest = _digest([run for run in (align, finetune) if run], fingerprints)
    folder = _folder(config.output_path / TRIALS, f"{encoder.name} {projector.name}", digest)
    align = align.model_copy(update={"output": str(folder / "align")})
    if finetune is not None:
        start = finetune.model.model_copy(update={"checkpoint": align.output})
        finetune = finetune.model_copy(update={"output": str(folder / "finetune"), "model": start})
    return Trial(encoder.name, projector.name, {}, align, finetune, folder)


def _run(
    config: ComparisonConfig, stage: str, section: Mapping[str, Any], model: Mapping[str, Any], where: str
) -> RunConfig:
    for key in section:
        if key in _SET_BY_GRID:
            raise UserError(f"{where}: `{stage}.{key}` is set by the comparison; remove it.")
    given = section.get("model", {})
    if not isinstance(given, dict):
        raise UserError(f"{where}: `{stage}.model` should hold `key: value` lines.")
    for key in given:
        if key in model or key in _NOT_THE_TOWER:
            raise UserError(f"{where}: `{stage}.model.{key}` is set by the grid; remove it.")
        if stage == "finetune" and key in OF_A_NEW_MODEL:
            raise UserError(
                f"{where}: `finetune.model.{key}`: stage 2 starts from the stage-1 checkpoint; set this on the encoder "
                "entry instead."
            )
    data = section.get("data", {})
    if isinstance(data, dict) and config.share_features and not _trains_tower(section):
        data = {"cache_features": "auto", **data}
    values = {
        **section,
        "stage": stage,
        "output": stage,
        "seed": config.seed,
        "model": {**given, **model},
        "data": data,
    }
    return validate(RunConfig, values, f"{where}: {stage}")


def _trains_tower(section: Mapping[str, Any]) -> bool:
    parts = section.get("parts")
    tower = parts.get("vision_tower") if isinstance(parts, dict) else None
    return isinstance(tower, dict) and tower.get("train", "frozen") != "frozen"


def _digest(runs: list[RunConfig], fingerprints: dict[str, str]) -> str:
    """A trial's identity: everything that its model depends on. A trial that changes is another trial."""
    described = []
    for run in runs:
        # Without defaults: a release that adds a setting must not make every finished trial another one.
        values = run.model_dump(mode="json", exclude_defaults=True)
        for free in FREE_KEYS:
            section, _, key = free.rpartition(".")
            (values.get(section, {}) if section else values).pop(key, None)
        key = json.dumps(values["data"], sort_keys=True)
        if key not in fingerprints:
            fingerprints[key] = data_fingerprint(run.data)
        described.append([values, fingerprints[key], _weights(run.model, fingerprints)])
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:8]


def _weights(model: ModelConfig, fingerprints: dict[str, str]) -> list[str]:
    """Fingerprints of the models in local folders: others in their place make another model."""
    found = []
    for name in (*model.vision_towers, model.language_model):
        if name is not None and Path(name).is_dir():
            if name not in fingerprints:
                fingerprints[name] = model_fingerprint(name)
            found.append(fingerprints[name])
    return found


def _folder(trials: Path, name: str, digest: str) -> Path:
    """The folder of this trial, whatever its name was when it was first run; else a new one."""
    return next(trials.glob(f"*-{digest}"), trials / f"{_slug(name)}-{digest}")


def _check_names(names: list[str], where: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{where}: {twice[0]!r} appears twice; give each a `name` of its own.")


def _short_names(keys: list[str]) -> dict[str, str]:
    """The last part of each key, or more of it where two end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80]
