"""Results of trials that nobody has run, and a small comparison that can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_npu.comparison.results import BenchmarkResult, Estimate, Result, SampleOutput, StageResult
from support import tiny

QUESTIONS = 6


def result(projector: str, tokens: int, score: float, milliseconds: float = 100.0, encoder: str = "CLIP") -> Result:
    """A finished trial with these numbers."""
    return Result(
        encoder=encoder,
        projector=projector,
        varied={},
        seed=0,
        visual_tokens=tokens,
        parameters={"vision_tower": 300_000_000, "projector": 21_000_000, "language_model": 7_000_000_000},
        flops={"vision_tower": 350 * 10**9, "projector": 24 * 10**9, "language_model": tokens * 13 * 10**9},
        stages={"align": StageResult(100, 2.25, 5000.0, 12.5, 31 * 10**9)},
        held_out_loss=Estimate(2.5, 2.4, 2.6, 160),
        benchmarks=(
            BenchmarkResult("MMBench", "circular, strict", Estimate(score, score - 0.05, score + 0.05, 160), 0.25, ""),
        ),
        first_token=Estimate(milliseconds, milliseconds - 5, milliseconds + 5, 9),
        inference_memory=15 * 10**9,
        outputs=(SampleOutput("1", "a cat", True, "a cat <on> a sofa"),),
        device="Some device",
        dtype="bfloat16",
        versions={"torch": "2"},
        runs={"align": {"seed": 0}},
    )


def write_material(folder: Path) -> Path:
    """Tiny weights, captions and a benchmark, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_language_model(folder / "lm")
    tiny.write_clip(folder / "clip")
    tiny.write_siglip(folder / "siglip")
    tiny.write_captions(folder)
    write_benchmark(folder)
    return folder


def write_benchmark(folder: Path) -> Path:
    """Questions about the captions' own images: what colour a square has."""
    rows = ["index\tquestion\tA\tB\tC\tanswer\timage_path"]
    for number in range(QUESTIONS):
        answer = "ABC"[number % 3]  # of tiny.COLOURS
        rows.append(
            f"{number}\tWhat is it?\ta red square\ta green square\ta blue square\t{answer}\timages/{number}.png"
        )
    path = folder / "questions.tsv"
    path.write_text("\n".join(rows) + "\n")
    return path


def values(material: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A comparison's configuration."""
    return {
        "output": str(output),
        "language_model": str(material / "lm"),
        "encoders": [str(material / "clip")],
        "projectors": ["mlp2x_gelu"],
        "align": {
            "data": {"path": str(material / "captions.json"), "workers": 0},
            "batch_size": 8,
            "micro_batch_size": 8,
            "max_steps": 2,
        },
        "benchmarks": [
            {
                "name": "multiple_choice",
                "data": str(material / "questions.tsv"),
                "answer": "likelihood",
                "batch_size": 6,
            }
        ],
        "held_out": str(material / "captions.json"),
        "examples": 2,
        **changes,
    }
