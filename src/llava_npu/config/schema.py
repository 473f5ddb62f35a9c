"""The schema of a training run. docs/configuration.md is generated from these descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from llava_npu.config.parts import LoraConfig, Part, PartName, PartsConfig, StageName, resolve_parts
from llava_npu.config.section import PathText, Section
from llava_npu.errors import UserError

# Keys of a new model; a checkpoint defines them itself.
OF_A_NEW_MODEL = (
    "projector",
    "projector_options",
    "vision_feature_layer",
    "vision_select_feature",
    "image_size",
    "tower_fusion",
    "scales",
)


# Keys, or whole sections, that change where and how fast a run goes, and nothing that it computes beyond rounding.
FREE_KEYS = (
    "output",
    "device",
    "engine",
    "engine_options",
    "sequence_parallel_size",
    "micro_batch_size",
    "gradient_checkpointing",
    "data.workers",
    "data.cache_features",
    "data.max_bad_samples",
    "max_nonfinite_steps",
    "trackers",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "async_checkpoints",
)


class ModelConfig(Section):
    """What is trained: a model to start from, or the parts of a new model."""

    checkpoint: PathText | None = Field(
        None,
        description="Folder or hub id of a LLaVA model to start from. The checkpoint already defines the vision tower, "
        "the projector and their settings; if you also set those keys, they must match it.",
    )
    vision_tower: PathText | list[PathText] | None = Field(
        None,
        description="Folder or hub id of a CLIP, SigLIP, DINOv2 or other vision model, with `language_model`; a list "
        "of two has both in one model. See docs/encoders.md.",
    )
    tower_fusion: Literal["channel", "interleave"] = Field(
        "channel",
        description="Of two vision towers: `channel`, one projector of the channels of both; `interleave`, a projector "
        "for each, whose tokens alternate (twice as many).",
    )
    language_model: PathText | None = Field(
        None, description="Folder or hub id of a causal language model of the Llama family; with `vision_tower`."
    )
    source: Literal["huggingface", "modelscope"] = Field(
        "huggingface", description="The hub on which a bare `organisation/name` is looked up."
    )
    projector: str = Field(
        "mlp2x_gelu",
        description="Projector type; see docs/projectors.md. Choosing another than a `base` drops its options.",
    )
    projector_options: dict[str, Any] = Field(
        default_factory=dict, description="Options of that projector; see docs/projectors.md."
    )
    vision_feature_layer: int | list[int] = Field(
        -2,
        description="Hidden state of the tower that the projector gets (−1 is the last); a list concatenates several.",
    )
    vision_select_feature: Literal["patch", "cls_patch"] = Field(
        "patch", description="`patch`: patch tokens only; `cls_patch`: also the tower's special tokens."
    )
    image_size: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="Input size of the tower in pixels per side, of two towers also one for each; default: as "
        "published.",
    )
    scales: list[int] = Field(
        default_factory=lambda: [1],
        description="`[1, 2]`: the tower also sees the image at twice its input size, in tiles (S²): more channels, "
        "the same number of tokens.",
    )
    image_aspect_ratio: Literal["pad", "square", "anyres"] | None = Field(
        None,
        description="`pad` to a square with the mean colour; `square`: the image processor's resize and crop; "
        "`anyres`: several tiles, as in LLaVA-1.6. Default: the checkpoint's; `pad` for a new model.",
    )
    image_grid_pinpoints: list[list[int]] | None = Field(
        None,
        description="With `anyres`: the resolutions to choose from, (width, height) in pixels; default: LLaVA-1.6's.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        parts = (self.vision_tower or None, self.language_model)  # an empty list names none
        if self.checkpoint is None and None in parts:
            raise ValueError("give `checkpoint`, or both `vision_tower` and `language_model`")
        if self.checkpoint is not None and parts != (None, None):
            raise ValueError("`checkpoint` already has a vision tower and a language model; give one or the other")
        return self

    @model_validator(mode="after")
    def _two_towers(self) -> ModelConfig:
        towers = len(self.vision_towers)
        if towers > 2:
            raise ValueError(f"`vision_tower` takes one tower or two, and has {towers}")
        if isinstance(self.image_size, list) and self.checkpoint is None and len(self.image_size) != towers:
            raise ValueError(f"`image_size` has {len(self.image_size)} sizes for {towers} vision tower(s)")
        if towers == 1 and self.tower_fusion != "channel":
            raise ValueError(f"`tower_fusion: {self.tower_fusion}` takes a list of two towers in `vision_tower`")
        if towers == 2 and self.vision_select_feature == "cls_patch":
            raise ValueError("of two towers only patches have places in common: set `vision_select_feature: patch`")
        return self

    @property
    def vision_towers(self) -> list[str]:
        """The towers of a new model."""
        if isinstance(self.vision_tower, list):
            return self.vision_tower
        return [] if self.vision_tower is None else [self.vision_tower]

    @model_validator(mode="after")
    def _pinpoints_are_for_anyres(self) -> ModelConfig:
        if self.image_grid_pinpoints is not None and self.image_aspect_ratio != "anyres":
            raise ValueError(
                "`image_grid_pinpoints` needs `image_aspect_ratio: anyres`, which is "
                f"{self.image_aspect_ratio or 'not set'} here"
            )
        return self

    @property
    def explicit_keys(self) -> dict[str, Any]:
        """Keys of a new model that are set in addition to a checkpoint, which must match (models/agreement.py).

        A configuration that was written out has every key. There, a default cannot be told from a key that nobody set,
        and counts as not set.
        """
        if self.checkpoint is None:
            return {}
        written_out = set(OF_A_NEW_MODEL) <= self.model_fields_set
        defaults = ModelConfig.model_construct()
        return {
            key: getattr(self, key)
            for key in OF_A_NEW_MODEL
            if key in self.model_fields_set and not (written_out and getattr(self, key) == getattr(defaults, key))
        }


class SourceConfig(Section):
    """One of several data files."""

    path: PathText = Field(description="As `data.path`.")
    image_root: PathText | None = Field(None, description="As `data.image_root`, which is the default.")
    weight: float = Field(
        1.0,
        gt=0,
        description="How often each record is seen in an epoch: 2 is twice; 0.5 is every second record, the same ones "
        "in every epoch.",
    )
    limit: int | None = Field(None, ge=1, description="Maximum number of records, drawn at random once.")


class ValidationConfig(Section):
    """Samples that are never trained on, and their loss during the run. Give one of `path`, `fraction` and `size`."""

    path: PathText | None = Field(None, description="A separate data file, as `data.path`.")
    image_root: PathText | None = Field(None, description="Its images, as `data.image_root`, which is the default.")
    fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Hold out this fraction of the distinct records, drawn at random, the same in every run.",
    )
    size: int | None = Field(None, ge=1, description="Hold out this many records, drawn likewise.")
    every: int = Field(500, ge=1, description="Steps between validations; the last step is always followed by one.")

    @model_validator(mode="after")
    def _one_way(self) -> ValidationConfig:
        if sum(each is not None for each in (self.path, self.fraction, self.size)) != 1:
            raise ValueError("set exactly one of `path`, `fraction` and `size`")
        return self


class DataConfig(Section):
    """The training data."""

    path: PathText | None = Field(
        None,
        description="Conversations: a JSON list, a JSONL file, Parquet (file, folder or `*`), or a folder "
        "written by `Dataset.save_to_disk`. See docs/data.md.",
    )
    sources: list[SourceConfig] = Field(
        default_factory=list,
        description="Several data files as one mixture, instead of `path`; a name stands for a data set of "
        "`datasets.yaml` (docs/data.md).",
    )
    image_root: PathText | None = Field(
        None,
        description="Folder of the images, or a .tar or .zip file of them (several with `*`); default: the folder of "
        "the data file.",
    )
    allow_absolute_paths: bool = Field(
        False, description="Allow image names that are absolute paths, and links that lead out of `image_root`."
    )
    bad_samples: Literal["error", "skip"] = Field(
        "error",
        description="What to do about a sample that cannot be used (a damaged image, a malformed record): `error` "
        "stops the run; `skip` uses another one instead, always the same, and lists the bad one in bad_samples.jsonl.",
    )
    max_bad_samples: int = Field(
        100, ge=0, description="With `skip`: stop when more samples than this have been replaced."
    )
    template: str | None = Field(
        None,
        description="Conversation template (`plain`, `v1`, `llama_2`, `mistral`, `chatml`; language models' own: "
        "`llama_3`, `qwen_2`, `qwen_2_5`, `qwen_3`, `phi_3`, `gemma_2`; `tokenizer`: its chat template); default: "
        "`plain` for `stage: align`, the model's own for `finetune`.",
    )
    max_length: int = Field(
        2048, ge=8, description="Maximum tokens of a sample, images included; longer ones are truncated."
    )
    workers: int = Field(
        2, ge=0, description="Processes per device that load and prepare samples; 0: the training process does it."
    )
    cache_features: bool | Literal["auto"] = Field(
        False,
        description="Run the frozen vision tower once per image and keep its output on disk (in the user's cache), for "
        "many epochs or many runs over the same images. `auto`: if the disk has room for it.",
    )

    image_tokens: list[int] | Literal["all"] | None = Field(
        None,
        description="With a projector that gives several numbers of tokens (`mqt`, `matryoshka_pool`): each sample's "
        "images have one of these, drawn in each epoch by `seed`; `all`: any that the projector gives; null: the "
        "model's own number.",
    )

    validation: ValidationConfig | None = Field(
        None, description="Samples held out of training, to validate on; null: none are."
    )

    @field_validator("template")
    @classmethod
    def _known_template(cls, name: str | None) -> str | None:
        from llava_npu.data.conversation.templates import get_template

        if name is not None:
            get_template(name)
        return name

    @model_validator(mode="after")
    def _path_or_sources(self) -> DataConfig:
        if (self.path is None) == (not self.sources):
            raise ValueError("set either `path` or, for a mixture, `sources`")
        return self


class OptimizerConfig(Section):
    """AdamW with linear warmup and cosine decay to zero."""

    learning_rate: float = Field(
        1e-3,
        gt=0,
        le=1e6,
        description="Peak learning rate; a part may have its own, as in `parts.projector.learning_rate`.",
    )
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled weight decay; not applied to norms and biases. A part may have its own."
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="AdamW's averaging factors, each in [0, 1).", strict=False
    )
    epsilon: float = Field(1e-8, gt=0, description="AdamW's term for numerical stability.")
    warmup_ratio: float = Field(
        0.03, ge=0, lt=1, description="Fraction of all steps in which the learning rate rises from 0."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 turns clipping off.")

    @field_validator("betas")
    @classmethod
    def _betas_average(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each has to be at least 0 and less than 1")
        return betas


class RunConfig(Section):
    """One training run."""

    output: PathText = Field(
        description="The run folder: checkpoints, metrics, plots, and the final model in `model/`."
    )
    stage: StageName = Field(
        description="`align` trains the projector on captions; `finetune` the projector and the language model on "
        "conversations. `parts` changes what is trained."
    )
    model: ModelConfig
    data: DataConfig
    parts: PartsConfig = PartsConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: int = Field(1, ge=1, description="Number of passes over the data.")
    max_steps: int | None = Field(
        None, ge=1, description="Stop after this many optimizer steps, if that comes before the last epoch's end."
    )
    batch_size: int = Field(
        256,
        ge=1,
        le=1_000_000,
        description="Samples per optimizer step over all devices: the same on 1 device and on 8.",
    )
    micro_batch_size: int = Field(
        16,
        ge=1,
        description="Samples per device and forward pass, padded to the longest; gradients are accumulated up to "
        "`batch_size`. Has no effect with `pack_tokens`.",
    )
    pack_tokens: int | None = Field(
        None,
        ge=8,
        description="Pack the samples of a step into rows of at most this many tokens, one row per device and forward "
        "pass, instead of padding them: faster where texts differ in length. Not less than the longest sample.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="`auto`: bf16 where the device computes it faster, fp16 where it has no bfloat16, else fp32. In "
        "fp16 the loss is scaled so that small gradients are kept (`zero2` and `zero3` do not support it).",
    )
    gradient_checkpointing: bool | Literal["auto"] | int = Field(
        False,
        description="Recompute activations in the backward pass: less memory, about a third more time. A number: in "
        "that many layers only, the first to run (those of a vision tower that learns, then the language model's). "
        "`auto`: in as few as the plan says that memory needs, perhaps none.",
    )
    engine: str = Field(
        "ddp",
        description="How several devices share the work: each with the whole model (`ddp`), with a shard of weights "
        "and optimizer (`fsdp2`, `zero3`), or with a shard of the optimizer (`zero2`). `zero2` and `zero3` need "
        "DeepSpeed.",
    )
    engine_options: dict[str, Any] = Field(
        default_factory=dict, description="Options of that engine, such as `offload: true`; see docs/training.md."
    )
    sequence_parallel_size: int = Field(
        1,
        ge=1,
        description="Number of devices that work on each sequence together, every one on a part of it (Ulysses): for "
        "packs or samples that are longer than a device has memory for. It divides the number of devices and the "
        "language model's attention heads.",
    )
    compile: Literal["inductor", "aot_eager"] | None = Field(
        None,
        description="`torch.compile` the language model's layers with this backend: `inductor` makes faster code after "
        "minutes of compiling; `aot_eager` only traces, for debugging. Best with `pack_tokens`, where shapes do not "
        "change. Not supported on NPUs, with `gradient_checkpointing`, or with another engine than `ddp`.",
    )
    device: str = Field(
        "auto", description="`auto` (NPU, then CUDA, then CPU), `npu`, `cuda`, `cpu`, or one device such as `npu:1`."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Random seed of weight initialization, data order and dropout.")
    trackers: list[Literal["tensorboard", "wandb", "swanlab", "mlflow"]] = Field(
        default_factory=list,
        description="Experiment trackers that receive what is written to metrics.jsonl; each needs its package "
        "installed.",
    )
    max_nonfinite_steps: int = Field(
        5,
        ge=0,
        description="Maximum number of steps skipped because their loss or gradient is not finite; each is noted in "
        "nonfinite_steps.jsonl with module and samples. One more stops the run and saves the batch for `llava-npu "
        "replay`.",
    )
    log_every: int = Field(1, ge=1, description="Steps between two lines of metrics.jsonl.")
    save_every: int = Field(500, ge=1, description="Steps between checkpoints; the final model replaces them.")
    keep_checkpoints: int = Field(
        2, ge=1, description="Number of checkpoints kept, and the best one; older ones are deleted."
    )
    async_checkpoints: bool = Field(
        False,
        description="Continue training while a checkpoint is written. Each process first copies its part to its host's "
        "memory: 12 bytes per trained parameter over all processes.",
    )

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _is_a_choice_of_layers(cls, value: object) -> object:
        if isinstance(value, bool) or value == "auto" or (isinstance(value, int) and value >= 1):
            return value
        raise ValueError("allowed are true, false, auto, or a number of layers from 1")

    @model_validator(mode="after")
    def _compiles_something(self) -> RunConfig:
        if self.compile and self.gradient_checkpointing:
            raise ValueError("torch compiles nothing inside `gradient_checkpointing`; turn off one of the two")
        if self.compile and self.sequence_parallel_size > 1:
            raise ValueError("`compile` has not been tried with `sequence_parallel_size`; leave out one of the two")
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> RunConfig:
        trained = {name for name, part in self.resolved_parts.items() if part.train != "frozen"}
        if not trained:
            raise ValueError("`parts` freezes everything; set `train` of one part to `full` or `lora`")
        if self.lora.base_bits is not None and not self.has_adapters:
            raise ValueError("`lora.base_bits` needs a part with `train: lora`, and there is none; see `parts`")
        if self.data.cache_features and "vision_tower" in trained:
            raise ValueError(
                "`data.cache_features` stores the output of a frozen vision tower, but `parts.vision_tower.train` is "
                f"`{self.resolved_parts['vision_tower'].train}`; set `cache_features` to false or `train` to `frozen`"
            )
        return self

    @property
    def recomputed_layers(self) -> bool | int:
        """`gradient_checkpointing`, once it is chosen.

        Raises:
            UserError: it is still to be chosen.
        """
        if self.gradient_checkpointing == "auto":
            raise UserError(
                "gradient_checkpointing: `auto` is chosen by the plan of `llava-npu train` and `compare`; from Python, "
                "give `train` what `llava_npu.planning.check.choose_recomputation` returns, or set true, false or a "
                "number of layers."
            )
        return self.gradient_checkpointing

    @property
    def has_adapters(self) -> bool:
        """Whether a part is trained by adapters."""
        return any(part.train == "lora" for part in self.resolved_parts.values())

    @property
    def resolved_parts(self) -> dict[PartName, Part]:
        """How each part is trained in this run, with defaults filled in."""
        return resolve_parts(self.stage, self.parts, self.optimizer.learning_rate, self.optimizer.weight_decay)

    @property
    def output_path(self) -> Path:
        return Path(self.output)
