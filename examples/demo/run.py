"""The demo: packages → weights and data → align → finetune, measured before and after each stage → a report.

output/
  demo.json                what this demo is; an interrupted one resumes
  models/                  links to the converted weights
  data/                    see `data`
  align.yaml, finetune.yaml    the two stages, as `llava-npu train` reads them
  align/, finetune/        their run folders, each with its `model/`
  measured/                predictions and numbers of the untrained, the aligned and the tuned model
  licences/                of every package that was used
  report.html, results.md, results.json, *.png
"""

from __future__ import annotations

import gc
import json
import math
import resource
import shutil
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from demo import assets
from demo.data import DemoData, build_data
from demo.dinov2 import dinov2_small
from demo.efficientnet import efficientnet_lite2
from demo.measure import chosen, describe, measure, questions_of
from demo.pictures import emoji, stamps
from demo.profiles import PROFILES, Profile, StageRecipe
from demo.report import Example, Findings, write_report
from demo.shapes import shapes
from demo.weights import language_model, vision_tower
from llava_npu import devices
from llava_npu.config import RunConfig, render_config
from llava_npu.config.parts import PartsConfig, ProjectorPartConfig
from llava_npu.config.schema import DataConfig, ModelConfig, OptimizerConfig
from llava_npu.devices import Device
from llava_npu.errors import UserError
from llava_npu.evaluation.ablations import GIVEN, NONE, SHUFFLED
from llava_npu.files.atomic import write_text
from llava_npu.files.cache import cache_root
from llava_npu.files.output_folder import changes, claim_folder
from llava_npu.inference.features import FeatureCache, ImageFeatures
from llava_npu.models import load
from llava_npu.models.loaded import LoadedModel
from llava_npu.training import train
from llava_npu.training.checkpointing.export import build_model
from llava_npu.version import __version__

STATE_FILE = "demo.json"
UNTRAINED, ALIGNED, TUNED = "untrained", "aligned", "tuned"
# What each state is asked, with which pictures: baselines where there is a result that they could explain away.
WANTED: dict[str, dict[str, tuple[str, ...]]] = {
    UNTRAINED: {"captioning": (GIVEN,), "answering": (GIVEN,)},
    ALIGNED: {"captioning": (GIVEN, SHUFFLED), "answering": (GIVEN,)},
    TUNED: {"captioning": (GIVEN,), "answering": (GIVEN, SHUFFLED, NONE)},
}
_NUM_PHASES = 8
COMPARED_SIZES = (128, 256)  # pixels that the towers in recipes/compare-demo.yaml may see
TRANSFORMER_SIZE = 112  # pixels that the tower in recipes/compare-demo-seeds.yaml sees: 8×8 patches


@dataclass
class _Run:
    """One demo in progress.

    Attributes:
        profile, output, device, seed: what was asked for.
        console: where it talks.
        seconds: time of each phase, in this session and the ones before.
        phase: number of the phase.
    """

    profile: Profile
    output: Path
    device: Device
    seed: int
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    phase: int = 0

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        self.phase += 1
        self.console.rule(f"[bold]{self.phase}/{_NUM_PHASES} {title}", align="left")
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 1)
            _write_state(self)
            gc.collect()  # a phase's model must not stay in memory next to the next one's
            self.device.empty_cache()


