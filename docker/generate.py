"""Writes the Dockerfiles of this folder from the tables of `llava-npu doctor`: python docker/generate.py

Bases: CANN's own images (quay.io/ascend/cann), whose tags name CANN, chip, system and Python; python:3.11-slim for CUDA
and CPU, where torch's wheels bring CUDA's libraries.
"""

from __future__ import annotations

from pathlib import Path

from llava_npu.diagnostics.compatibility import CANN_PYTHON_PACKAGES, CPU_INDEX, RECOMMENDED, AscendRelease

FOLDER = Path(__file__).parent
PYTHON = "3.11"
CHIPS = {"a2": "910b", "a3": "a3"}  # CANN's names for Atlas A2 and A3
EXTRAS = "train,eval,serve"

_HEAD = """\
# Made by docker/generate.py: change that, and run it again.
# From the repository's root: docker build -f docker/{name} -t llava-npu .
FROM {base}
{arguments}SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /opt/llava-npu
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
"""
# CANN's libraries are found through the environment that its script sets; the place differs before 8.5.
_WITH_CANN = (
    "for file in /usr/local/Ascend/cann/set_env.sh /usr/local/Ascend/ascend-toolkit/set_env.sh; do "
    '[ -f \\"$file\\" ] && source \\"$file\\" && break; done; exec llava-npu \\"$@\\"'
)


def ascend(chip: str, release: AscendRelease = RECOMMENDED) -> str:
    """For one family of chips, on CANN's image for it; the same file builds on x86_64 and aarch64."""
    base = f"quay.io/ascend/cann:{release.cann}-{CHIPS[chip]}-ubuntu22.04-py{PYTHON}"
    head = _HEAD.format(name=f"ascend-{chip}.Dockerfile", base=base, arguments="")
    return f"""{head}\
RUN pip install torch=={release.torch}+cpu torch-npu=={release.torch_npu} --extra-index-url {CPU_INDEX} \\
    && sed '/^torch==/d' constraints.txt > /tmp/constraints.txt \\
    && pip install -c /tmp/constraints.txt ".[{EXTRAS}]" {" ".join(CANN_PYTHON_PACKAGES)} \\
    && rm /tmp/constraints.txt
WORKDIR /work
ENTRYPOINT ["/bin/bash", "-c", "{_WITH_CANN}", "--"]
CMD ["doctor"]
"""


def general(release: AscendRelease = RECOMMENDED) -> str:
    """For CUDA and CPU: `--build-arg TORCH_INDEX` chooses the build of torch."""
    cuda = CPU_INDEX.replace("cpu", "cu130")
    arguments = f"# For CPUs; for CUDA 13.0: --build-arg TORCH_INDEX={cuda}\nARG TORCH_INDEX={CPU_INDEX}\n"
    head = _HEAD.format(name="Dockerfile", base=f"python:{PYTHON}-slim-bookworm", arguments=arguments)
    return f"""{head}\
RUN pip install torch=={release.torch} --index-url "${{TORCH_INDEX}}" \\
    && sed '/^torch==/d' constraints.txt > /tmp/constraints.txt \\
    && pip install -c /tmp/constraints.txt ".[{EXTRAS}]" \\
    && rm /tmp/constraints.txt
RUN useradd --create-home --uid 1000 user && mkdir -p /work && chown 1000 /work
USER 1000
WORKDIR /work
ENTRYPOINT ["llava-npu"]
CMD ["doctor"]
"""


def files() -> dict[str, str]:
    """Name -> text of every Dockerfile."""
    return {"Dockerfile": general(), **{f"ascend-{chip}.Dockerfile": ascend(chip) for chip in CHIPS}}


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text)
