"""What training suites make of the same conversations: token ids, what is trained, and the mean behind the loss.

    python benchmarks/peers.py --suite trl=/envs/trl/bin/python --suite llama-factory=/envs/llama-factory/bin/python \\
                               --suite ms-swift=/envs/ms-swift/bin/python

Four conversations and a tiny LLaVA in the layout of the hub's llava-hf models (Llama's vocabulary, random weights, the
chat template written as theirs) go through each suite's own loading code and one step of its own trainer, at
micro-batches of 1, 2 and 4 samples. Each suite runs in an environment of its own (`peer_adapters.py` says what it
calls); without `--suite`, this project alone runs.

Printed: the text of one conversation, with what is trained between ⟦ and ⟧; how each suite's ids and labels compare;
and the loss and the gradient norm of the step by micro-batch, next to the mean over all trained tokens and the mean of
the samples' means, which plain transformers computes from the same ids and labels. A loss that is the mean over tokens
cannot depend on how samples are divided. `docs/peers.md` has the result.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

import llava_npu
from llava_npu.config import RunConfig
from llava_npu.data.conversation.labels import IGNORE_INDEX
from llava_npu.data.dataset import ConversationDataset
from llava_npu.data.records import load_records
from llava_npu.training import train
from peer_adapters import run_steps, versions

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("llama-factory", "ms-swift", "trl", "trl-assistant-only")
MICRO_BATCHES = (1, 2, 4)
OURS = "llava-npu"
SIDE = 28
# As those of llava-hf models: no system prompt, no begin-of-sequence or end token, a space after each text.
CHAT_TEMPLATE = (
    "{%- for turn in messages -%}{{ turn.role.upper() + ': ' }}"
    "{%- for part in turn.content if part.type == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in turn.content if part.type == 'text' -%}{%- if turn.role == 'assistant' -%}"
    "{%- generation -%}{{ part.text + ' ' }}{%- endgeneration -%}{%- else -%}{{ part.text + ' ' }}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
# (shade of the image or None, questions and answers)
CONVERSATIONS: tuple[tuple[int | None, tuple[str, ...]], ...] = (
    (40, ("What is in the image?", "A cat.")),
    (90, ("Which animal is this?", "A dog.", "And what does it do?", "It sleeps on the sofa, next to a red ball.")),
    (None, ("Name three rivers.", "The Nile, the Amazon and the Yangtze.")),
    (
        200,
        (
            "Describe the image.",
            "A wide, bright street in the early morning: shops on both sides, two bicycles, and nobody to be seen.",
        ),
    ),
)


@dataclass(frozen=True)
class Report:
    """What one suite did.

    Args:
        versions: of the suite and what it rests on.
        samples: ids and labels of each conversation, in order.
        steps: loss and gradient norm by the samples of a micro-batch.
    """

    versions: dict[str, str]
    samples: list[dict[str, list[int]]]
    steps: dict[int, dict[str, float]]


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = write_material(folder)
        reports = {OURS: ours(folder)}
        for suite, python in options.suite:
            reports[suite] = run_suite(suite, python, folder)
        model = LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32).eval()
        means = {suite: expected_losses(model, report) for suite, report in reports.items()}
    print_versions(reports)
    print_texts(reports, tokenizer)
    print_tokens(reports, tokenizer)
    print_losses(reports, means)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suite",
        action="append",
        default=[],
        type=_suite,
        metavar="NAME=PYTHON",
        help=f"a suite ({', '.join(SUITES)}) and the Python of its environment; several times",
    )
    return parser.parse_args()


def _suite(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if name not in SUITES or not python:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PYTHON with a name of {', '.join(SUITES)}")
    return name, python


def write_material(folder: Path) -> PreTrainedTokenizerBase:
    """The model, the images, and the conversations in the form of each suite."""
    tokenizer = write_model(folder / "model")
    llava, messages = [], []
    for number, (shade, texts) in enumerate(CONVERSATIONS):
        images = []
        if shade is not None:
            images = [str(folder / f"{number}.png")]
            image(shade).save(images[0])
        turns = [f"<image>\n{texts[0]}" if images else texts[0], *texts[1:]]
        llava.append(
            {
                "id": str(number),
                **({"image": f"{number}.png"} if images else {}),
                "conversations": [
                    {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)
                ],
            }
        )
        roles = ("user", "assistant")
        messages.append(
            {
                "messages": [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)],
                "images": images,
            }
        )
    (folder / "llava.json").write_text(json.dumps(llava))
    (folder / "messages.json").write_text(json.dumps(messages))
    return tokenizer


def write_model(folder: Path) -> PreTrainedTokenizerBase:
    """A tiny LLaVA as transformers itself saves one, with Llama's vocabulary."""
    folder.mkdir()
    shutil.copy(ROOT / "tests/golden/llama_tokenizer.model", folder / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=False, add_bos_token=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.model_max_length = 2048
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    crop = {"height": SIDE, "width": SIDE}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=SIDE,
                patch_size=14,
            ),
            text_config=LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                vocab_size=32064,
                max_position_embeddings=2048,
                initializer_range=0.2,  # so that tokens have very different losses
                pad_token_id=tokenizer.pad_token_id,
            ),
            image_token_id=image_token,
            image_seq_length=(SIDE // 14) ** 2,
        )
    ).save_pretrained(folder)
    return tokenizer