def run_demo(
    profile: str,
    output: str | Path,
    *,
    device: str = "auto",
    seed: int = 0,
    prepare_only: bool = False,
    console: Console | None = None,
) -> Path:
    """Runs the demo, or resumes an interrupted one.

    Args:
        profile: "quick", "default" or "full".
        output: the run folder.
        device: as for `devices.select`.
        seed: of the split into training and held-out concepts, the questions, and the training.
        prepare_only: stop once weights, data and configurations are there.
        console: where progress goes.

    Returns:
        The report, an HTML file; or, prepared only, the folder.

    Raises:
        UserError: a package cannot be fetched, or `output` holds something else.
    """
    console = console or Console(stderr=True, soft_wrap=True)
    run = _Run(PROFILES[profile], Path(output).expanduser(), devices.select(device), seed, console)
    devices.apply_environment(run.device, console.print)
    _claim(run)

    with run.step("fetch", "Fetch real weights and images"):
        fetched = _fetch(run, assets.TO_COMPARE if prepare_only else assets.ASSETS)
        _copy_licences(fetched, run.output / "licences")
    with run.step("convert", "Convert the weights"):
        weights = cache_root() / "models"
        tower = vision_tower(fetched.folders[assets.VISION_TOWER.name], weights, run.profile.image_size)
        decoder = language_model(fetched.folders[assets.LANGUAGE_MODEL.name], weights)
        console.print(f"vision tower (ImageNet CNN, not CLIP): {tower}\nlanguage model: {decoder}")
    with run.step("data", "Build training data and a benchmark of held-out concepts"):
        data = _build_data(run, fetched.folders)
    models = {"resnet-50": tower, "smollm2-135m": decoder}
    if prepare_only:
        models |= _compared_towers(fetched.folders, weights)
    _link_models(run.output / "models", models)
    align, finetune = _configs(run, data, tower, decoder)
    if prepare_only:
        console.print(f"Prepared {run.output}: data, models, align.yaml, finetune.yaml.")
        return run.output

    questions = questions_of(data)
    asked = _spread(questions, run.profile.examples)
    measured: dict[str, Any] = {}
    said: dict[str, list[str]] = {}
    kept: OrderedDict[str, ImageFeatures] = OrderedDict()  # features; the tower is frozen, so all states share them
    by_letter = run.profile.sizes.by_letter

    def look(state: str, loaded: LoadedModel, template: str | None) -> None:
        features = FeatureCache(loaded, 2 * len(questions), kept)
        folder = run.output / "measured" / state
        wanted = {**WANTED[state], **({"letters": (GIVEN, SHUFFLED, NONE)} if by_letter and state == TUNED else {})}
        with _bar(console) as progress:
            measured[state] = measure(loaded, data, folder, wanted, run.device, features, _reporter(progress))
        said[state] = _once(folder / "said.json", lambda: describe(loaded, asked, features, template))

    with run.step("measure untrained", "Measure the untrained projector"):
        # In the type of the later states: all share the features of whichever state is measured first.
        untrained = build_model(align, run.device.autocast_dtype or torch.float32)
        untrained.model.eval().to(run.device.torch_device)
        look(UNTRAINED, untrained, "plain")
        del untrained
    with run.step("align", "Stage 1: align the projector on captions"):
        train(align, console=console)
    with run.step("measure aligned", "Measure the aligned model"):
        look(ALIGNED, _load(run, align), "plain")
    kept.clear()  # this stage needs the room more than the next one needs the seconds
    with run.step("finetune", "Stage 2: tune projector and language model on conversations"):
        train(finetune, console=console)
    with run.step("measure tuned", "Measure the tuned model"):
        look(TUNED, _load(run, finetune), None)

    findings = Findings(
        profile=run.profile,
        seed=seed,
        device=run.device.name,
        measured=measured,
        split=json.loads(data.split.read_text(encoding="utf-8")),
        examples=_examples(run.output, asked, said),
        losses={stage: run.output / stage for stage in ("align", "finetune")},
        assets=[each for each in assets.ASSETS if each.name in fetched.folders],
        lost=fetched.lost,
        seconds=run.seconds,
        peak_memory=_peak_memory(),
    )
    report = write_report(findings, run.output)
    _say_goodbye(run, findings, report)
    return report


# --- folder -----------------------------------------------------------------------------------------------------------


def _claim(run: _Run) -> None:
    """Takes the output folder, or resumes the demo in it."""
    folder, state_file = run.output, run.output / STATE_FILE
    identity = _identity(run)
    if claim_folder(folder, STATE_FILE, "--output", "`python examples/demo`"):
        state = json.loads(state_file.read_text(encoding="utf-8"))
        if changed := changes(state, identity, identity.__contains__):
            raise UserError(
                f"--output {folder} holds a demo that differs from this one:\n" + "\n".join(changed) + "\n"
                "Give another --output, or delete that folder."
            )
        run.seconds.update(state.get("seconds", {}))
        run.console.print(f"resuming the demo in {folder}")
    _write_state(run)


