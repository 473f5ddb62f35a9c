"""What other suites train on and the loss they report, by their own code; `peers.py` runs this with a suite's Python.

    PYTHON peer_adapters.py SUITE FOLDER OUTPUT MICRO_BATCH…

FOLDER holds what `peers.py` wrote. Ids and labels come from the suite's own loading code, loss and gradient norm from
one step of its own trainer, which divides the four samples into micro-batches. Settings are the suite's defaults but
for what the comparison needs: all samples in one step, in order, a learning rate that moves nothing, float32 on a CPU.
Nothing of `llava_npu` is imported: the suites' environments do not have it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "max_steps": 1,
    "logging_steps": 1,
    "learning_rate": 1e-9,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_num_workers": 0,
}

Samples = list[dict[str, list[int]]]
Steps = dict[int, dict[str, float]]


def main() -> None:
    suite, folder, output, *sizes = sys.argv[1:]
    samples, steps, packages = SUITES[suite](Path(folder), [int(size) for size in sizes])
    report = {"versions": versions(*packages, "transformers", "torch"), "samples": samples, "steps": steps}
    Path(output).write_text(json.dumps(report))


def versions(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}


def run_steps(
    folder: Path, suite: str, sizes: Sequence[int], step: Callable[[Path, int], list[dict[str, Any]]]
) -> Steps:
    """Loss and gradient norm of a step, by micro-batch.

    Args:
        step: makes one step into a folder with micro-batches of a size; returns what the suite logged.
    """
    found = {}
    for size in sizes:
        [line] = [line for line in step(folder / f"{suite}-{size}", size) if "loss" in line]
        found[size] = {"loss": float(line["loss"]), "grad_norm": float(line["grad_norm"])}
    return found


def batches(folder: Path, size: int) -> dict[str, int]:
    """All samples in one step."""
    samples = len(json.loads((folder / "messages.json").read_text()))
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": samples // size}


def llama_factory(folder: Path, sizes: Sequence[int]) -> tuple[Samples, Steps, list[str]]:
    """LLaMA-Factory: template `llava`, all of its defaults (tower and projector frozen)."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer
    from llamafactory.train.tuner import run_exp

    records = json.loads((folder / "messages.json").read_text())
    for record in records:
        record["messages"] = _with_marks(record, "<image>\n")
    (folder / "llama_factory.json").write_text(json.dumps(records))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    entry = {"file_name": "llama_factory.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"conversations": entry}))

    def arguments(output: Path, size: int) -> dict[str, Any]:
        return {
            **COMMON,
            **batches(folder, size),
            "model_name_or_path": str(folder / "model"),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "full",
            "dataset": "conversations",
            "dataset_dir": str(folder),
            "template": "llava",
            "output_dir": str(output),
            "disable_shuffling": True,
            "use_cpu": True,
        }

    def step(output: Path, size: int) -> list[dict[str, Any]]:
        run_exp(arguments(output, size))
        history: list[dict[str, Any]] = json.loads((output / "trainer_state.json").read_text())["log_history"]
        return history

    model, data, training, _, _ = get_train_args(arguments(folder / "unused", 1))
    tokenizers = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(tokenizers["tokenizer"], data)
    rows = get_dataset(template, model, data, training, stage="sft", **tokenizers)["train_dataset"]
    samples = [{"ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    return samples, run_steps(folder, "llama-factory", sizes, step), ["llamafactory"]


def ms_swift(folder: Path, sizes: Sequence[int]) -> tuple[Samples, Steps, list[str]]:
    """ms-swift: its template of llava-hf models, which writes the newline after an image itself."""
    from swift import get_processor, get_template, sft_main

    records = json.loads((folder / "messages.json").read_text())
    for record in records:
        record["messages"] = _with_marks(record, "<image>")
    path = folder / "ms_swift.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

    def step(output: Path, size: int) -> list[dict[str, Any]]:
        options = {
            **COMMON,
            **batches(folder, size),
            "model": str(folder / "model"),
            "model_type": "llava1_5_hf",
            "dataset": str(path),
            "tuner_type": "full",
            "torch_dtype": "float32",
            "dataset_shuffle": "false",
            "train_dataloader_shuffle": "false",
            "split_dataset_ratio": 0,
            "output_dir": str(output),
        }
        done = sft_main([text for name, value in options.items() for text in (f"--{name}", str(value))])
        history: list[dict[str, Any]] = done["log_history"]
        return history

    template = get_template(get_processor(str(folder / "model"), model_type="llava1_5_hf"))
    template.set_mode("train")
    rows = [template.encode(record) for record in records]
    samples = [{"ids": list(row["input_ids"]), "labels": list(row["labels"])} for row in rows]
    return samples, run_steps(folder, "ms-swift", sizes, step), ["ms-swift"]


def trl(folder: Path, sizes: Sequence[int], *, assistant_only: bool = False) -> tuple[Samples, Steps, list[str]]:
    """TRL: `SFTTrainer` on messages, with the processor's own chat template."""
    from datasets import Dataset, Features, Image, List, Value
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from trl import SFTConfig, SFTTrainer

    turn = {"role": Value("string"), "content": Value("string")}
    features = Features({"messages": List(turn), "images": List(Image())})
    data = Dataset.from_list(json.loads((folder / "messages.json").read_text()), features=features)

    def trainer(output: Path, size: int) -> Any:
        config = SFTConfig(
            output_dir=str(output),
            use_cpu=True,
            bf16=False,
            assistant_only_loss=assistant_only,
            **COMMON,
            **batches(folder, size),
        )
        return SFTTrainer(
            model=LlavaForConditionalGeneration.from_pretrained(folder / "model"),
            args=config,
            train_dataset=data,
            processing_class=AutoProcessor.from_pretrained(folder / "model"),
        )

    def step(output: Path, size: int) -> list[dict[str, Any]]:
        one = trainer(output, size)
        one.train()
        history: list[dict[str, Any]] = one.state.log_history
        return history

    one = trainer(folder / "unused", 1)
    samples = []
    for row in one.train_dataset:
        batch = one.data_collator([row])
        kept = batch["attention_mask"][0].bool()
        samples.append({"ids": batch["input_ids"][0][kept].tolist(), "labels": batch["labels"][0][kept].tolist()})
    return samples, run_steps(folder, f"trl-{assistant_only}", sizes, step), ["trl"]


def _with_marks(record: dict[str, Any], mark: str) -> list[dict[str, str]]:
    """The messages, with the mark of each image before the first question."""
    first, *others = record["messages"]
    return [{**first, "content": mark * len(record["images"]) + first["content"]}, *others]


SUITES: dict[str, Callable[[Path, Sequence[int]], tuple[Samples, Steps, list[str]]]] = {
    "llama-factory": llama_factory,
    "ms-swift": ms_swift,
    "trl": trl,
    "trl-assistant-only": lambda folder, sizes: trl(folder, sizes, assistant_only=True),
}

if __name__ == "__main__":
    main()
