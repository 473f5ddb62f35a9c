"""Published tables next to our own evaluations: `comparison/published_tables/`, a file each, with its source.

A published score is set next to our score that is computed as it was, as far as its authors say: the metric, the
part and the scorer's rule that the table's file names. Splits, judges and prompts may still differ; `note` says what is
known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import Field

from llava_npu.comparison.folder import EVALUATION
from llava_npu.config.loading import load_as
from llava_npu.config.section import Section
from llava_npu.errors import UserError, nearest
from llava_npu.evaluation.reports.comparison import REPORT_FILE, FinishedRun, distinct_labels, read_runs
from llava_npu.evaluation.statistics.accuracy import OVERALL, Score
from llava_npu.evaluation.statistics.bootstrap import interval_text
from llava_npu.files.home import expand_home
from llava_npu.files.tables import TextTable

_FOLDER = Path(__file__).resolve().parent / "published_tables"
_STRICT = "strict"  # our rule; published scores are by the others


class PublishedBenchmark(Section):
    """A column of a published table, and which of our scores is computed as it was."""

    title: str = Field(description="The column's head.")
    metric: str | None = Field(None, description="Our metric; default: the benchmark's first.")
    part: str | None = Field(None, description="A category in place of the overall score.")


class PublishedModel(Section):
    """A row of a published table."""

    setting: str = Field(description="Encoder, projector, language model, data, as far as they are stated.")
    scores: dict[str, float] = Field(description="By our name of the benchmark, as published.")


class PublishedTable(Section):
    """A published table."""

    title: str
    source: str = Field(description="Where the numbers stand: document and table.")
    note: str = ""
    benchmarks: dict[str, PublishedBenchmark]
    models: dict[str, PublishedModel]


def published_tables() -> dict[str, Path]:
    """The files of the tables that come with the package, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def read_published(name: str) -> PublishedTable:
    """A table by its name, or from a file of one's own; `NAME/MODEL,MODEL` takes these rows alone.

    Raises:
        UserError: the table or row does not exist; the message lists those that do.
    """
    table_name, _, rows = name.partition("/") if not expand_home(name).is_file() else (name, "", "")
    known = published_tables()
    path = expand_home(table_name) if table_name.endswith((".yaml", ".yml")) else known.get(table_name)
    if path is None:
        raise UserError(
            f"--published: table {table_name!r} does not exist.{nearest(table_name, known)} Tables: "
            f"{', '.join(known)}; or a YAML file of your own, in the form of those in comparison/published_tables/."
        )
    table = load_as(PublishedTable, path)
    for row, model in table.models.items():
        for benchmark in model.scores:
            if benchmark not in table.benchmarks:
                raise UserError(f"{path}: models.{row}.scores.{benchmark}: this benchmark is not in `benchmarks`.")
    if not rows:
        return table
    wanted = rows.split(",")
    for row in wanted:
        if row not in table.models:
            settings = "".join(f"\n  {each}: {model.setting}" for each, model in table.models.items())
            raise UserError(
                f"--published: {table_name} has no setting {row!r}.{nearest(row, table.models)} Its settings:{settings}"
            )
    return table.model_copy(update={"models": {row: table.models[row] for row in wanted}})


def evaluations_in(folders: Sequence[Path]) -> list[FinishedRun]:
    """Every finished evaluation in these folders, however deep: evaluations, runs, trials, comparisons.

    Raises:
        UserError: there is none in one of them.
    """
    found: list[Path] = []
    for folder in folders:
        reports = sorted(folder.rglob(REPORT_FILE)) if folder.is_dir() else []
        if not reports:
            raise UserError(
                f"--published: {folder} holds no finished evaluation ({REPORT_FILE}); run `llava-npu eval`."
            )
        found += [report.parent for report in reports]
    return read_runs(list(dict.fromkeys(found)))


def table_with_ours(table: PublishedTable, runs: Sequence[FinishedRun]) -> TextTable:
    """Published models and ours, a row each; a column for each benchmark that both have.

    Raises:
        UserError: no benchmark is in both.
    """
    shared = [name for name in table.benchmarks if any(run.benchmark == name for run in runs)]
    if not shared:
        raise UserError(
            f"--published: {table.title} has {', '.join(table.benchmarks)}; these folders have "
            f"{', '.join(dict.fromkeys(run.benchmark for run in runs))}: nothing to set side by side."
        )
    rows = []
    for name, model in table.models.items():
        scores = [model.scores.get(each) for each in shared]
        rows.append([f"{name} (published)", *("–" if score is None else f"{score:.1f}" for score in scores)])
    ours: dict[Path, dict[str, FinishedRun]] = {}
    for run in runs:
        own = ours.setdefault(_model_of(run), {})
        if run.benchmark in shared and own.setdefault(run.benchmark, run) is not run:
            raise UserError(
                f"--published: {own[run.benchmark].folder} and {run.folder} are both of {run.benchmark} and belong to "
                "one model; name one of the two."
            )
    ours = {model: own for model, own in ours.items() if own}
    for label, own in zip(distinct_labels(list(ours)), ours.values(), strict=True):
        rows.append([label, *(_shown(table.benchmarks[name], own.get(name)) for name in shared)])
    return TextTable(["", *(table.benchmarks[name].title for name in shared)], rows)


def _model_of(run: FinishedRun) -> Path:
    """The folder that an evaluated model is called by: its trial, or that of its evaluations."""
    folder = run.folder.resolve()
    if folder.parent.name == EVALUATION:
        return folder.parent.parent
    return folder.parent if folder.name == run.benchmark else folder


def comparable_score(column: PublishedBenchmark, run: FinishedRun) -> Score | None:
    """Our score that was computed as the published one; None where this evaluation has none."""
    scores: Iterable[Score] = run.scores.values()
    scores = [score for score in scores if score.name == (column.part or OVERALL)]
    metric = column.metric or next((score.metric for score in scores), None)
    scores = [score for score in scores if score.metric == metric]
    return next((score for score in scores if score.extraction != _STRICT), next(iter(scores), None))


def _shown(column: PublishedBenchmark, run: FinishedRun | None) -> str:
    score = None if run is None else comparable_score(column, run)
    if score is None:
        return "–"
    return f"{interval_text(score)} {score.extraction}".replace(" ", "\n")
