"""The template that a model was trained with is the one that it is asked in, by every export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_npu import load
from llava_npu.config import RunConfig
from llava_npu.training import train
from llava_npu.training.checkpointing.export import export_checkpoint
from support.crashed_run import crash_after

MakeRun = Callable[..., RunConfig]
QUESTION = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_of_the_data(make_run: MakeRun, adapters: bool) -> None:
    parts: dict[str, Any] = {"parts": {"language_model": {"train": "lora"}}} if adapters else {}
    run = make_run(max_steps=1, data={"template": "llama_2"}, **parts)
    processor = load(train(run)).processor
    assert processor.template == "llama_2"
    assert "[INST]" in processor.apply_chat_template(QUESTION, add_generation_prompt=True)


def test_captions_leave_the_models_own(make_run: MakeRun) -> None:
    processor = load(train(make_run(stage="align", max_steps=1, data={"template": "plain"}))).processor
    assert processor.template not in ("plain", None)


def test_of_a_checkpoint(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(max_steps=2, save_every=1, data={"template": "llama_2"})
    crash_after(run, 2)
    export_checkpoint(run.output_path / "checkpoint-000001", tmp_path / "model")
    assert load(tmp_path / "model").processor.template == "llama_2"
