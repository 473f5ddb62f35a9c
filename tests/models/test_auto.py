"""Whichever is imported first, transformers' Auto classes know our models; and importing us costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

KNOWN = "from transformers import AutoConfig; print(type(AutoConfig.for_model('llava_npu')).__name__)"


def _run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "from transformers import LlavaForConditionalGeneration; import llava_npu",
        "import llava_npu; from transformers import PreTrainedModel",
        "import llava_npu; from transformers.models.llava.modeling_llava import LlavaModel",
        "from llava_npu import LlavaNpuProcessor",
    ],
)
def test_auto_classes_know_the_model_type(first: str) -> None:
    assert _run(f"{first}; {KNOWN}") == "LlavaNpuConfig"


@pytest.mark.slow
def test_importing_the_package_or_its_projectors_loads_neither_torch_nor_transformers() -> None:
    assert _run("import sys, llava_npu, llava_npu.errors; print('torch' in sys.modules)") == "False"
    code = "import sys, llava_npu.models.projectors; print('transformers' in sys.modules)"
    assert _run(code) == "False"
