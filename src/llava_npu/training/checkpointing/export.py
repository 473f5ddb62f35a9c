"""The model that a run starts from, and the one that it leaves, in Hugging Face or peft layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llava_npu.config import RunConfig, validate
from llava_npu.data.conversation.templates import get_template
from llava_npu.errors import UserError
from llava_npu.files import atomic
from llava_npu.hub.hubs import on_hub
from llava_npu.models.adapters import save_adapters
from llava_npu.models.checkpoints.weight_files import is_finite, write_weights
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.loading import open_source
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.processing import LlavaNpuProcessor
from llava_npu.models.sources import ModelSource
from llava_npu.training.checkpointing.checkpoints import verify
from llava_npu.training.checkpointing.state import SavedState, weight_key
from llava_npu.training.parts import adapter_settings
from llava_npu.training.run_folder import RUN_FILE, read_run_file


def model_source(config: RunConfig) -> ModelSource:
    """Where the weights come from that a run starts with."""
    choice = config.model
    if choice.checkpoint is not None:
        images = {
            "image_aspect_ratio": choice.image_aspect_ratio,
            "image_grid_pinpoints": choice.image_grid_pinpoints,
            "seed": config.seed,
        }
        return ModelSource(
            checkpoint=on_hub(choice.checkpoint, choice.source),
            changes={} if choice.image_aspect_ratio is None else images,
            explicit=choice.explicit_keys,
        )
    assert choice.language_model is not None
    towers = [on_hub(tower, choice.source) for tower in choice.vision_towers]
    return ModelSource(
        parts={
            "vision_tower": towers if len(towers) > 1 else towers[0],
            "language_model": on_hub(choice.language_model, choice.source),
            "projector_type": choice.projector,
            "projector_options": choice.projector_options,
            "vision_feature_layer": choice.vision_feature_layer,
            "keep_prefix_tokens": choice.vision_select_feature == "cls_patch",
            "image_aspect_ratio": choice.image_aspect_ratio or "pad",
            "image_grid_pinpoints": choice.image_grid_pinpoints,
            "image_size": choice.image_size,
            "tower_fusion": choice.tower_fusion,
            "scales": choice.scales,
            "seed": config.seed,
        }
    )


def build_model(config: RunConfig, dtype: torch.dtype = torch.float32, *, mapped: bool = False) -> LoadedModel:
    """The model that a run starts from, on the CPU; `mapped`: its weights as stored, in their files."""
    return open_source(model_source(config), dtype, mapped=mapped)


def with_trained_template(loaded: LoadedModel, config: RunConfig) -> LoadedModel:
    """The model with the conversation template of its training, in which users will be answered.

    A template of captions alone has no place for a question; the model then keeps its own.
    """
    template = config.data.template
    asks = template is not None and not get_template(template).captions
    return loaded.with_template(template if asks else None)


@dataclass(frozen=True)
class Export:
    """The model that a run leaves, written a weight at a time: no more than a file of them is held.

    Attributes:
        config: the run.
        processor: of the model, with the template of the training.
        model: what was trained.
        frozen: its weights by name that were not trained, as they came, where in the model they may be in shards or
            rounded to 16 bits by now.
    """

    config: RunConfig
    processor: LlavaNpuProcessor
    model: LlavaNpuForConditionalGeneration
    frozen: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def write(self, folder: Path, trained: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Writes the model in Hugging Face layout or, of a run with adapters, these in peft's.

        Args:
            trained: (name in the model, whole weight) of everything that was trained, in any order.

        Raises:
            UserError: one of them is not finite, as the last step may leave it.
        """
        config, model = self.config, self.model
        trained = self._finite(trained)
        if config.has_adapters:  # with the projector, and the name of the model that the run started from
            save_adapters(folder, dict(trained), adapter_settings(config.lora), model_source(config))
        else:
            write_weights(folder, self._named(trained))
            model.config.dtype = torch.float32
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def _finite(self, trained: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in trained:
            if tensor.numel() and not is_finite(tensor):
                raise UserError(
                    f"{self.config.output}: training diverged: {name} holds NaN or infinite numbers, so no model is "
                    "written. Train again in a new folder, with a lower optimizer.learning_rate."
                )
            yield name, tensor

    def _named(self, trained: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight by its name on the hub: first those that were trained, then the frozen ones."""
        weights = {**self.model.state_dict(), **self.frozen}
        # Names alone: what is put there has no numbers, and is told apart by what it is.
        hollow = {name: torch.empty(tensor.shape, device="meta") for name, tensor in weights.items()}
        own_names = {id(tensor): name for name, tensor in hollow.items()}
        hub_names = {own_names[id(tensor)]: name for name, tensor in self.model.hub_weights(hollow).items()}
        for name, tensor in trained:
            if name in hub_names:
                yield hub_names.pop(name), tensor
        for name, hub_name in hub_names.items():
            frozen = weights[name].detach().cpu()
            yield hub_name, frozen.float() if frozen.is_floating_point() else frozen


def export_checkpoint(checkpoint: Path, output: Path) -> None:
    """Writes the model of a checkpoint as a run that had finished there would have.

    Raises:
        UserError: the checkpoint is damaged, its base model is not where it was, or `output` is there already.
    """
    if output.exists():
        raise UserError(f"checkpoint export: {output} is there already; name a new folder.")
    if problem := verify(checkpoint):
        raise UserError(f"{checkpoint}: {problem}.")
    saved = SavedState(checkpoint)
    config = validate(RunConfig, read_run_file(checkpoint)["config"], str(checkpoint / RUN_FILE))
    model, processor = with_trained_template(build_model(config, mapped=True), config)
    trained = [name.removeprefix(weight_key("")) for name in saved.shapes if name.startswith(weight_key(""))]
    if not config.has_adapters:
        wanted = set(trained)
        saved.check({name: each.shape for name, each in model.named_parameters() if name in wanted})
    export = Export(config, processor, model)
    atomic.write_folder(output, lambda folder: export.write(folder, saved.wholes(trained, weight_key)))
