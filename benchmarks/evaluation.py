"""Answering a benchmark, against the original's loop, in one run with one model.

    python benchmarks/evaluation.py [--device auto] [--size debug|7b] [--images 8] [--batch-size 16]
                                    [--new-tokens 4] [--rounds 3] [--only KIND]

The original's loop (LLaVA's model_vqa_loader.py and model_vqa_mmbench.py): one question at a time, its image decoded,
preprocessed and encoded, its whole prompt read, its answer generated with a key-value cache. Ours is what
`llava-npu eval` does. Both are greedy, run the same model with random weights and must give the same answers, or the
benchmark fails (in 16 bits it counts how many differ). They alternate, so that a machine that slows down slows both;
processor time, given next to the elapsed time, says what a CPU shared with others would have taken alone.

Four kinds of benchmarks:
    rotations       multiple choice with four rotations of each question about an image, as MMBench
    six an image   six yes-or-no questions about an image, as POPE (MME has two)
    one an image   nothing to share: what batches alone bring
    long answers    the same, and each answer eight times as long, as in MM-Vet or LLaVA-Bench

Also measured, where there are options: choosing the likeliest option instead of writing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from llava_npu import devices
from llava_npu.data.image_sources import LoadedImage
from llava_npu.evaluation.answering import ModelAnswerer, build_answerer
from llava_npu.evaluation.extraction.choices import ENGLISH, build_prompt
from llava_npu.evaluation.formats.llava_files import with_instruction
from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.run import order_questions
from llava_npu.models import LlavaNpuConfig, LlavaNpuForConditionalGeneration
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.processing import LlavaNpuProcessor
from llava_npu.ops.fuse import install_kernels

# Depth and width of tower and language model; images of 336 pixels make 576 tokens, as in LLaVA-1.5.
SIZES = {"debug": ((6, 256), (6, 512)), "7b": ((24, 1024), (32, 4096))}
VOCABULARY = 32000
WORDS = """
the a cat dog bird table window red green blue small large behind before above left right of in on with person holding
walking sitting street house tree car bicycle sign letter number what which how many is are there color
""".split()  # noqa: SIM905 - a list of words reads better than as many quoted ones


def main() -> None:
    options = parse_arguments()
    device = devices.select(options.device)
    dtype = device.autocast_dtype or torch.float32
    if options.dtype:
        dtype = getattr(torch, options.dtype)
    loaded = build_model(options.size, device, dtype)
    model, processor = loaded
    print(
        f"{device.name}, {torch.get_num_threads()} threads: size {options.size}, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M weights, {processor.num_image_tokens} tokens an "
        f"image, {str(dtype).removeprefix('torch.')}; {options.new_tokens} new tokens, batches of {options.batch_size}"
    )
    kinds = {
        "rotations": (rotations, options.new_tokens),
        "six an image": (six_questions, options.new_tokens),
        "one an image": (one_question, options.new_tokens),
        "long answers": (one_question, 8 * options.new_tokens),
    }
    for name in options.only or kinds:
        make, new_tokens = kinds[name]
        questions = make(options.images)
        ways: dict[str, Callable[[], list[str]]] = {
            "original's loop": partial(one_by_one, loaded, questions, new_tokens),
            "ours": partial(in_batches, loaded, questions, new_tokens, options.batch_size, "generate"),
        }
        if questions[0].options:
            ways["ours, likeliest letter"] = partial(
                in_batches, loaded, questions, new_tokens, options.batch_size, "likelihood-letter"
            )
        compare(name, questions, ways, device, options.rounds, exact=dtype == torch.float32)


def compare(
    name: str,
    questions: Sequence[Question],
    ways: dict[str, Callable[[], list[str]]],
    device: devices.Device,
    rounds: int,
    exact: bool,
) -> None:
    """Prints the time of each way and its ratio to the first."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    processor_seconds: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, list[str]] = {}
    for number in range(rounds + 1):
        for way, run in ways.items():
            device.synchronize()
            started, busy = time.perf_counter(), time.process_time()
            answers[way] = run()
            device.synchronize()
            if number:  # the first warms up
                seconds[way].append(time.perf_counter() - started)
                processor_seconds[way].append(time.process_time() - busy)
    first, second = list(ways)[:2]
    different = sum(a != b for a, b in zip(answers[first], answers[second], strict=True))
    if exact and different:
        raise SystemExit(f"{name}: {different} of {len(questions)} answers differ")
    print(f"{name}: {len(questions)} questions, {different} answers differ")
    for way in ways:
        wall, busy = statistics.median(seconds[way]), statistics.median(processor_seconds[way])
        times = statistics.median(seconds[first]) / wall, statistics.median(processor_seconds[first]) / busy
        print(
            f"  {way:<24}{wall:7.2f} s ({min(seconds[way]):.2f}–{max(seconds[way]):.2f}), {times[0]:5.2f}×; "
            f"processor time {busy:7.2f} s, {times[1]:5.2f}×; {1e3 * wall / len(questions):7.1f} ms a question",
            flush=True,
        )


