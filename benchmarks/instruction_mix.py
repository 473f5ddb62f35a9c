"""Samples whose lengths are like those of LLaVA's data, with random tokens and pixels.

The shares are those of the sources of llava_v1_5_mix665k (Liu et al. 2023, arXiv:2310.03744, table 7). The tokens per
sample are estimates by the form of each source (so many rounds of so long questions and answers), drawn log-normally;
together they give about 760 tokens per sample, 576 of an image included, of which about one in seven is supervised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llava_npu.data.conversation.labels import IGNORE_INDEX
from llava_npu.data.dataset import Sample


@dataclass(frozen=True)
class Source:
    """A part of the mix: its share, images per sample, and mean tokens that are read and that are learned from."""

    name: str
    share: float
    images: int
    read: int
    learned: int
    spread: float = 0.5  # of the logarithm


INSTRUCTIONS = (
    Source("LLaVA conversations", 56, 1, 90, 150),
    Source("LLaVA descriptions", 23, 1, 50, 120, 0.3),
    Source("LLaVA reasoning", 77, 1, 70, 180, 0.3),
    Source("ShareGPT, text alone", 40, 0, 300, 850, 0.9),
    Source("VQAv2", 83, 1, 110, 20),
    Source("GQA", 72, 1, 200, 40),
    Source("OKVQA", 9, 1, 70, 8),
    Source("OCR-VQA", 80, 1, 90, 35),
    Source("A-OKVQA", 66, 1, 100, 4, 0.2),
    Source("TextCaps", 22, 1, 80, 14, 0.3),
    Source("RefCOCO", 48, 1, 150, 130),
    Source("Visual Genome", 86, 1, 150, 110),
)
CAPTIONS = (Source("captions", 1, 1, 1, 22, 0.5),)
MAX_LENGTH = 2048
PUBLISHED_IMAGE_TOKENS = 576


def draw_samples(
    sources: tuple[Source, ...],
    count: int,
    *,
    vocabulary: int,
    image_token: int,
    image_tokens: int,
    image_size: tuple[int, int],
    seed: int = 0,
) -> list[Sample]:
    """Samples of a mix; where an image has other than 576 tokens, texts are as much shorter or longer.

    Tokens 0 to 9 do not occur.
    """
    random = torch.Generator().manual_seed(seed)
    scale = image_tokens / PUBLISHED_IMAGE_TOKENS
    shares = torch.tensor([source.share for source in sources])
    chosen = torch.multinomial(shares.float(), count, replacement=True, generator=random).tolist()
    return [
        _sample(sources[which], number, scale, vocabulary, image_token, image_tokens, image_size, random)
        for number, which in enumerate(chosen)
    ]


def _sample(
    source: Source,
    number: int,
    scale: float,
    vocabulary: int,
    image_token: int,
    image_tokens: int,
    image_size: tuple[int, int],
    random: torch.Generator,
) -> Sample:
    stretch = torch.exp(source.spread * torch.randn((), generator=random) - source.spread**2 / 2).item() * scale
    read, learned = max(1, round(source.read * stretch)), max(1, round(source.learned * stretch))
    limit = round(MAX_LENGTH * scale) - source.images * image_tokens
    read = min(read, limit - 1)
    learned = min(learned, limit - read)
    words = torch.randint(10, vocabulary, (read + learned,), generator=random)
    words[words == image_token] = 10
    images = torch.full((source.images * image_tokens,), image_token)
    return Sample(
        input_ids=torch.cat([words[:1], images, words[1:]]),
        labels=torch.cat([torch.full((read + len(images),), IGNORE_INDEX), words[read:]]),
        pixel_values=torch.randn(source.images, 3, *image_size, generator=random) if source.images else None,
        vision_features=None,
        name=f"{source.name} {number}",
    )
