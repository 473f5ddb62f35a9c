"""How much the demo does: `quick` to see that everything works, `default` to see it learn, `full` for a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from demo.data import Sizes


@dataclass(frozen=True)
class StageRecipe:
    """One stage of training.

    Attributes:
        steps, batch_size: how long.
        learning_rate: of the projector (`align`) or the language model (`finetune`).
        projector_learning_rate: in `finetune`.
        micro_batch_size: samples computed at once.
        gradient_checkpointing: recompute activations, for memory.
        precision: as in a run's configuration.
    """

    steps: int
    batch_size: int
    learning_rate: float
    projector_learning_rate: float | None = None
    micro_batch_size: int = 16
    gradient_checkpointing: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"


@dataclass(frozen=True)
class Profile:
    """A size of the demo.

    Attributes:
        name: the command-line option, without dashes.
        sizes: of the data.
        image_size: pixels that the vision tower sees.
        image_tokens: tokens of an image, a square number.
        align, finetune: the two stages.
        examples: pictures shown in the report.
    """

    name: str
    sizes: Sizes
    image_size: int
    image_tokens: int
    align: StageRecipe
    finetune: StageRecipe
    examples: int


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="quick",
            sizes=Sizes(held_out=16, train_pictures=320, train_shapes=32, shape_questions=4, conversations=32),
            image_size=160,
            image_tokens=4,
            align=StageRecipe(steps=20, batch_size=16, learning_rate=2e-3),
            finetune=StageRecipe(steps=4, batch_size=8, learning_rate=1e-4, projector_learning_rate=5e-4),
            examples=12,
        ),
        Profile(
            name="default",
            sizes=Sizes(held_out=160, train_pictures=2000, train_shapes=200, shape_questions=48, conversations=960),
            image_size=224,
            image_tokens=4,
            align=StageRecipe(steps=120, batch_size=32, learning_rate=2e-3),
            finetune=StageRecipe(
                steps=48,
                batch_size=16,
                learning_rate=1e-4,
                projector_learning_rate=5e-4,
                micro_batch_size=4,
                gradient_checkpointing=True,
                precision="fp32",  # without 16-bit copies of the weights next to them, and the same on every CPU
            ),
            examples=24,
        ),
        Profile(
            name="full",
            sizes=Sizes(held_out=200, train_pictures=5000, train_shapes=2000, shape_questions=200, conversations=24000),
            image_size=448,
            image_tokens=49,
            align=StageRecipe(steps=2000, batch_size=64, learning_rate=1e-3, micro_batch_size=64),
            finetune=StageRecipe(
                steps=1500, batch_size=32, learning_rate=1e-4, projector_learning_rate=2e-4, micro_batch_size=32
            ),
            examples=40,
        ),
    )
}