def one_by_one(
    loaded: LoadedModel,
    questions: Sequence[Question],
    new_tokens: int,
) -> list[str]:
    """The original's loop."""
    model, processor = loaded
    answers = []
    for question in questions:
        turns = [{"from": "human", "value": f"<image>\n{question.prompt}"}]
        inputs = processor.encode_prompts([turns], [[image.open() for image in question.images]]).to(model.device)
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=new_tokens, pad_token_id=processor.tokenizer.pad_token_id
        )
        text = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(text.strip())
    return answers


def in_batches(
    loaded: LoadedModel,
    questions: Sequence[Question],
    new_tokens: int,
    batch_size: int,
    mode: str,
) -> list[str]:
    """What `llava-npu eval` does, files aside."""
    answerer: ModelAnswerer = build_answerer(mode, loaded, max_new_tokens=new_tokens)
    ordered = list(chain.from_iterable(order_questions(questions)))
    found = {}
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        found.update(zip((question.id for question in batch), answerer.answer(batch), strict=True))
    return [found[question.id].text for question in questions]


# --- questions --------------------------------------------------------------------------------------------------------


def rotations(images: int) -> list[Question]:
    draw = random.Random(0)
    questions = []
    for number in range(images):
        text, texts = sentence(draw, 12), [sentence(draw, draw.randrange(1, 6)) for _ in range(4)]
        for rotation in range(4):
            turned = dict(zip("ABCD", texts[rotation:] + texts[:rotation], strict=True))
            prompt = build_prompt(text, turned, ENGLISH)
            name = f"{number}-{rotation}"
            questions.append(Question(name, text, prompt, (image(number),), turned, group=str(number)))
    return questions


def six_questions(images: int) -> list[Question]:
    return short_questions(images, 6)


def one_question(images: int) -> list[Question]:
    return short_questions(4 * images, 1)


def short_questions(images: int, each: int) -> list[Question]:
    draw = random.Random(1)
    texts = [(number, sentence(draw, draw.randrange(5, 14))) for number in range(images) for _ in range(each)]
    return [
        Question(str(place), text, with_instruction(text), (image(number),), group=str(number))
        for place, (number, text) in enumerate(texts)
    ]


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words)) + "?"


def image(number: int) -> LoadedImage:
    pixels = random.Random(number).randbytes(3 * 48 * 64)
    return LoadedImage(str(number), Image.frombytes("RGB", (64, 48), pixels).resize((640, 480)))


# --- the model --------------------------------------------------------------------------------------------------------


def build_model(size: str, device: devices.Device, dtype: torch.dtype) -> LoadedModel:
    (tower_layers, tower_width), (layers, width) = SIZES[size]
    tokenizer = build_tokenizer()
    config = LlavaNpuConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=tower_width,
            intermediate_size=4 * tower_width,
            num_hidden_layers=tower_layers,
            num_attention_heads=tower_width // 64,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 43 // 16,
            num_hidden_layers=layers,
            num_attention_heads=width // 64 if size == "debug" else width // 128,
            eos_token_id=None,  # all answers are equally long
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projector_type="mlp2x_gelu",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device.torch_device:
        model = LlavaNpuForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():  # decided answers: near-ties between tokens would make the comparison a coin toss
        model.lm_head.weight.mul_(20)
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(8)
    install_kernels(model, device.torch_device)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    return LoadedModel(model, LlavaNpuProcessor.for_config(config, image_processor, tokenizer, template="v1"))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which about every word is a token, filled up to Llama's number of tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<pad>", "<image>"],
        show_progress=False,
    )
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    system += "detailed, and polite answers to the user's questions. USER: ASSISTANT: " + with_instruction(ENGLISH)
    inner.train_from_iterator([system, " ".join(WORDS), " A B C D"] * 4, trainer)
    state = json.loads(inner.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary.update({f"<{number}>": number for number in range(len(vocabulary), VOCABULARY)})
    inner = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", choices=list(SIZES), default="debug")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16, help="of ours")
    parser.add_argument("--new-tokens", type=int, default=4, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    kinds = ["rotations", "six an image", "one an image", "long answers"]
    parser.add_argument("--only", action="append", choices=kinds, help="may be given several times; by default all")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="by default the device's best")
    return parser.parse_args()


if __name__ == "__main__":
    main()