def ours(folder: Path) -> Report:
    """This project: what its data set gives, and one step of its trainer."""
    data = {"path": str(folder / "llava.json"), "template": "v1", "workers": 0}

    def step(output: Path, size: int) -> list[dict[str, Any]]:
        values = {
            "output": str(output),
            "stage": "finetune",
            "model": {"checkpoint": str(folder / "model")},
            "data": data,
            "optimizer": {"learning_rate": 1e-9},
            "batch_size": len(CONVERSATIONS),
            "micro_batch_size": size,
            "max_steps": 1,
            "device": "cpu",
            "precision": "fp32",
        }
        train(RunConfig.model_validate(values))
        return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]

    processor = llava_npu.load(str(folder / "model"), "cpu").processor
    records = ConversationDataset(load_records(data["path"]), processor, template="v1")
    samples = [{"ids": each.input_ids.tolist(), "labels": each.labels.tolist()} for each in records]
    return Report(versions("llava-npu", "transformers", "torch"), samples, run_steps(folder, OURS, MICRO_BATCHES, step))


def run_suite(suite: str, python: str, folder: Path) -> Report:
    """What `peer_adapters.py` reports from the suite's environment."""
    output = folder / f"{suite}.json"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "hub")}
    script = Path(__file__).with_name("peer_adapters.py")
    done = subprocess.run(
        [python, str(script), suite, str(folder), str(output), *map(str, MICRO_BATCHES)],
        env=environment | offline,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{suite}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    values = json.loads(output.read_text())
    return Report(values["versions"], values["samples"], {int(size): step for size, step in values["steps"].items()})


@torch.no_grad()
def expected_losses(model: LlavaForConditionalGeneration, report: Report) -> tuple[float, float]:
    """Mean over trained tokens, and mean of the samples' means, that plain transformers computes from a suite's ids."""
    sums, counts = [], []
    for (shade, _), sample in zip(CONVERSATIONS, report.samples, strict=True):
        ids, labels = torch.tensor([sample["ids"]]), torch.tensor(sample["labels"])
        pixels = None if shade is None else preprocess(shade)
        logits = model(input_ids=ids, pixel_values=pixels).logits[0, :-1]
        sums.append(float(functional.cross_entropy(logits, labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")))
        counts.append(int((labels[1:] != IGNORE_INDEX).sum()))
    samples = [total / count for total, count in zip(sums, counts, strict=True)]
    return sum(sums) / sum(counts), sum(samples) / len(samples)


def preprocess(shade: int) -> torch.Tensor:
    crop = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop)
    pixels: torch.Tensor = processor(image(shade), return_tensors="pt")["pixel_values"]
    return pixels


def image(shade: int) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (shade, 255 - shade, 128))


def print_versions(reports: dict[str, Report]) -> None:
    for suite, report in reports.items():
        print(f"{suite}: " + ", ".join(f"{name} {version}" for name, version in report.versions.items()))


def print_texts(reports: dict[str, Report], tokenizer: PreTrainedTokenizerBase) -> None:
    for number in (1, 2):
        print(f"\nConversation {number}, what is trained between ⟦ and ⟧:")
        for suite, report in reports.items():
            print(f"{suite:>18}: {marked(report.samples[number], tokenizer)}")


def marked(sample: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The decoded text; runs of image tokens as `<image>×N`."""
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    text = ""
    pairs = zip(sample["ids"], sample["labels"], strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        words = ""
        for is_image, part in groupby((token for token, _ in run), key=lambda token: token == image_token):
            tokens = list(part)
            words += f"<image>×{len(tokens)}" if is_image else decode(tokens, tokenizer)
        text += f"⟦{words}⟧" if trained else words
    return text.replace("\n", "\\n")


def decode(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens from inside a longer text: a leading space stays."""
    pieces = tokenizer.convert_ids_to_tokens(list(tokens))
    return "".join("\n" if piece == "<0x0A>" else piece.replace("▁", " ") for piece in pieces)


def print_tokens(reports: dict[str, Report], tokenizer: PreTrainedTokenizerBase) -> None:
    print(
        "\n| suite | BOS | system prompt | end tokens trained | image tokens trained | ids as ours | labels as ours |"
    )
    print(f"|---|{'---|' * 6}")
    mine = reports[OURS].samples
    for suite, report in reports.items():
        cells = [
            begins_with_bos(report, tokenizer),
            has_system_prompt(report, tokenizer),
            trained_ends(report, tokenizer),
            trained_images(report, tokenizer),
            *(
                f"{sum(a[key] == b[key] for a, b in zip(mine, report.samples, strict=True))} of {len(mine)}"
                for key in ("ids", "labels")
            ),
        ]
        print(f"| {suite} | {' | '.join(cells)} |")


def begins_with_bos(report: Report, tokenizer: PreTrainedTokenizerBase) -> str:
    return yes(all(each["ids"][0] == tokenizer.bos_token_id for each in report.samples))


def has_system_prompt(report: Report, tokenizer: PreTrainedTokenizerBase) -> str:
    openings = [decode(each["ids"], tokenizer).partition("USER:")[0] for each in report.samples]
    return yes(all(opening.replace("<s>", "").strip() for opening in openings))


def trained_ends(report: Report, tokenizer: PreTrainedTokenizerBase) -> str:
    trained = sum(each["labels"].count(tokenizer.eos_token_id) for each in report.samples)
    return f"{trained} of {sum(len(texts) // 2 for _, texts in CONVERSATIONS)}"


def trained_images(report: Report, tokenizer: PreTrainedTokenizerBase) -> str:
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    return yes(any(image_token in each["labels"] for each in report.samples))


def yes(value: bool) -> str:
    return "yes" if value else "no"


def print_losses(reports: dict[str, Report], means: dict[str, tuple[float, float]]) -> None:
    by_size = " | ".join(f"loss, {size}" for size in MICRO_BATCHES)
    print(f"\n| suite | mean over tokens | mean of samples' means | {by_size} |")
    print(f"|---|{'---:|' * (2 + len(MICRO_BATCHES))}")
    for suite, report in reports.items():
        values = [*means[suite], *(report.steps[size]["loss"] for size in MICRO_BATCHES)]
        print(f"| {suite} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    print("\n| suite | " + " | ".join(f"gradient norm, {size}" for size in MICRO_BATCHES) + " |")
    print(f"|---|{'---:|' * len(MICRO_BATCHES)}")
    for suite, report in reports.items():
        print(f"| {suite} | " + " | ".join(f"{report.steps[size]['grad_norm']:.4f}" for size in MICRO_BATCHES) + " |")


if __name__ == "__main__":
    main()
