"""`llava-npu data`: looking at training data, and checking it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_npu.errors import UserError

if TYPE_CHECKING:
    from llava_npu.data.records import Source
    from llava_npu.data.tools.check import CheckOptions

app = typer.Typer(help="Look at training data, and check it.", no_args_is_help=True)

_CONFIG_SUFFIXES = (".yaml", ".yml")


@app.callback()
def data() -> None:
    """Look at training data, and check it."""


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="A data file or folder; see docs/data.md for the forms.")],
    tokenizer: Annotated[str, typer.Option(help="Folder (or hub id) of a tokenizer or a model that has one.")],
    template: Annotated[str, typer.Option(help="Conversation template.")] = "v1",
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of the images, or .tar or .zip; by default the data file's folder.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many records to show.")] = 5,
    start: Annotated[int, typer.Option(min=0, help="The first record to show, counted from 0.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page with every token and image to this file.")] = None,
    allow_absolute_paths: Annotated[
        bool, typer.Option("--allow-absolute-paths", help="Images may lie outside of the image folder.")
    ] = False,
) -> None:
    """Show samples as the model will see them, supervised tokens marked. Exit status 1 if a shown record is faulty."""
    from llava_npu.data.tokenizer import load_tokenizer
    from llava_npu.data.tools.inspect import InspectOptions, inspect_records

    options = InspectOptions(template, image_root, allow_absolute_paths, start, limit, html)
    num_faulty = inspect_records(file, load_tokenizer(tokenizer), options)
    if num_faulty:
        raise typer.Exit(1)


@app.command("check")
def check_command(
    files: Annotated[list[Path], typer.Argument(help="Data files or folders, or one training configuration (.yaml).")],
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of the images, or .tar or .zip; by default the data file's folder.")
    ] = None,
    images: Annotated[str, typer.Option(help="decode: open every image; exist: look for it; ignore.")] = "decode",
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder (or hub id) of a tokenizer or model; without it texts are not encoded.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Conversation template; by default the run's, or v1.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Tokens of a sample, images included.")] = None,
    image_tokens: Annotated[int, typer.Option(min=0, help="Tokens of an image, as the projector gives them.")] = 0,
    allow_absolute_paths: Annotated[
        bool, typer.Option("--allow-absolute-paths", help="Images may lie outside of the image folder.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes; by default one per core.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="How many defects of each kind to describe.")] = 5,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the report to this file, too.")] = None,
) -> None:
    """Check a whole data set before training. Exit status 1 if there are records that cannot be trained on."""
    from rich.progress import Progress

    from llava_npu.data.records import Source, open_records
    from llava_npu.data.tools.check import CheckOptions, check_records, default_workers, print_report, write_report
    from llava_npu.files.console import SafeConsole

    if images not in ("decode", "exist", "ignore"):
        raise UserError(f"--images {images!r} is unknown; allowed are decode, exist and ignore.")
    options = CheckOptions(images, template or "v1", tokenizer, max_length, image_tokens, examples)  # type: ignore[arg-type]
    if any(file.suffix.lower() in _CONFIG_SUFFIXES for file in files):
        if len(files) > 1 or image_root is not None:
            raise UserError("give either one training configuration, which names its data, or data files")
        sources, options = _from_config(files[0], options, template)
    else:
        sources = [Source(file, image_root, allow_absolute_paths=allow_absolute_paths) for file in files]
    opened = [
        open_records(source.path, source.image_root, allow_absolute_paths=source.allow_absolute_paths)
        for source in sources
    ]
    console = SafeConsole()
    total = sum(map(len, opened))
    with Progress(console=SafeConsole(stderr=True), transient=True) as progress:
        task = progress.add_task("records", total=total)
        report = check_records(
            opened,
            options,
            workers=default_workers(total) if workers is None else workers,
            report=lambda count: progress.advance(task, count),
        )
    print_report(report, options, console)
    if json_ is not None:
        write_report(report, options, json_)
    if report.num_bad:
        raise typer.Exit(1)


def _from_config(file: Path, options: CheckOptions, template: str | None) -> tuple[list[Source], CheckOptions]:
    """The run's data, and its template, length and tokenizer where the command line names none."""
    from dataclasses import replace

    from llava_npu.config import load_config
    from llava_npu.training.data import sources

    run = load_config(file)
    folder = run.model.language_model or run.model.checkpoint
    if folder is not None and (Path(folder) / "model").is_dir():  # a run folder
        folder = str(Path(folder) / "model")
    return sources(run.data), replace(
        options,
        template=template or run.data.template or ("plain" if run.stage == "align" else "v1"),
        tokenizer=options.tokenizer or folder,
        max_length=options.max_length or run.data.max_length,
    )
