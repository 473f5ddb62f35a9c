"""Models trained with several seeds: mean ± standard deviation, and tests over seeds and questions together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llava_npu.comparison import pareto
from llava_npu.comparison.pairs import measured
from llava_npu.comparison.results import Result, model_name
from llava_npu.comparison.table import NO_VALUE, TrialRow, difference_text, scale_and_digits
from llava_npu.evaluation.statistics.significance import SeededDifference, corrected, seeded_differences
from llava_npu.files.tables import TextTable

SEED = "seed"
ABOUT = (
    "Mean ± standard deviation over seeds. Differences are to the first model of the table, with the 95 % interval and "
    "two-sided p of a bootstrap over seeds and questions together{correction}. *Detectable* is the difference that "
    "this many seeds and questions would show at p < 0.05 in four of five comparisons."
)
ONE_SEED = (
    "Of a model with one finished seed the spread between seeds is unknown: its intervals and p hold the part of the "
    "questions alone, and are too small."
)
_CORRECTIONS = {
    "none": "; each p is for one comparison and not corrected for their number",
    "holm": "; p values of a measure are corrected for their number by Holm's method",
    "benjamini-hochberg": "; p values of a measure are corrected by Benjamini and Hochberg's method",
}


@dataclass(frozen=True)
class SeededModel:
    """One model over its seeds.

    Attributes:
        encoder, projector, varied: which model; `varied` without the seed.
        lines: its finished trials, one per seed.
        missing: seeds without a result.
    """

    encoder: str
    projector: str
    varied: Mapping[str, Any]
    lines: Sequence[TrialRow]
    missing: Sequence[Any]

    @property
    def name(self) -> str:
        return model_name(self.encoder, self.projector, self.varied)

    @property
    def results(self) -> list[Result]:
        return [line.result for line in self.lines if line.result is not None]


@dataclass(frozen=True)
class SeededScore:
    """A measure of one model: over its seeds, and compared with the first model."""

    mean: float
    deviation: float | None
    relative: float | None
    difference: SeededDifference | None


@dataclass(frozen=True)
class SeededTable:
    """All models over their seeds.

    Attributes:
        scores: of each model, by measure.
        about: what the numbers are.
    """

    models: Sequence[SeededModel]
    measures: Sequence[pareto.Measure]
    scores: Sequence[Mapping[str, SeededScore]]
    about: str

    def as_json(self) -> list[dict[str, Any]]:
        """One entry per model."""
        return [
            {
                "name": model.name,
                "encoder": model.encoder,
                "projector": model.projector,
                "varied": dict(model.varied),
                "seeds": [line.varied[SEED] for line in model.lines],
                "without_result": list(model.missing),
                "measures": {title: asdict(score) for title, score in scores.items()},
            }
            for model, scores in zip(self.models, self.scores, strict=True)
        ]


def seeded_table(lines: Sequence[TrialRow], correction: str) -> SeededTable | None:
    """Trials grouped over their seeds; None unless a model has several finished ones."""
    models = [model for model in _models(lines) if model.lines]
    if not any(len(model.lines) > 1 for model in models):
        return None
    measures = pareto.measures([result for model in models for result in model.results])
    differences = {measure.title: _differences(models, measure.title, correction) for measure in measures}
    means: list[dict[str, float]] = []
    scores = []
    for place, model in enumerate(models):
        by_measure = {measure.title: _values(model, measure) for measure in measures}
        means.append({title: statistics.mean(values) for title, values in by_measure.items() if values})
        of_first = means[0]
        scores.append(
            {
                title: SeededScore(
                    mean,
                    statistics.stdev(by_measure[title]) if len(by_measure[title]) > 1 else None,
                    mean / of_first[title] if of_first.get(title) else None,
                    differences[title].get(place),
                )
                for title, mean in means[place].items()
            }
        )
    about = ABOUT.format(correction=_CORRECTIONS[correction])
    if any(len(model.lines) == 1 for model in models):
        about += f" {ONE_SEED}"
    return SeededTable(models, measures, scores, about)


def _values(model: SeededModel, measure: pareto.Measure) -> list[float]:
    return [value.value for result in model.results if (value := measure.value(result)) is not None]


def _models(lines: Sequence[TrialRow]) -> list[SeededModel]:
    groups: dict[str, list[TrialRow]] = {}
    for line in lines:
        if SEED in line.varied:
            varied = {key: value for key, value in line.varied.items() if key != SEED}
            groups.setdefault(repr((line.encoder, line.projector, sorted(varied.items()))), []).append(line)
    models = []
    for of_model in groups.values():
        first = of_model[0]
        varied = {key: value for key, value in first.varied.items() if key != SEED}
        done = [line for line in of_model if line.result is not None]
        missing = [line.varied[SEED] for line in of_model if line.result is None]
        models.append(SeededModel(first.encoder, first.projector, varied, done, missing))
    return models


def _differences(models: Sequence[SeededModel], measure: str, correction: str) -> dict[int, SeededDifference]:
    """Each model against the first, by its place; only those put to the same questions."""
    found = [[each for line in model.lines if (each := measured(line).get(measure))] for model in models]
    if not found[0]:
        return {}
    data = found[0][0].data
    places = [place for place, of_model in enumerate(found) if of_model and all(each.data == data for each in of_model)]
    if places[:1] != [0] or len(places) < 2:
        return {}
    samples = [[each.sample for each in found[place]] for place in places]
    tested = seeded_differences(samples, [(0, number) for number in range(1, len(places))])
    by_place = {place: each for place, each in zip(places[1:], tested, strict=True) if each is not None}
    p_values = corrected([each.p for each in by_place.values()], correction)
    return {
        place: SeededDifference(each.value, each.low, each.high, p, each.detectable)
        for (place, each), p in zip(by_place.items(), p_values, strict=True)
    }


def as_markdown(table: SeededTable) -> str:
    """A row per model: means, then differences to the first."""
    keys = list(dict.fromkeys(key for model in table.models for key in model.varied))
    heads = [f"{measure.title}, {measure.unit}" for measure in table.measures]
    names_of = ["encoder", "projector", *keys]
    rows, tests = [], []
    for model, scores in zip(table.models, table.scores, strict=True):
        names = [model.encoder, model.projector, *(str(model.varied.get(key, "")) for key in keys)]
        seeds = str(len(model.lines)) + (f" of {len(model.lines) + len(model.missing)}" if model.missing else "")
        rows.append([*names, seeds, *(score_text(scores.get(measure.title), measure) for measure in table.measures)])
        for measure in table.measures:
            score = scores.get(measure.title)
            if score is not None and score.difference is not None:
                tests.append(
                    [
                        *names,
                        measure.title,
                        difference_text(measure.title, score.difference),
                        _detectable_text(measure.title, score.difference),
                    ]
                )
    text = TextTable([*names_of, "seeds", *heads], rows, num_names=len(names_of)).as_markdown()
    if tests:
        columns = [*names_of, "measure", "difference", "detectable"]
        text += "\n" + TextTable(columns, tests, num_names=len(names_of) + 1).as_markdown()
    return text


def page_rows(table: SeededTable) -> list[tuple[SeededModel, list[str]]]:
    """Each model with its cells: of each measure the score, then the difference to the first model."""
    rows = []
    for model, scores in zip(table.models, table.scores, strict=True):
        texts = []
        for measure in table.measures:
            score = scores.get(measure.title)
            difference = score.difference if score else None
            texts += [score_text(score, measure), difference_text(measure.title, difference) if difference else ""]
        rows.append((model, texts))
    return rows


def score_text(score: SeededScore | None, measure: pareto.Measure) -> str:
    """Mean ± standard deviation in the measure's unit."""
    if score is None:
        return NO_VALUE
    digits = scale_and_digits(measure.title)[1]
    mean = f"{measure.scale * score.mean:.{digits}f}"
    return mean if score.deviation is None else f"{mean} ± {measure.scale * score.deviation:.{digits}f}"


