"""What vLLM does with the exports of each projector (docs/serving.md); `make test-vllm` holds every row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EXPORTS = ("save_pretrained", "train", "merge", "convert")


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        projector, tower: of the model; towers are `clip`, `siglip`, `dinov2` and `resnet`.
        options: the projector's, for a tower of 4 layers and 8×8 patches.
        plain: whether vLLM needs no plug-in.
        refusal: what the plug-in says that vLLM cannot do (a regular expression); None: it can.
        sees: whether an untrained model's answers to several images differ, without which equal answers say little.
    """

    projector: str
    tower: str = "clip"
    options: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    refusal: str | None = None
    sees: bool = True

    @property
    def name(self) -> str:
        return f"{self.projector}, {self.tower}"


ROWS = (
    Row("mlp2x_gelu", plain=True),
    Row("mlp2x_gelu", "siglip", plain=True),
    Row("mlp2x_gelu", "dinov2", refusal="a vision tower of type 'dinov2'"),
    Row("mlp3x_gelu"),
    Row("linear"),
    Row("adaptive_pool", options={"num_queries": 16}),
    Row("adaptive_pool", "siglip", {"num_queries": 16}),
    Row("adaptive_pool", "resnet", {"num_queries": 4}, refusal="a vision tower of type 'resnet'"),
    Row("pixel_shuffle"),
    Row("patch_merger"),
    Row("ldp"),
    Row("ldpv2", options={"num_queries": 16}),
    Row("resampler", options={"num_queries": 16}),
    Row("c_abstractor", options={"hidden_size": 64, "num_queries": 16, "num_input_tokens": 64}),
    Row("qformer", options={"num_queries": 8, "hidden_size": 64, "num_layers": 2, "num_heads": 4}),
    Row("mqt", options={"num_queries": 16, "num_heads": 4}),
    Row("matryoshka_pool", options={"tokens": 16}),
    Row(
        "d_abstractor",  # its learned queries outweigh what they read, until it is trained
        options={"hidden_size": 64, "num_queries": 16, "num_input_tokens": 64, "num_layers": 2},
        sees=False,
    ),
    Row("sva", options={"num_queries": 64, "hidden_size": 64, "num_layers": 1, "num_heads": 4}),
    Row("tokenpacker", options={"region_layers": (1, 2)}, refusal="'tokenpacker' takes 3 layers"),
    Row("dense_sti", options={"layers": (1, 2)}, refusal="'dense_sti' takes 3 layers"),
    Row("dense_sci", options={"layers": (1, 2)}, refusal="'dense_sci' takes 3 layers"),
    Row("dense_dci", options={"groups": (2, 4)}, refusal=r"'dense_dci' takes \d layers"),
)


def table() -> str:
    """As in docs/serving.md."""
    lines = [
        "| projector, tower | vLLM has it from | opens in vLLM | same ids | same answers |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        source = "–" if row.refusal else "vLLM itself" if row.plain else "the plug-in"
        yes = "refused" if row.refusal else "yes"
        lines.append(f"| `{row.projector}`, {row.tower} | {source} | {' | '.join([yes] * 3)} |")
    return "\n".join(lines)
