"""Memory of a training set that is read from its index, against one that is loaded whole.

    python benchmarks/data_memory.py [--records 4000000] [--compare 400000] [--samples 20000] [--form jsonl]
                                     [--folder DIR]

A set of instruction-like records (about 330 bytes each) is generated. Processes of their own then open it and read the
same random samples: "ours" by `llava_npu.data.open_records`, "whole" by `json.load`, as LLaVA does. Printed is the peak
resident memory above that of the same process before it opened the data. "Whole" runs on the smaller set, so that it
fits; ours on both, to show what grows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

WORDS = ("the", "cat", "sits", "on", "a", "red", "table", "near", "two", "windows", "and", "looks", "at", "birds")


def main() -> None:
    options = parse_arguments()
    if options.measure:
        measure(options.measure, Path(options.file), options.samples)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.environ["LLAVA_NPU_CACHE"] = str(Path(folder) / "cache")
        results = {}
        for count in sorted({options.compare, options.records}):
            path = Path(folder) / f"{count}.{options.form}"
            with path.open("w", encoding="utf-8") as file:
                write_records(file, count, as_list=options.form == "json")
            ways = ["ours", "ours again"] + (["whole"] if count == options.compare else [])
            for way in ways:
                result = results[count, way] = run(way.split()[0], path, options.samples)
                print(
                    f"{count:>9,} records, {path.stat().st_size / 2**20:7.0f} MiB, {way:>10}: peak "
                    f"{result['peak'] / 2**20:8.1f} MiB, open {result['open']:6.1f} s, "
                    f"{result['read'] / options.samples * 1e6:5.0f} µs a record",
                    flush=True,
                )
        whole, ours = results[options.compare, "whole"], results[options.compare, "ours"]
        large = results[options.records, "ours"]
        print(
            f"ratio at {options.compare:,} records: {whole['peak'] / ours['peak']:.0f}× less; ours at "
            f"{options.records / options.compare:.0f}× the records: {large['peak'] / ours['peak']:.2f}× the memory"
        )


def measure(way: str, path: Path, samples: int) -> None:
    """Opens the set and reads random records; prints bytes and seconds as JSON."""
    from llava_npu.data.records import open_records  # before the measurement: its own memory does not count

    before = peak_bytes()
    started = time.perf_counter()
    if way == "ours":
        records: Any = open_records(path)
    elif path.suffix == ".json":
        records = json.loads(path.read_text(encoding="utf-8"))
    else:
        with path.open(encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
    opened = time.perf_counter()
    for index in np.random.default_rng(0).integers(len(records), size=samples).tolist():
        assert records[index]
    finished = time.perf_counter()
    print(json.dumps({"peak": peak_bytes() - before, "open": opened - started, "read": finished - opened}))


def peak_bytes() -> int:
    """The most memory this process has had resident. (`ru_maxrss` would start from its parent's.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status; this benchmark needs Linux")


def run(way: str, path: Path, samples: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", way, "--file", str(path), "--samples", str(samples)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: float(value) for name, value in json.loads(output).items()}


def write_records(file: TextIO, count: int, *, as_list: bool) -> None:
    """Conversations of two to six turns, each about an image."""
    draw = random.Random(0)
    file.write("[" if as_list else "")
    for number in range(count):
        turns = []
        for turn in range(draw.choice((1, 1, 2, 3))):
            mark = "" if turn else "<image>\n"
            turns.append({"from": "human", "value": mark + " ".join(draw.choices(WORDS, k=6)) + "?"})
            turns.append({"from": "gpt", "value": " ".join(draw.choices(WORDS, k=draw.randrange(4, 20)))})
        record = {"id": f"{number:09d}", "image": f"coco/train2017/{number:012d}.jpg", "conversations": turns}
        separator = "" if number == count - 1 else ("," if as_list else "")
        file.write(json.dumps(record) + separator + "\n")
    file.write("]" if as_list else "")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=4_000_000)
    parser.add_argument("--compare", type=int, default=400_000, help="records of the set that is also loaded whole")
    parser.add_argument("--samples", type=int, default=20_000, help="records read at random")
    parser.add_argument("--form", choices=["json", "jsonl"], default="jsonl")
    parser.add_argument("--folder", help="where the sets are written; by default the system's temporary folder")
    parser.add_argument("--measure", choices=["ours", "whole"], help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
