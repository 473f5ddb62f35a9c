"""The schema of a training run. docs/configuration.md is generated from these descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from llava_npu.config.parts import LoraConfig, Part, PartName, PartsConfig, StageName, resolve_parts
from llava_npu.config.section import Section

# Of a new model alone: a checkpoint brings these with it.
OF_A_NEW_MODEL = (
    "projector",
    "projector_options",
    "vision_feature_layer",
    "vision_select_feature",
    "image_size",
    "scales",
)


class ModelConfig(Section):
    """What is trained: either a model folder to go on from, or the parts of a new model."""

    checkpoint: str | None = Field(
        None,
        description="A LLaVA model folder or hub id (ours or Hugging Face) to start from. It brings its tower, its "
        "projector and their settings: said beside it, they must be what it has.",
    )
    vision_tower: str | None = Field(
        None,
        description="Folder or hub id of a CLIP, SigLIP, DINOv2 or other vision model, with `language_model`; see "
        "docs/encoders.md.",
    )
    language_model: str | None = Field(
        None, description="Folder or hub id of a Llama-family causal language model; with `vision_tower`."
    )
    source: Literal["huggingface", "modelscope"] = Field(
        "huggingface", description="The hub of each of these that is a bare `organisation/name`."
    )
    projector: str = Field("mlp2x_gelu", description="Projector type; see docs/projectors.md.")
    projector_options: dict[str, Any] = Field(default_factory=dict, description="Options of that projector.")
    vision_feature_layer: int | list[int] = Field(
        -2,
        description="Which hidden state of the tower the projector sees (−1 is the last); a list concatenates several.",
    )
    vision_select_feature: Literal["patch", "cls_patch"] = Field(
        "patch", description="`patch`: patch tokens only; `cls_patch`: the tower's special tokens too."
    )
    image_size: int | None = Field(
        None, ge=1, description="Pixels per side of what the tower sees; by default as it was published."
    )
    scales: list[int] = Field(
        default_factory=lambda: [1],
        description="`[1, 2]`: the tower also sees the picture at twice its size, in tiles (S²): more channels, the "
        "same number of tokens.",
    )
    image_aspect_ratio: Literal["pad", "square", "anyres"] | None = Field(
        None,
        description="`pad` to a square with the mean colour; `square`: the image processor's resize and crop; "
        "`anyres`: several tiles, as LLaVA-1.6. By default as the checkpoint; `pad` for a new model.",
    )
    image_grid_pinpoints: list[list[int]] | None = Field(
        None, description="With `anyres`: (width, height) in pixels to choose from; by default LLaVA-1.6's."
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        parts = (self.vision_tower, self.language_model)
        if self.checkpoint is None and None in parts:
            raise ValueError("give `checkpoint`, or both `vision_tower` and `language_model`")
        if self.checkpoint is not None and parts != (None, None):
            raise ValueError("`checkpoint` already holds a tower and a language model; give one or the other")
        return self

    @model_validator(mode="after")
    def _pinpoints_are_for_anyres(self) -> ModelConfig:
        if self.image_grid_pinpoints is not None and self.image_aspect_ratio != "anyres":
            raise ValueError(
                "`image_grid_pinpoints` needs `image_aspect_ratio: anyres`, and here it is "
                f"{self.image_aspect_ratio or 'not given'}"
            )
        return self

    @property
    def said_beside_checkpoint(self) -> dict[str, Any]:
        """What is said of a new model though there is a checkpoint, which must have the same (models/agreement.py).

        A configuration that was written out has every key: there, a default cannot be told from a key that nobody set,
        and counts as not said.
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

    path: str = Field(description="As `data.path`.")
    image_root: str | None = Field(None, description="As `data.image_root`, which holds where this is not given.")
    weight: float = Field(
        1.0,
        gt=0,
        description="How often each record is seen in an epoch: 2 is twice; 0.5 is every second record, always the "
        "same ones.",
    )
    limit: int | None = Field(None, ge=1, description="Take no more records than this, drawn at random once for all.")


