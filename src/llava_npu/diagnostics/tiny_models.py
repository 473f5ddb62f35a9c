"""Two small LLaVA models that between them have every kind of layer: random weights, made in a moment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig, LlamaConfig, SiglipVisionConfig

from llava_npu.models import LlavaNpuConfig, LlavaNpuForConditionalGeneration

IMAGE_TOKEN = 3
_VOCABULARY = 64
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


@dataclass(frozen=True)
class TinyModel:
    """A recipe: the same call gives the same weights, on any machine."""

    name: str
    config: LlavaNpuConfig

    def build(self) -> LlavaNpuForConditionalGeneration:
        """On the CPU, in float32, with transformers' plain attention."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlavaNpuForConditionalGeneration(self.config)
            with torch.no_grad():  # every layer shall shape the result: louder than at the start of training
                for parameter in model.parameters():
                    if parameter.ndim >= 2:
                        parameter.normal_(std=parameter[0].numel() ** -0.5)
        model.set_attn_implementation("eager")
        return model.eval()


def tiny_models() -> list[TinyModel]:
    return [
        TinyModel("CLIP, mlp2x_gelu, Llama", _config(CLIPVisionConfig(**_TOWER), "mlp2x_gelu", {})),
        TinyModel(
            "SigLIP, ldpv2, Llama",
            _config(SiglipVisionConfig(**_TOWER, vision_use_head=False), "ldpv2", {"num_queries": 4}),
        ),
    ]


def make_batch(config: LlavaNpuConfig) -> dict[str, torch.Tensor]:
    """Two samples of different length, padded on the right, an image in each; `labels` with −100 where unsupervised."""
    random = torch.Generator().manual_seed(1)
    rows = []
    for words in (9, 5):
        text = torch.randint(4, _VOCABULARY, (words,), generator=random)
        rows.append(torch.cat((text[:2], torch.full((config.num_image_tokens,), IMAGE_TOKEN), text[2:])))
    length = max(map(len, rows))
    input_ids = torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in rows])
    attention_mask = torch.stack([(torch.arange(length) < len(row)).long() for row in rows])
    answer = torch.arange(length) >= config.num_image_tokens + 3
    labels = torch.where(answer & attention_mask.bool(), input_ids, -100)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(len(rows), 3, *config.tower.image_size, generator=random),
        "labels": labels,
    }


def _config(
    vision: CLIPVisionConfig | SiglipVisionConfig, projector: str, options: dict[str, object]
) -> LlavaNpuConfig:
    text = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,  # grouped queries
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},  # not the default: it must not be lost
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    return LlavaNpuConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        projector_type=projector,
        projector_options=options,
    )