def _detectable_text(measure: str, difference: SeededDifference) -> str:
    scale, digits = scale_and_digits(measure)
    return NO_VALUE if difference.detectable is None else f"{scale * difference.detectable:.{digits}f}"


def as_latex(table: SeededTable, caption: str) -> str:
    """A `table` with booktabs rules; the best mean of each measure is bold."""
    heads = " & ".join(_escaped(f"{measure.title} ({measure.unit})") for measure in table.measures)
    best = [_best(table, measure) for measure in table.measures]
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_escaped(caption)}}}",
        f"\\begin{{tabular}}{{l{'r' * (1 + len(table.measures))}}}",
        "\\toprule",
        f"Model & Seeds & {heads} \\\\",
        "\\midrule",
    ]
    for model, scores in zip(table.models, table.scores, strict=True):
        cells = []
        for measure, top in zip(table.measures, best, strict=True):
            score = scores.get(measure.title)
            text = score_text(score, measure).replace("±", "$\\pm$").replace(NO_VALUE, "--")
            cells.append(f"\\textbf{{{text}}}" if score is not None and score.mean == top else text)
        lines.append(f"{_escaped(model.name)} & {len(model.lines)} & {' & '.join(cells)} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"]) + "\n"


def _best(table: SeededTable, measure: pareto.Measure) -> float | None:
    means = [scores[measure.title].mean for scores in table.scores if measure.title in scores]
    return (max if measure.higher_is_better else min)(means, default=None)


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "·": r"$\cdot$"}


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(each, f"\\{each}" if each in "&%$#_{}" else each) for each in text)