class ValidationConfig(Section):
    """Samples that are never trained on, and their loss as the run goes. Give one of `path`, `fraction` and `size`."""

    path: str | None = Field(None, description="A data file of its own, as `data.path`.")
    image_root: str | None = Field(
        None, description="Its images, as `data.image_root`, which holds where none is given."
    )
    fraction: float | None = Field(
        None, gt=0, lt=1, description="Hold out this part of the data, drawn at random, the same in every run."
    )
    size: int | None = Field(None, ge=1, description="Hold out so many records, drawn likewise.")
    every: int = Field(500, ge=1, description="Steps between validations; there is one at the end, too.")

    @model_validator(mode="after")
    def _one_way(self) -> ValidationConfig:
        if sum(each is not None for each in (self.path, self.fraction, self.size)) != 1:
            raise ValueError("give `path`, `fraction` or `size`: one of the three")
        return self


class DataConfig(Section):
    """What it is trained on."""

    path: str | None = Field(
        None,
        description="Conversations: a JSON list, a JSONL file, Parquet (file, folder or `*`), or a folder that "
        "`Dataset.save_to_disk` wrote. See docs/data.md.",
    )
    sources: list[SourceConfig] = Field(
        default_factory=list, description="Several data files as one mixture, in place of `path`."
    )
    image_root: str | None = Field(
        None,
        description="Folder of the images, or a .tar or .zip file of them (several with `*`); by default the data "
        "file's own folder.",
    )
    allow_absolute_paths: bool = Field(
        False, description="Let image names be absolute paths, and links lead out of `image_root`."
    )
    bad_samples: Literal["error", "skip"] = Field(
        "error",
        description="A sample that cannot be used (a damaged image, a malformed record): `error` stops the run; `skip` "
        "takes another one, always the same, and lists the bad one in bad_samples.jsonl.",
    )
    max_bad_samples: int = Field(100, ge=0, description="With `skip`: stop when more samples than this were replaced.")
    template: str | None = Field(
        None,
        description="Conversation template (`plain`, `v1`, `llama_2`, `mistral`, `chatml`, `tokenizer`); by default "
        "`plain` to align, and to finetune the model's own.",
    )
    max_length: int = Field(2048, ge=8, description="Tokens of a sample, images included; what exceeds it is cut.")
    workers: int = Field(
        2, ge=0, description="Processes per device that load and prepare samples; 0: none of their own."
    )
    cache_features: bool | Literal["auto"] = Field(
        False,
        description="Run the frozen vision tower once per image, ever, and keep what it gives on disk (in the user's "
        "cache). For many passes or many runs over the same images. `auto`: where the disk has room for it.",
    )

    validation: ValidationConfig | None = Field(
        None, description="Samples held out of training, to validate on; null: none."
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
            raise ValueError("give `path` or, for a mixture, `sources`: one of the two")
        return self


class OptimizerConfig(Section):
    """How the weights move: AdamW, linear warmup, cosine decay to zero."""

    learning_rate: float = Field(
        1e-3, gt=0, description="Peak learning rate; a part may have its own, as `parts.projector.learning_rate`."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled; never on norms and biases. A part may have its own.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's averaging factors.", strict=False)
    epsilon: float = Field(1e-8, gt=0, description="AdamW's term for numerical stability.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Part of all steps during which the rate rises from 0.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them alone.")


class RunConfig(Section):
    """One training run."""

    output: str = Field(description="The run folder: checkpoints, metrics, plots, and the final model in `model/`.")
    stage: StageName = Field(
        description="`align` trains the projector on captions; `finetune` the projector and the language model on "
        "conversations. `parts` changes what is trained."
    )
    model: ModelConfig
    data: DataConfig
    parts: PartsConfig = PartsConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: int = Field(1, ge=1, description="Passes over the data.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps, if that comes first.")
    batch_size: int = Field(
        256, ge=1, description="Samples per optimizer step, over all devices: the same on 1 device and on 8."
    )
    micro_batch_size: int = Field(
        16,
        ge=1,
        description="Samples per device at once, padded to the longest; what is left of `batch_size` is accumulated. "
        "With `pack_tokens` it has no effect.",
    )
    pack_tokens: int | None = Field(
        None,
        ge=8,
        description="Pack the samples of a step into rows of at most this many tokens, one row per device at once, "
        "instead of padding them: the fast way to train on texts of different lengths. At least the longest sample.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="`auto`: bfloat16 where the device computes it faster, fp16 where it has no bfloat16, else fp32. "
        "In fp16 the loss is scaled, so that small gradients are not lost (`zero2` and `zero3` cannot).",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third more time."
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
    compile: Literal["inductor", "aot_eager"] | None = Field(
        None,
        description="`torch.compile` the language model's layers with this backend: `inductor` makes faster code after "
        "minutes of compiling; `aot_eager` only traces, to see where a problem comes from. Best with `pack_tokens`, "
        "where no shape changes. Not on NPUs, not with `gradient_checkpointing`, "
        "and with engine: ddp.",
    )
    device: str = Field("auto", description="`auto` (NPU, then CUDA, then CPU), `npu`, `cuda`, `cpu`, or as `npu:1`.")
    seed: int = Field(0, ge=0, description="Of the projector's weights, the order of the data and everything random.")
    trackers: list[Literal["tensorboard", "wandb", "swanlab", "mlflow"]] = Field(
        default_factory=list,
        description="Experiment trackers that get what metrics.jsonl gets; each needs its package installed.",
    )
    max_nonfinite_steps: int = Field(
        5,
        ge=0,
        description="A step whose loss or gradient is not finite is skipped, and noted in nonfinite_steps.jsonl with "
        "module and samples. Above this many the run stops, and saves the batch for `llava-npu replay`.",
    )
    log_every: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl.")
    save_every: int = Field(
        500, ge=1, description="Steps between checkpoints; at the end the final model takes their place."
    )
    keep_checkpoints: int = Field(2, ge=1, description="How many checkpoints stay; older ones are deleted.")
    async_checkpoints: bool = Field(
        False,
        description="Go on training while a checkpoint is written. Its whole content, 12 bytes per trained parameter, "
        "is first copied to the memory of the first host.",
    )

    @model_validator(mode="after")
    def _compiles_something(self) -> RunConfig:
        if self.compile and self.gradient_checkpointing:
            raise ValueError("torch compiles nothing inside `gradient_checkpointing`; leave that or `compile` out")
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> RunConfig:
        trained = {name for name, part in self.resolved_parts.items() if part.train != "frozen"}
        if not trained:
            raise ValueError("`parts` freezes everything; set `train` of a part to `full` or `lora`")
        if self.lora.base_bits is not None and not self.has_adapters:
            raise ValueError("`lora.base_bits` is for a part with `train: lora`, and there is none; see `parts`")
        if self.data.cache_features and "vision_tower" in trained:
            raise ValueError(
                "`data.cache_features` keeps what a frozen vision tower gives, but `parts.vision_tower.train` is "
                f"`{self.resolved_parts['vision_tower'].train}`; set one to false or the other to `frozen`"
            )
        return self

    @property
    def has_adapters(self) -> bool:
        """Whether a part is trained by adapters."""
        return any(part.train == "lora" for part in self.resolved_parts.values())

    @property
    def resolved_parts(self) -> dict[PartName, Part]:
        """What each part does in this run, with nothing left open."""
        return resolve_parts(self.stage, self.parts, self.optimizer.learning_rate, self.optimizer.weight_decay)

    @property
    def output_path(self) -> Path:
        return Path(self.output).expanduser()
