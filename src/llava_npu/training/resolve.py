"""What is found out about a run before it starts, once, and given to its plan and to its training."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_npu import devices
from llava_npu.config import RunConfig
from llava_npu.devices import Device
from llava_npu.errors import UserError
from llava_npu.hub.hubs import local_folder
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.proof import check_packing, check_splitting
from llava_npu.models.sources import ModelSource, model_fingerprint
from llava_npu.training.architecture import find_tokenizer, model_config
from llava_npu.training.checkpointing.export import model_source
from llava_npu.training.data import RunData, check_images, data_fingerprint, open_run_data, sources
from llava_npu.training.engines import check_engine


@dataclass(frozen=True)
class ResolvedRun:
    """A run's configuration and what follows from it on this machine.

    Each fact is found when it is first asked for, and then kept: a plan asks for no device and no weights, a run that
    is finished for no model. What is wrong with it is raised there, as `UserError`.

    Attributes:
        config: the run as it was written.
        recipes: a folder of run configurations. A checkpoint that does not exist yet is taken to be what the run there
            will make that writes it, so a second stage can be planned before the first has run; None when training.
    """

    config: RunConfig
    recipes: Path | None = None

    def __post_init__(self) -> None:
        check_engine(self.config)

    @cached_property
    def device(self) -> Device:
        """The device that `device` chooses here."""
        return devices.select(self.config.device)

    @cached_property
    def source(self) -> ModelSource:
        """Where the weights come from that the run starts with."""
        return model_source(self.config)

    @cached_property
    def tokenizer(self) -> Any | None:
        """The tokenizer as published, without this project's tokens; None where it is not on this machine."""
        return find_tokenizer(self.config)

    @cached_property
    def model(self) -> LlavaNpuConfig:
        """The configuration of the model that is trained; its weights are not needed for it."""
        return self._model_and_remarks[0]

    @property
    def remarks(self) -> list[str]:
        """Where `model` was found, if not where the configuration says."""
        return self._model_and_remarks[1]

    def check_model(self) -> None:
        """Raises `UserError` where the model cannot be found, is not what the configuration says of it, or cannot be
        trained on packs or parts of sequences though the run asks for them.
        """
        text_config, parts = self.model.text_config, self.config.sequence_parallel_size
        if self.config.pack_tokens is not None:
            check_packing(text_config)
        if parts > 1:
            check_splitting(text_config, parts)
        _ = self.model

    @property
    def has_data(self) -> bool:
        """Whether the data is on this machine."""
        return all(Path(source.path).exists() or "*" in str(source.path) for source in sources(self.config.data))

    @cached_property
    def data(self) -> RunData:
        """The records to train and to validate on."""
        return open_run_data(self.config.data)

    def check_images(self) -> None:
        """Raises `UserError` where an image to train or to validate on does not exist."""
        check_images(self.data, self.config.data.bad_samples)

    @cached_property
    def model_fingerprints(self) -> dict[str, str]:
        """Of the content of each model that the run starts from, by its key, without those that are gone by now."""
        found = {}
        for key, name in self.source.locations.items():
            with suppress(UserError):  # a finished run's base may be gone, and its hub out of reach
                if (folder := local_folder(name, f"model.{key}")).is_dir():
                    found[key] = model_fingerprint(folder)
        return found

    @cached_property
    def data_fingerprint(self) -> str:
        """Of the content of all data."""
        return data_fingerprint(self.config.data)

    @cached_property
    def _model_and_remarks(self) -> tuple[LlavaNpuConfig, list[str]]:
        return model_config(self.config, self.tokenizer, self.recipes)
