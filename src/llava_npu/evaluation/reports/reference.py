"""What there is to evaluate on, from the registrations: docs/evaluation.md (`make docs`), `llava-npu eval --list`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llava_npu.evaluation import extraction
from llava_npu.evaluation.benchmarks import Benchmark, available

_CHECKED_FILE = Path(__file__).with_name("official_scorers.json")  # by benchmarks/official_scorers.py
_EXAMPLES_FILE = Path(extraction.__path__[0]) / "examples.json"
_MISSING = "–"

_HEAD = """# Evaluation

    llava-npu eval BENCHMARK[,BENCHMARK…] --model DIR --data PATH --output DIR

`PATH` is the benchmark's question file, or a folder in which it has one of the names below; what belongs to it
(annotations, images) is looked for next to it. Several benchmarks want a folder, and write to a folder each below
`--output`. An interrupted run resumes when the same command is given again; not with another model, other settings or
other data, images next to the question file included. (Of these, size, beginning and end are compared, not place or
date.) Questions whose images could not be read are asked again once the files have changed.

Data is not downloaded: each benchmark's publishers say who may use it and how. LLaVA's question files are in the
`eval.zip` that its [docs/Evaluation.md](https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md) links to;
VLMEvalKit's tables (`.tsv`) are those that it downloads itself; their MD5 sums are checked and reported. Parquet files
are those of the data sets on Hugging Face; reading them needs `pip install 'llava-npu[data]'`. A data set of several
files is read from its first ("test-00000-of-00003.parquet").

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

## Stored answers

    llava-npu eval BENCHMARK --predictions FILE --data PATH --output DIR

scores answers that were given before, by this or another program; no model is loaded. Every answer is matched to its
question by id (where a file has an id several times, by id and prompt, else in order). Questions without an answer
count as wrong; a file that answers other questions is refused, with the first ids that do not match, or the first
prompt that asks something else than the question of its id. Of two equal answers to a question one counts; two
different ones are refused, and so are records with both `answer` and `prediction` but no `index`, and dates that a
spreadsheet made of answers.

| file | from | fields |
|---|---|---|
| `.jsonl` | LLaVA's evaluation scripts | `question_id`, `text` and, if it is there, `prompt` |
| `.xlsx`, `.tsv`, `.csv`, `.json` | VLMEvalKit's results (`MODEL_BENCHMARK.xlsx`) | `index`, `prediction`, `question` |
| `.jsonl` | lmms-eval's `--log_samples` | `doc` (with the question's id) or `doc_id`, `resps` |
| `predictions.jsonl` | a run of `llava-npu eval` | `id`, `answer` |

    {"question_id": "42", "text": "The answer is B."}
    {"doc_id": 0, "doc": {"index": 42}, "resps": [["The answer is B."]]}
    {"id": "42", "answer": "The answer is B."}

So rules of a new version, a judge, or a test file whose answers were released later need no model:

    llava-npu eval mmbench_test --predictions old/predictions.jsonl --data MMBench_TEST_EN_V11.tsv --output new

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
spreads the questions over N devices. All this changes no answer beyond rounding, so an interrupted run may resume with
another number of devices, or batch size. [performance.md](performance.md) has measurements.

## Other suites: lmms-eval

