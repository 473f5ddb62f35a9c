"""The model: transformers' LLaVA with any tower and any projector.

Data flow: pixels → tower → features (images, tokens, channels) → projector → visual tokens, spliced into the text at
the image tokens → language model. Features can also be given directly (`vision_features`): a frozen tower's output
need be computed once only.

With anyres an image is several tiles, each of which passes tower and projector like an image of its own; `image_sizes`
says how the tiles' tokens are laid out. Wherever below an axis counts images, it then counts the tiles of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModel, LlavaForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel, LlavaPreTrainedModel

from llava_npu.errors import UserError
from llava_npu.models.checkpoints.weight_names import LM_HEAD, hub_name
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.language_models import LanguageModelHead
from llava_npu.models.projectors import Projector
from llava_npu.models.vision.anyres import Size, Tiling
from llava_npu.models.vision.multiscale import multiscale_features
from llava_npu.models.vision.towers import select_features
from llava_npu.ops.attention.transformers_interface import known_lengths

# Weights are named in files as those of transformers' LLaVA are, so that either loads the other's.
register_checkpoint_conversion_mapping(
    LlavaNpuConfig.model_type, get_checkpoint_conversion_mapping("llava_next"), overwrite=True
)
# Releases before 5.23 look the inner model's mapping up by its own class name alone.
register_checkpoint_conversion_mapping("LlavaNpuModel", get_checkpoint_conversion_mapping("LlavaModel"), overwrite=True)

ImageSizes = torch.Tensor | Sequence[Size]  # (images, 2), each image's (height, width)


class LlavaNpuPreTrainedModel(LlavaPreTrainedModel):
    """Initialises a projector as its source says, after its parts got transformers' generic rule.

    Loading needs this too: a projector's fixed tables are not in the file, and are recomputed here.
    """

    config: LlavaNpuConfig

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Of models outside its own package transformers leaves out modules that hold no tensors themselves, since their
        # initialisation may ignore its marks of loaded weights. A projector's heeds them.
        super()._initialize_weights(module, is_custom_code and not isinstance(module, Projector))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Projector):
            module.init_weights()
            return
        super()._init_weights(module)
        if isinstance(module, LlavaNpuModel) and module.image_newline is not None:
            nn.init.normal_(module.image_newline, std=self.config.text_config.hidden_size**-0.5)


class LlavaNpuModel(LlavaNpuPreTrainedModel, LlavaModel):
    """Tower, projector and language model, without the language-modelling head."""

    config: LlavaNpuConfig

    def __init__(self, config: LlavaNpuConfig):
        # Not LlavaModel.__init__, which would build its own projector first.
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = config.new_projector()
        given, taken = self.multi_modal_projector.output_channels, config.text_config.hidden_size
        if given != taken:
            raise UserError(
                f"Projector {config.projector_type!r} gives the tower's {given} channels, but the language model takes"
                f" {taken}. Choose a tower of that width, or a projector that maps one to the other, such as 'linear'."
            )
        self.image_newline = None
        if config.tiling is not None and config.tiling.is_map:  # with the initialisation of LLaVA-1.6
            width = config.text_config.hidden_size
            self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Runs the vision tower: (images, 3, height, width) → (images, tokens, channels), before the projector.

        Two towers take six channels of pixels (`two_towers.py`).
        """
        config = self.config
        tower = config.tower
        if tuple(pixel_values.shape[-2:]) != config.input_size:
            raise UserError(
                f"pixel_values: images of {tuple(pixel_values.shape[-2:])} pixels, but this model's tower takes "
                f"{config.input_size}. Prepare them with the model's own processor."
            )
        learns = any(parameter.requires_grad for parameter in self.vision_tower.parameters())

        def encode(images: torch.Tensor) -> list[torch.Tensor]:
            outputs = self.vision_tower(images, output_hidden_states=True)
            return select_features(outputs, tower, config.feature_layers, config.keep_prefix_tokens)

        pixel_values = pixel_values.to(self.vision_tower.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):  # a frozen tower keeps no activations
            if len(config.scales) == 1:
                layers = encode(pixel_values)
            else:
                special_tokens = tower.num_prefix_tokens if config.keep_prefix_tokens else 0
                layers = multiscale_features(encode, pixel_values, config.scales, tower.grid, special_tokens)
            return layers[0] if len(layers) == 1 else torch.cat(layers, dim=-1)

    def project(self, vision_features: torch.Tensor) -> torch.Tensor:
        """Runs the projector: (images, tokens, channels) → (images, visual tokens, text hidden size)."""
        return self._project(vision_features)

    def _project(self, vision_features: torch.Tensor, **counts: Sequence[int]) -> torch.Tensor:
        dtype = next(self.multi_modal_projector.parameters(), vision_features).dtype
        return self.multi_modal_projector(vision_features.to(dtype), grid=self.config.tower.grid, **counts)

    def dummy_image_inputs(self, device: torch.device, *, encode: bool) -> dict[str, Any]:
        """Inputs for a batch of text alone: one blank image, no place for it in the text.

        It changes no number, but the projector is in the graph, before the language model as ever, and gets a gradient
        of zeros. Distributed engines need that: what one process runs, all must run, in the same order.

        Args:
            encode: have the vision tower run too.
        """
        config, tower, size = self.config, self.config.tower, self.config.input_size
        tiles = 1 if config.tiling is None else config.tiling.num_tiles(size)
        image: dict[str, Any]
        if encode:
            image = {"pixel_values": torch.zeros(tiles, tower.pixels[0], *size, device=device)}
        else:
            tokens = tower.num_patches + (tower.num_prefix_tokens if config.keep_prefix_tokens else 0)
            channels = self.multi_modal_projector.input_channels
            image = {"vision_features": torch.zeros(tiles, tokens, channels, device=device)}
        nowhere = torch.empty(0, dtype=torch.long, device=device)
        return {**image, "image_sizes": [size], "image_positions": nowhere}

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        image_sizes: ImageSizes | None = None,
        tokens_per_image: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Visual tokens of each image, as transformers' generation expects them (in `pooler_output`).

        With anyres, `pixel_values` may also come as from transformers' `LlavaNextProcessor`: (images, most tiles, 3,
        height, width), padded.
        """
        sizes = self._sizes(image_sizes)
        if vision_features is None:
            assert pixel_values is not None
            if sizes is not None and pixel_values.ndim == 5:
                counts = [self._tiling.num_tiles(size) for size in sizes]
                pixel_values = torch.cat([tiles[:count] for tiles, count in zip(pixel_values, counts, strict=True)])
            vision_features = self.encode_images(pixel_values)
        if tokens_per_image is not None:
            tokens = self._project(vision_features, counts=tokens_per_image)
            images = list(tokens.split(list(tokens_per_image)))
            return BaseModelOutputWithPooling(last_hidden_state=vision_features, pooler_output=images)
        tokens = self.project(vision_features)
        return BaseModelOutputWithPooling(
            last_hidden_state=vision_features,
            pooler_output=list(tokens) if sizes is None else self._pack(tokens, sizes),
        )

    @property
    def _tiling(self) -> Tiling:
        tiling = self.config.tiling
        assert tiling is not None
        return tiling

    def _sizes(self, image_sizes: ImageSizes | None) -> list[Size] | None:
        """The images' sizes, where the layout of their tokens depends on them."""
        if self.config.image_grid_pinpoints is None:
            return None
        if image_sizes is None:
            raise UserError("this model cuts images into tiles (anyres): give image_sizes, as its own processor does.")
        pairs = image_sizes.tolist() if isinstance(image_sizes, torch.Tensor) else image_sizes
        return [(int(height), int(width)) for height, width in pairs]

    def _pack(self, tokens: torch.Tensor, sizes: list[Size]) -> list[torch.Tensor]:
        """(tiles of all images, tokens, hidden) → of each image (its tokens, hidden)."""
        tiling = self._tiling
        counts = [tiling.num_tiles(size) for size in sizes]
        if sum(counts) != len(tokens):
            raise UserError(
                f"{len(tokens)} tiles are given, but images of {sizes} pixels (height, width) make {sum(counts)}. "
                "Prepare images and sizes with the model's own processor."
            )
        return [
            tiling.pack(tiles, size, self.image_newline)
            for tiles, size in zip(tokens.split(counts), sizes, strict=True)
        ]

    def get_placeholder_mask(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        # image_features: (visual tokens of all images, text hidden size)
        mask = input_ids == self.config.image_token_id
        num_places, num_features = int(mask.sum()), image_features.shape[0]
        if num_places != num_features:
            per_image = self.config.num_image_tokens
            counts = ""
            if self.config.image_grid_pinpoints is None:
                images, given = num_places / per_image, num_features / per_image
                counts = f" ({per_image} each): {images:g} images in the text, {given:g} given"
            raise UserError(
                f"the text has {num_places} image tokens, the images give {num_features}{counts}. "
                "Put one <image> in the text for each image, and prepare both with the model's own processor."
            )
        return mask.unsqueeze(-1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        image_sizes: ImageSizes | None = None,
        image_positions: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        tokens_per_image: Sequence[int] | None = None,
        sequence_lengths: Sequence[int] | None = None,
        key_lengths: Sequence[int] | None = None,
        sequence_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `LlavaModel.forward`, and:

        Args:
            vision_features: (images, tokens, channels), in place of `pixel_values`.
            image_sizes: (images, 2), each image's (height, width); with anyres alone. A list, or a tensor on the host:
                one on an accelerator makes the host wait.
            image_positions: (image tokens,), where they stand in the flattened `input_ids`. Whoever built the batch
                knows it; without it the image tokens are searched for, which on an accelerator makes the host wait.
                Empty: the images stand nowhere (see `dummy_image_inputs`).
            image_tokens: with `image_positions`, which of the images' tokens stand there; None: all, in order.
            tokens_per_image: how many tokens each image has, of those that the projector can give
                (`LlavaNpuConfig.image_token_choices`); None: all have `num_image_tokens`.
            sequence_lengths, key_lengths: what the host knows of the batch (`KnownLengths`).
            sequence_group: processes that have an equal part of every row each (sequence parallel).
        """
        if vision_features is not None and pixel_values is not None:
            raise ValueError("give pixel_values or vision_features, not both")
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if vision_features is not None or pixel_values is not None:
            images = self.get_image_features(pixel_values, vision_features, image_sizes, tokens_per_image)
            if image_positions is None:
                inputs["mm_encoder_outputs"] = {"image": images}
            else:
                inputs = {"inputs_embeds": self._splice(input_ids, images.pooler_output, image_positions, image_tokens)}
        with known_lengths(sequence_lengths, key_lengths, sequence_group):
            return super().forward(**{**kwargs, **inputs})

    def _splice(
        self,
        input_ids: torch.Tensor | None,
        images: list[torch.Tensor],
        image_positions: torch.Tensor,
        image_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """(batch, length, hidden): words, and the images' tokens where the host knows them to stand."""
        words = self.get_input_embeddings()(input_ids)
        tokens = torch.cat(images).to(words.dtype)  # (image tokens, hidden)
        if image_tokens is not None:
            tokens = tokens.index_select(0, image_tokens)
        elif not len(image_positions):
            tokens = tokens[:0]
        return words.flatten(0, 1).index_copy(0, image_positions, tokens).view_as(words)


class LlavaNpuForConditionalGeneration(LlavaNpuPreTrainedModel, LlavaForConditionalGeneration):
    """A LLaVA-style model that answers in text.

    With a two-layer MLP projector it computes what `transformers.LlavaForConditionalGeneration` computes, and either
    loads the other's checkpoints.
    """

    config_class = LlavaNpuConfig
    config: LlavaNpuConfig

    def __init__(self, config: LlavaNpuConfig):
        # Not LlavaForConditionalGeneration.__init__, which would build transformers' LlavaModel first.
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlavaNpuModel(config)
        self.lm_head = LanguageModelHead(config.text_config)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Takes a head's weights; what else this language model's head does, it still does."""
        self.lm_head = self.lm_head.with_weights(new_embeddings)

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Runs the vision tower: (images, 3, height, width) → (images, tokens, channels), before the projector."""
        return self.model.encode_images(pixel_values)

    def forward(  # the explicit names are what transformers' generation inspects
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        vision_features: torch.Tensor | None = None,
        image_sizes: ImageSizes | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `LlavaForConditionalGeneration.forward`, and `vision_features` may replace `pixel_values`.

        Args:
            input_ids: (batch, length), with `num_image_tokens` image tokens for each image.
            pixel_values: (images, 3, height, width), all images of the batch in the order of the text.
            vision_features: (images, tokens, channels), what `encode_images` gives for them.
            image_sizes: (images, 2), with anyres alone: the (height, width) that each image had.
        """
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            vision_features=vision_features,
            image_sizes=image_sizes,
            **kwargs,
        )

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: dict[str, torch.Tensor] | None = None, **kwargs: Any
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, with the weight names of the models on the hub (`llava-hf/…`).

        transformers reads several spellings of these names, vLLM this one alone.
        """
        if getattr(self, "hf_quantizer", None) is not None:  # its weights have names and parts of their own
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
            return
        renamed = self.hub_weights(self.state_dict() if state_dict is None else state_dict)
        super().save_pretrained(save_directory, state_dict=renamed, **{**kwargs, "save_original_format": False})

    def hub_weights(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's weights by their names on the hub, without those that another one is tied to."""
        # First as the parts' own checkpoints name them (DINOv3's layers, for one), then the prefixes.
        weights = revert_weight_conversion(self, state_dict)
        kind = self.config.tower.kind
        renamed = {name: tensor for key, tensor in weights.items() if (name := hub_name(key, kind)) is not None}
        if self.config.tie_word_embeddings:  # the embedding again
            renamed.pop(LM_HEAD, None)
        return renamed

    @torch.no_grad()
    def generate(self, *args: Any, vision_features: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`; `vision_features` (and their `image_sizes`) may replace `pixel_values`."""
        if vision_features is not None:
            if kwargs.get("pixel_values") is not None:
                raise ValueError("give pixel_values or vision_features, not both")
            kwargs["mm_encoder_outputs"] = {
                "image": self.model.get_image_features(
                    vision_features=vision_features, image_sizes=kwargs.pop("image_sizes", None)
                )
            }
        return super().generate(*args, **kwargs)
