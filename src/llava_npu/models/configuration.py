"""The model's configuration: transformers' LLaVA configuration plus the projector's type and options."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig

from llava_npu.errors import UserError
from llava_npu.models.language_models import HeadShape, describe_head
from llava_npu.models.projectors import (
    NestedOptions,
    Projector,
    build_projector,
    feature_layers,
    grid_defaults,
    make_options,
    num_tokens,
    token_grid,
)
from llava_npu.models.projectors.interleaved import InterleavedProjector
from llava_npu.models.vision.anyres import Size, Tiling, check_resolutions, default_resolutions
from llava_npu.models.vision.multiscale import check_scales
from llava_npu.models.vision.towers import Tower, check_layers, describe_tower, require_one_grid
from llava_npu.models.vision.two_towers import TwoTowersConfig

PLAIN_PROJECTOR = "mlp2x_gelu"  # the one that transformers' own LLaVA has
VLLM_TOWERS = ("clip_vision_model", "siglip_vision_model")  # that vLLM's LLaVA has


@strict
class LlavaNpuConfig(LlavaConfig):
    """Configuration of a LLaVA-style model with any tower, or two, and any projector.

    A model that transformers' own LLaVA can express (two-layer MLP, a tower of tokens) is saved as such, with
    `model_type` "llava" or, with anyres, "llava_next", so that every tool that knows these opens it; any other is saved
    as "llava_npu".

    Beyond `LlavaConfig`:
        projector_type: a name known to `llava_npu.models.projectors`.
        projector_options: that projector's options.
        vision_feature_select_strategy: "default" (patch tokens only), "full" (special tokens too), or None: what fits
            the tower.
        tower_fusion: of two towers (`TwoTowersConfig` as `vision_config`): "channel", one projector of the channels of
            both, or "interleave", one projector for each, whose tokens alternate.
        scales: with more than [1], the tower sees each image at several sizes (S²; `multiscale.py`).
        image_grid_pinpoints: resolutions, (height, width), into which images are scaled to be seen as several tiles
            (`anyres.py`); None: each image is one square.
    """

    model_type = "llava_npu"

    projector_type: str = PLAIN_PROJECTOR
    projector_options: dict[str, Any] = field(default_factory=dict)
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    tower_fusion: Literal["channel", "interleave"] = "channel"
    scales: list[int] = field(default_factory=lambda: [1])
    image_grid_pinpoints: list[list[int]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.projector_options = dict(self.projector_options)
        tower = self.tower
        self._check_layers(tower)
        if self.vision_feature_select_strategy is None:
            self.vision_feature_select_strategy = "default" if tower.num_prefix_tokens else "full"
        if self.vision_feature_select_strategy == "default" and tower.num_prefix_tokens == 0:
            raise UserError(
                f"vision_feature_select_strategy 'default' drops the first token, but a {tower.kind} tower has no "
                "class token: an image patch would be lost. Use 'full' (all patches are kept)."
            )
        if self.projector_hidden_act != "gelu":
            raise UserError(f"projector_hidden_act {self.projector_hidden_act!r}: projectors compute with 'gelu' only.")
        check_scales(self.scales)
        self._check_towers(tower)
        if self.image_grid_pinpoints is not None:
            check_resolutions(self.image_grid_pinpoints, self.input_size)
        self.image_seq_length = self.num_image_tokens

    def _check_layers(self, tower: Tower) -> None:
        check_layers(tower, self.vision_feature_layer)
        try:
            check_layers(tower, self.feature_layers)
        except UserError as error:
            added = ", ".join(map(str, self.feature_layers[1:]))
            raise UserError(
                f"Projector {self.projector_type!r} reads the tower's layers {added} too (its `region_layers`). {error}"
            ) from None

    def _check_towers(self, tower: Tower) -> None:
        if self.tower_fusion == "interleave" and not tower.members:
            raise UserError("tower_fusion 'interleave' takes two vision towers, and there is one.")
        separate = make_options(self.projector_type, **self.projector_options).separate_towers
        if self.tower_fusion == "interleave" and separate:
            raise UserError(
                f"tower_fusion 'interleave': projector {self.projector_type!r} joins two towers itself. Leave it out."
            )
        if not separate or len(self.scales) > 1:
            require_one_grid(self.vision_config)
        sizes = {member.image_size for member in tower.members}
        if len(sizes) > 1 and len(self.scales) > 1:
            shown = " and ".join(f"{height}×{width}" for height, width in sorted(sizes))
            raise UserError(f"scales {self.scales}: two towers need images of one size for that, and take {shown}.")

    @property
    def tower(self) -> Tower:
        return describe_tower(self.vision_config)

    @property
    def keep_prefix_tokens(self) -> bool:
        return self.vision_feature_select_strategy == "full"

    @property
    def feature_layers(self) -> list[int]:
        """The tower's hidden states that are concatenated on channels for the projector."""
        if isinstance(self.vision_feature_layer, int):
            return feature_layers(self.projector_type, self.vision_feature_layer, **self.projector_options)
        return list(self.vision_feature_layer)

    @property
    def projector_input_size(self) -> int:
        """`vision_hidden_size` for `build_projector`, which itself counts the layers that the projector asks for."""
        chosen = 1 if isinstance(self.vision_feature_layer, int) else len(self.vision_feature_layer)
        return self.tower.hidden_size * chosen * len(self.scales)

    def new_projector(self) -> Projector:
        """A projector of this configuration with fresh weights."""

        def build(vision_hidden_size: int) -> Projector:
            return build_projector(
                self.projector_type,
                vision_hidden_size=vision_hidden_size,
                text_hidden_size=self.text_config.hidden_size,
                **self.projector_options,
            )

        if self.tower_fusion == "channel":
            return build(self.projector_input_size)
        tower = self.tower
        times = self.projector_input_size // tower.hidden_size  # chosen layers and scales
        widths = [member.hidden_size for member in tower.members]
        return InterleavedProjector([build(times * width) for width in widths], widths)

    @property
    def input_size(self) -> Size:
        """(height, width) of the images, or of the tiles of one, that the model takes."""
        height, width = self.tower.image_size
        return height * self.scales[-1], width * self.scales[-1]

    @property
    def tiling(self) -> Tiling | None:
        """How images are cut into tiles; None: they are not."""
        if self.image_grid_pinpoints is None:
            return None
        grid = token_grid(self.projector_type, self.tower.grid, **self.projector_options)
        if self.tower_fusion == "interleave" or (self.keep_prefix_tokens and self.tower.num_prefix_tokens):
            grid = None  # two tokens in one place, and special tokens in none
        resolutions = tuple((height, width) for height, width in self.image_grid_pinpoints)
        return Tiling(resolutions, self.input_size, grid or self.num_image_tokens)

    def count_image_tokens(self, size: Size) -> int:
        """Tokens that an image of this (height, width) takes in the text."""
        tiling = self.tiling
        return self.num_image_tokens if tiling is None else tiling.num_tokens(size)

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one image, with anyres of one tile: the projector's answer for the tower's grid."""
        tower = self.tower
        special_tokens = tower.num_prefix_tokens if self.keep_prefix_tokens else 0
        count = num_tokens(self.projector_type, tower.grid, special_tokens=special_tokens, **self.projector_options)
        return count if self.tower_fusion == "channel" else count * len(tower.members)

    @property
    def image_token_choices(self) -> Sequence[int]:
        """Numbers of tokens that an image can have with the same weights, rising; of most projectors one."""
        options = make_options(self.projector_type, **self.projector_options)
        if isinstance(options, NestedOptions) and self.image_grid_pinpoints is None and self.tower_fusion == "channel":
            return options.token_choices(self.tower.grid)
        return [self.num_image_tokens]

    def check_image_tokens(self, tokens: Sequence[int], setting: str) -> None:
        """Raises `UserError`, naming the `setting`, for a number of tokens that no image of this model can have."""
        choices = self.image_token_choices
        wrong = next((count for count in tokens if count not in choices), None)
        if wrong is None:
            return
        can = f"1 to {choices[-1]}" if isinstance(choices, range) else ", ".join(map(str, choices))
        tiles = " each tile" if self.image_grid_pinpoints is not None else ""
        raise UserError(
            f"{setting}: {wrong} tokens for each image, but projector {self.projector_type!r} gives{tiles} {can} from "
            f"{self.tower.grid[0]}×{self.tower.grid[1]} patches. Projectors that give several numbers with the same "
            "weights are 'mqt' and 'matryoshka_pool', on whole images (not `anyres`) and without interleaved towers."
        )

    @property
    def is_plain_llava(self) -> bool:
        """Whether transformers' LLaVA (with anyres, its LLaVA-NeXT) computes exactly this model."""
        return (
            self.projector_type == PLAIN_PROJECTOR
            and not self.projector_options
            and not isinstance(self.vision_config, TwoTowersConfig)
            and self.scales == [1]
            and not self.tower.last_layer_only
            and describe_head(self.text_config) == HeadShape()
            and (self.keep_prefix_tokens or self.tower.num_prefix_tokens == 1)
            and (self.tiling is None or (self.tiling.is_map and isinstance(self.vision_config.image_size, int)))
        )

    @property
    def plain_model_type(self) -> str:
        """The `model_type` of the transformers model that `is_plain_llava` speaks of."""
        return "llava" if self.image_grid_pinpoints is None else "llava_next"

    def change_resolutions(self, resolutions: list[list[int]] | None) -> None:
        """Sets what anyres chooses from, (height, width), or with None ends it."""
        self.image_grid_pinpoints = resolutions
        if resolutions is not None:
            check_resolutions(resolutions, self.input_size)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        values, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if values.get("model_type") == "llava_next":
            image_size = values.get("vision_config", {}).get("image_size", 336)  # transformers' default
            values.setdefault("image_grid_pinpoints", default_resolutions((image_size, image_size)))
        if values.get("model_type") in ("llava", "llava_next"):  # a plain LLaVA checkpoint is supported too
            values["model_type"] = cls.model_type
        return values, unused

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        # transformers chooses by the model type, vLLM by the architecture: ours leads to the plug-in, which also says
        # what vLLM's LLaVA cannot do.
        values["architectures"] = ["LlavaNpuForConditionalGeneration"]
        if self.is_plain_llava:
            values["model_type"] = self.plain_model_type
            if self.vision_config.model_type in VLLM_TOWERS:
                anyres = self.image_grid_pinpoints is not None
                values["architectures"] = [f"Llava{'Next' if anyres else ''}ForConditionalGeneration"]
        return values


def join_configs(
    vision_config: Any, text_config: Any, projector_type: str, projector_options: dict[str, Any] | None, **settings: Any
) -> LlavaNpuConfig:
    """The configuration of a model composed of a tower and a language model; `settings`: what else it is to say."""
    # What an option the user left out follows from the tower (C-Abstractor's positions) is written down for good.
    tower = describe_tower(vision_config)
    options = {**grid_defaults(projector_type, tower.grid, tower.shapes), **(projector_options or {})}
    return LlavaNpuConfig(
        vision_config=vision_config,
        text_config=text_config,
        projector_type=projector_type,
        projector_options=options,
        tie_word_embeddings=text_config.tie_word_embeddings,
        **settings,
    )
