"""What there is to evaluate on, from the registrations: docs/evaluation.md (`make docs`), `llava-npu eval --list`."""

from __future__ import annotations

from collections.abc import Iterable

from llava_npu.evaluation.benchmarks import Benchmark, available

_HEAD = """# Evaluation

    llava-npu eval BENCHMARK[,BENCHMARK…] --model DIR --data PATH --output DIR

`PATH` is the benchmark's question file, or a folder in which it has one of the names below; what belongs to it
(annotations, images) is looked for next to it. Several benchmarks want a folder, and write to a folder each below
`--output`. An interrupted run resumes when the same command is given again; not with another model, other settings or
other data, images next to the question file included. (Of these, size, beginning and end are compared, not place or
date.) Questions whose images could not be read are asked again once the files have changed.

Data is not downloaded: each benchmark's publishers say who may use it and how. LLaVA's question files are in the
`eval.zip` that its [docs/Evaluation.md](https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md) links to;
VLMEvalKit's tables (`.tsv`) are those that it downloads itself. Their MD5 sums are checked and reported.

The image comes first in every prompt, on a line of its own. Generation is greedy with one beam. Every answer is read
by several rules, and all their scores are reported: *strict* is ours, the others are those of published scores.
Images that cannot be read count as wrong answers and are reported. Intervals are 95 % bootstrap intervals over groups
(rotations of a question, questions about one image).

`--output` gets `predictions.jsonl` (prompt, answer, readings, time of every question), `report.json`, `report.md`,
`scores.csv`, `differences.csv` (answers that the rules read differently; `--differences` prints them), `report.html`
(every question with its image, options and answer, to be filtered by category, right and wrong, and words; one file
that loads nothing), `samples.json` (what the scores were computed from) and, where a benchmark has a server or a tool
of its own, its files under `submission/`.

The same from Python:

```python
import llava_npu

model = llava_npu.load("runs/finetune", "cuda")
answerer = llava_npu.build_answerer("generate", model, max_new_tokens=1024)
report = llava_npu.evaluate("mmbench", "mmbench_dev_en.tsv", answerer, "runs/finetune-mmbench")
report.overall("circular", "vlmevalkit", split="dev").value
```

## Comparing models

    llava-npu report RUN RUN… [--output DIR]

puts finished runs side by side, several benchmarks at once if the folders hold several, and tests each against the
first on the same questions: the difference with its 95 % interval and p value by a paired bootstrap over groups, and
McNemar's exact test where a score is a share of right answers. `--output` gets the same as `comparison.md`, `.csv`,
`.json`, and as `comparison.html`, in which one can look at what one model got right and another wrong. That page alone
needs the benchmark's data; all else is in the runs' folders.

## Speed

Questions about the same image are answered in one batch, longest first. An image's features are computed once for
all of them, and so are the keys and values of what their prompts begin with: the system text, the image, and for the
rotations of one question the question itself. `--answer likelihood` scores all options in one pass instead of writing.
`--devices N` (or `torchrun --nproc-per-node N -m llava_npu eval …`, also over several machines that share `--output`)
spreads the questions over N devices. All this changes no answer beyond rounding, so an interrupted run may go on with
another number of devices, or batch size. [performance.md](performance.md) has measurements.

## Other suites: lmms-eval

[lmms-eval](https://github.com/EvolvingLMMs-Lab/lmms-eval) finds our models by itself where both are installed, and so
its tasks run on every device that this project knows:

    python -m lmms_eval --model llava_npu --model_args pretrained=runs/finetune --tasks mmbench_en_dev --batch_size 16

Images come first in a prompt, decoding is greedy, batches are answered as above. Tested with release 0.7.3 and two
local tasks, one that generates and one that compares likelihoods (for which lmms-eval wants `--force_simple`); the
answers are those of `llava-npu eval`. Not there: videos, sounds, and several rounds.

## A judge

Any endpoint that speaks OpenAI's chat protocol can be the judge: `--judge-url http://host:8000/v1 --judge-model NAME`,
or `LLAVA_NPU_JUDGE_URL` and `LLAVA_NPU_JUDGE_MODEL`. The key is read from `LLAVA_NPU_JUDGE_KEY` (for OpenAI itself also
from `OPENAI_API_KEY`) and never stored. Failed requests are repeated, waiting longer each time; replies are kept in
`$LLAVA_NPU_CACHE/judge` and in `judgements.jsonl`. With `LLAVA_NPU_JUDGE_PRICES=2.5,10` (for a million tokens read and
written) the report says what it cost. Replies that cannot be read are counted and reported; nothing is guessed. A judge
that is down is given up soon: it then gives no score, and the same command asks for what is missing. Benchmarks
that are scored here need no judge.

This page is generated from the benchmarks' registrations by `make docs`; `llava-npu eval --list` prints the same.
"""


def reference() -> str:
    """The page, as Markdown."""
    benchmarks = available()
    index = ["## Benchmarks", "", "| name | benchmark | scored |", "|---|---|---|"]
    index += [
        f"| [`{name}`](#{name}) | {benchmark.title} | {', '.join(benchmark.description.scored)} |"
        for name, benchmark in benchmarks.items()
    ]
    return "\n".join([_HEAD, *index, "", *(line for each in benchmarks.values() for line in _section(each))])


def _section(benchmark: Benchmark) -> Iterable[str]:
    yield f"### {benchmark.name}"
    yield ""
    yield f"**{benchmark.title}**"
    yield ""
    for name, text in facts(benchmark):
        yield f"- **{name}:** {text}"
    yield ""


def facts(benchmark: Benchmark) -> list[tuple[str, str]]:
    """What people need to know about a benchmark: name and text of each fact."""
    about = benchmark.description
    found = [
        ("data", about.source),
        ("form", about.form),
        ("looked for as", ", ".join(benchmark.files) or "name the file"),
        ("licence", about.licence),
        ("prompt", about.prompt),
        ("metric", about.metric),
        ("rules", "; ".join(f"{rule}: {text}" for rule, text in benchmark.rules.items())),
        ("scored", ", ".join(about.scored)),
    ]
    if benchmark.submission:
        found.append(("submission", benchmark.submission.form))
    return found


if __name__ == "__main__":
    print(reference())
