"""Checks that every pin of constraints.txt has a wheel for Linux on aarch64, as Ascend servers with Kunpeng CPUs need.

    python tests/aarch64_pins.py

Asks pip to resolve the pins for that platform, wheels alone, without installing anything.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
GLIBC = 31  # of openEuler 22.03 it is 2.34, of Ubuntu 20.04 2.31
PLATFORMS = ("manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, GLIBC + 1)))
FROM_SOURCE = {"deepspeed": "built where it is installed, as everywhere"}


def pins() -> list[str]:
    """The lines of constraints.txt that name a version."""
    lines = (line.partition("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    return [line for line in lines if line]


def wheels(wanted: list[str]) -> dict[str, str]:
    """Name -> wheel, resolved for aarch64; raises where one is missing."""
    target = [option for platform in PLATFORMS for option in ("--platform", platform)]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps"),
            *("--only-binary=:all:", "--python-version=3.11.9", "--implementation=cp", *target),
            *("--target", folder, "--report", f"{folder}/report.json", *wanted),
        ]
        subprocess.run(command, check=True)
        report = json.loads(Path(folder, "report.json").read_text())
    return {each["metadata"]["name"]: each["download_info"]["url"].rpartition("/")[2] for each in report["install"]}


def main() -> int:
    found, missing = {}, []
    wanted = [pin for pin in pins() if pin.partition("==")[0] not in FROM_SOURCE]
    try:
        found = wheels(wanted)
    except subprocess.CalledProcessError:  # one by one, to name all that are missing
        for pin in wanted:
            try:
                found |= wheels([pin])
            except subprocess.CalledProcessError:
                missing.append(pin)
    print(f"{len(found)} of {len(wanted)} pins have a wheel for aarch64")
    for pin in missing:
        print(f"none: {pin}")
    for name, reason in FROM_SOURCE.items():
        print(f"from source: {name} ({reason})")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