[lmms-eval](https://github.com/EvolvingLMMs-Lab/lmms-eval) finds our models by itself where both are installed, and so
its tasks run on every device that this project knows:

    pip install 'llava-npu[lmms-eval]'
    python -m lmms_eval --model llava_npu --model_args pretrained=runs/finetune --tasks mmbench_en_dev --batch_size 16

The extra keeps filelock below 4.3: release 0.7.3 of lmms-eval imports a module that later ones lack. Images come first
in a prompt, decoding is greedy, batches are answered as above. Tested with release 0.7.3 and two local tasks, one that
generates and one that compares likelihoods (for which lmms-eval wants `--force_simple`); the answers are those of
`llava-npu eval`. Not there: videos, sounds, and several rounds.

## Other suites: VLMEvalKit

[VLMEvalKit](https://github.com/open-compass/VLMEvalKit) needs no plugin: our server speaks the protocol of its class
for OpenAI's models, on any device.

    llava-npu serve --model runs/finetune --name finetune --port 8000

`config.json`:

    {"model": {"finetune": {"class": "GPT4V", "model": "finetune", "api_base": "http://127.0.0.1:8000/v1/chat/completions",
                            "key": "none", "temperature": 0, "max_tokens": 1024, "img_size": -1, "img_detail": "high"}},
     "data": {"MMBench_DEV_EN": {"class": "ImageMCQDataset", "dataset": "MMBench_DEV_EN"}}}

    python run.py --config config.json --judge exact_matching

With `--judge exact_matching` VLMEvalKit asks no other model. Its result can then be scored here, and its scores should
be those of our rule `vlmevalkit`:

    llava-npu eval mmbench --predictions finetune_MMBench_DEV_EN.xlsx --data MMBench_DEV_EN.tsv --output check

Differences to `llava-npu eval mmbench --model runs/finetune` come from the answers: VLMEvalKit words its prompts itself
("Hint:", "Question:", "Options:", "Please select the correct answer from the options above."), and its class for
OpenAI's models sends images as JPEG. The names of models that make it treat them otherwise ("gemini", "step", "gpt-5",
…) are to be avoided.

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


@dataclass(frozen=True)
class Example:
    """An answer, what each rule reads from it, and what is remarkable about that."""

    answer: str
    readings: Mapping[str, str | None]
    remark: str


@dataclass(frozen=True)
class Examples:
    """Answers to one question; `options` is empty for yes and no."""

    options: Mapping[str, str]
    rules: list[str]
    answers: list[Example]


def extraction_examples() -> tuple[Examples, Examples]:
    """The examples of extraction/examples.json: of choices, and of yes and no."""
    whole = json.loads(_EXAMPLES_FILE.read_text(encoding="utf-8"))
    choices, yes_or_no = (
        Examples(
            table.get("options", {}),
            table["rules"],
            [Example(row[0], dict(zip(table["rules"], row[1:-1], strict=True)), row[-1]) for row in table["answers"]],
        )
        for table in (whole["choices"], whole["yes or no"])
    )
    return choices, yes_or_no


def reference() -> str:
    """The page, as Markdown."""
    benchmarks = available()
    index = ["## Benchmarks", "", "| name | benchmark | scored |", "|---|---|---|"]
    index += [
        f"| [`{name}`](#{name}) | {benchmark.title} | {', '.join(benchmark.description.scored)} |"
        for name, benchmark in benchmarks.items()
    ]
    parts = [_HEAD, *_examples(), *_checked(), *index, ""]
    return "\n".join([*parts, *(line for each in benchmarks.values() for line in _section(each))])


def _examples() -> Iterable[str]:
    choices, yes_or_no = extraction_examples()
    options = ", ".join(f"{letter}. {text}" for letter, text in choices.options.items())
    yield "## How rules read answers"
    yield ""
    yield (
        f"Options: {options}. `scienceqa` is LLaVA's script for ScienceQA; `ranked` is lmms-eval's rule for "
        "RealWorldQA, `first` its rule for CV-Bench and BLINK; `cambrian` is Cambrian-1's for CV-Bench. A dash is no "
        "option, which counts as wrong; Z is VLMEvalKit's letter for a refusal."
    )
    yield ""
    yield from _table(choices)
    yield "Yes or no (POPE, MME, HallusionBench):"
    yield ""
    yield from _table(yes_or_no)


def _table(examples: Examples) -> Iterable[str]:
    yield "| answer | " + " | ".join(f"`{rule}`" for rule in examples.rules) + " | |"
    yield "|---" * (len(examples.rules) + 2) + "|"
    for each in examples.answers:
        answer = json.dumps(each.answer, ensure_ascii=False)[1:-1]
        cells = [f"`{answer}`" if answer else "(empty)", *(each.readings[rule] or _MISSING for rule in examples.rules)]
        yield "| " + " | ".join([*cells, each.remark]) + " |"
    yield ""


def _checked() -> Iterable[str]:
    yield "## Checked against the official scorers"
    yield ""
    yield (
        "`benchmarks/official_scorers.py` runs the code that published scores come from next to ours, on made answers: "
        "right ones in other words, case and brackets, cut and mistyped ones, other options, random characters. Our "
        "own rule `strict` has no official counterpart. `mmbench` stands for all multiple choice by `vlmevalkit`."
    )
    yield ""
    yield "| benchmark | rule | official scorer | answers | scored differently |"
    yield "|---|---|---|---|---|"
    for row in json.loads(_CHECKED_FILE.read_text(encoding="utf-8")):
        cells = (f"`{row['benchmark']}`", row["rule"], row["scorer"], f"{row['compared']:,}", str(row["different"]))
        yield "| " + " | ".join(cells) + " |"
    yield ""


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
        ("prompt", f"{about.prompt}; greedy, at most {benchmark.max_new_tokens} new tokens"),
        ("metric", about.metric),
        ("rules", "; ".join(f"{rule}: {text}" for rule, text in benchmark.rules.items())),
        ("scored", ", ".join(about.scored)),
    ]
    if benchmark.submission:
        found.append(("submission", benchmark.submission.form))
    if benchmark.closed:
        found.append(("server", benchmark.closed))
    return found


if __name__ == "__main__":
    print(reference())