def _identity(run: _Run) -> dict[str, Any]:
    return {"profile": run.profile.name, "seed": run.seed, "version": __version__}


def _write_state(run: _Run) -> None:
    write_text(run.output / STATE_FILE, json.dumps({**_identity(run), "seconds": run.seconds}, indent=1) + "\n")


# --- phases -----------------------------------------------------------------------------------------------------------


def _fetch(run: _Run, wanted: Sequence[assets.Asset]) -> assets.Fetched:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=run.console) as bar:
        tasks = {asset.name: bar.add_task(asset.name, total=asset.size) for asset in wanted}
        fetched = assets.fetch_all(
            wanted, lambda progress: bar.update(tasks[progress.asset.name], completed=progress.bytes_done)
        )
        for name in fetched.folders:
            bar.update(tasks[name], completed=bar.tasks[tasks[name]].total)
    for asset in wanted:
        if asset.name in fetched.folders:
            run.console.print(f"{asset.name}: {asset.purpose}. Licence: {asset.licence}")
    for name, reason in fetched.lost.items():
        run.console.print(f"[yellow]without {name}: {reason}")
    return fetched


def _copy_licences(fetched: assets.Fetched, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name, folder in fetched.folders.items():
        shutil.copyfile(folder / assets.LICENCE_FILE, target / f"{name}.txt")


def _build_data(run: _Run, folders: dict[str, Path]) -> DemoData:
    pictures = emoji(folders[assets.EMOJI_IMAGES.name], folders[assets.EMOJI_NAMES.name])
    if assets.STAMPS.name in folders:
        pictures = [*stamps(folders[assets.STAMPS.name]), *pictures]
    shape_package = folders[assets.EASY_VQA.name]
    # With fewer pictures than usual (a package could not be had), fewer concepts are held out.
    sizes = replace(run.profile.sizes, held_out=min(run.profile.sizes.held_out, len(pictures) // 6))
    with _bar(run.console) as progress:
        report = _reporter(progress)
        data = build_data(
            run.output / "data",
            pictures,
            shapes(shape_package, "train"),
            shapes(shape_package, "test"),
            sizes,
            run.seed,
            lambda done, total: report("pictures", done, total),
        )
    split = json.loads(data.split.read_text(encoding="utf-8"))
    run.console.print(
        f"{split['captions']} captions, {split['conversations']} conversations; held out: {len(split['held_out'])} "
        f"concepts, and with them {split['left_out_of_training']} more pictures that name them or their like; "
        f"questions: {split['questions']}"
    )
    return data


def _compared_towers(folders: dict[str, Path], cache: Path) -> dict[str, Path]:
    """The towers of recipes/compare-demo.yaml and compare-demo-seeds.yaml, by the names that they call them."""
    package = folders[assets.VISION_TOWER.name]
    second, third = folders.get(assets.SECOND_TOWER.name), folders.get(assets.THIRD_TOWER.name)
    towers = {f"resnet-50-{size}": vision_tower(package, cache, size) for size in COMPARED_SIZES}
    if second is not None:
        towers |= {
            f"efficientnet-lite2-{size}": efficientnet_lite2(second, package, cache, size) for size in COMPARED_SIZES
        }
    if third is not None:
        towers[f"dinov2-small-{TRANSFORMER_SIZE}"] = dinov2_small(third, cache, TRANSFORMER_SIZE)
    return towers


def _link_models(folder: Path, models: dict[str, Path]) -> None:
    """Gives the weights in the user's cache names that a configuration can hold on any machine."""
    folder.mkdir(exist_ok=True)
    for name, target in models.items():
        link = folder / name
        if link.is_symlink() and link.resolve() != target:
            link.unlink()
        if not link.is_symlink():
            link.symlink_to(target)


def _configs(run: _Run, data: DemoData, tower: Path, decoder: Path) -> tuple[RunConfig, RunConfig]:
    profile = run.profile
    align = _config(
        run,
        "align",
        profile.align,
        ModelConfig(
            vision_tower=str(tower),
            language_model=str(decoder),
            projector="adaptive_pool",
            projector_options={"num_queries": profile.image_tokens},
            vision_feature_layer=-1,
        ),
        data.align,
    )
    aligned = ModelConfig(checkpoint=str(run.output / "align" / "model"))
    finetune = _config(run, "finetune", profile.finetune, aligned, data.finetune)
    for config in (align, finetune):
        write_text(run.output / f"{config.stage}.yaml", render_config(config))
    return align, finetune


def _config(run: _Run, stage: Any, recipe: StageRecipe, model: ModelConfig, data: Path) -> RunConfig:
    records = len(json.loads(data.read_text(encoding="utf-8")))
    return RunConfig(
        output=str(run.output / stage),
        stage=stage,
        model=model,
        # The tower is frozen and the pictures are few: its features are computed once.
        data=DataConfig(path=str(data), max_length=512, workers=0, cache_features=True),
        optimizer=OptimizerConfig(
            learning_rate=recipe.learning_rate,
            warmup_ratio=0.06,
        ),
        parts=PartsConfig(projector=ProjectorPartConfig(learning_rate=recipe.projector_learning_rate)),
        epochs=math.ceil(recipe.steps * recipe.batch_size / records),
        max_steps=recipe.steps,
        batch_size=recipe.batch_size,
        micro_batch_size=recipe.micro_batch_size,
        gradient_checkpointing=recipe.gradient_checkpointing,
        precision=recipe.precision,
        device=run.device.kind,
        seed=run.seed,
        keep_checkpoints=1,
    )


def _load(run: _Run, config: RunConfig) -> LoadedModel:
    dtype = run.device.autocast_dtype or torch.float32
    return load(config.output_path / "model", run.device.torch_device, dtype)


def _examples(output: Path, questions: list[Any], said: dict[str, list[str]]) -> list[Example]:
    answered = {state: chosen(output / "measured" / state, "answering") for state in (UNTRAINED, ALIGNED, TUNED)}
    return [
        Example(
            image=question.images[0].data,
            question=question.text,
            options=dict(question.options),
            right=str(question.answer),
            part=question.l2_category,
            answers={state: answered[state].get(question.id) for state in answered},
            said={state: said[state][number] for state in said},
        )
        for number, question in enumerate(questions)
    ]


# --- small things -----------------------------------------------------------------------------------------------------


def _once(path: Path, compute: Callable[[], list[str]]) -> list[str]:
    if not path.is_file():
        write_text(path, json.dumps(compute(), indent=1, ensure_ascii=False) + "\n")
    return list(json.loads(path.read_text(encoding="utf-8")))


def _spread(items: list[Any], count: int) -> list[Any]:
    return [items[place * len(items) // count] for place in range(min(count, len(items)))]


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _reporter(progress: Progress) -> Callable[[str, int, int], None]:
    """Shows each named piece of work as a bar of its own."""
    tasks: dict[str, Any] = {}

    def report(name: str, done: int, total: int) -> None:
        if name not in tasks:
            tasks[name] = progress.add_task(name, total=total)
        progress.update(tasks[name], completed=done, total=total)

    return report


def _peak_memory() -> int:
    """Bytes of host memory that this process has held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _say_goodbye(run: _Run, findings: Findings, report: Path) -> None:
    run.console.rule("[bold]Done", align="left")
    run.console.print(findings.as_terminal())
    run.console.print(f"Report with pictures: {report}\nWhat to try next:")
    activate = Path(sys.executable).with_name("activate")
    if shutil.which("llava-npu") is None and activate.is_file():  # started by `make demo`
        run.console.print(f"  first, once in each terminal:\n    [bold]source {activate}[/]", soft_wrap=True)
    for what, command in findings.next_commands(run.output):
        run.console.print(f"  {what}:\n    [bold]{command}[/]", soft_wrap=True)
