"""Every language model that docs/parts.md lists, on tiny random weights, from composing to an answer.

The reference is always the language model's own class in transformers, with its own eager attention, on the CPU.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from llava_npu.inference.engine import InferenceEngine
from llava_npu.inference.prompts import prepare_prompt
from llava_npu.inference.request import Prompt, Request, Sampling
from llava_npu.models import LoadedModel, compose, load
from llava_npu.ops.fuse import Operation, fuse, install_kernels
from llava_npu.training.loss import SupervisedLoss
from support import tiny

DOCS = Path(__file__).resolve().parents[2] / "docs/parts.md"
ALL: tuple[Operation, ...] = ("rms_norm", "rotary", "swiglu")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "vocab_size": 320,  # the tokenizer's, with room for the image token
}
WINDOW = {"sliding_window": 8}


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A row of the table in docs/parts.md.

    Attributes:
        models: which published ones are of this architecture.
        config: its transformers configuration's `model_type`, and what is not as in `SIZES`.
        fused: the operations that `fuse` puts in.
    """

    models: str
    model_type: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fused: frozenset[Operation] = frozenset(ALL)


LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SCALES = {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.4}
GEMMA_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16, **WINDOW}
ROWS = (
    LanguageModel("Llama-1/2, Vicuna, SmolLM2", "llama"),
    LanguageModel("Llama-3, 3.1, 3.2 (text)", "llama", {"rope_parameters": LLAMA_3}),
    LanguageModel("Mistral-7B", "mistral", WINDOW),
    LanguageModel("Qwen1.5, Qwen2, Qwen2.5", "qwen2"),
    LanguageModel("Qwen3", "qwen3", {"head_dim": 16}),
    LanguageModel("Phi-3, Phi-3.5, Phi-4", "phi3", {"partial_rotary_factor": 0.75}),
    LanguageModel("Phi-1.5, Phi-2", "phi", {}, frozenset({"rotary"})),
    LanguageModel("Gemma-1", "gemma", {"head_dim": 16}, frozenset({"rms_norm", "rotary"})),
    LanguageModel("Gemma-2", "gemma2", GEMMA_LAYERS, frozenset({"rms_norm", "rotary"})),
    LanguageModel("Gemma-3 1B (text)", "gemma3_text", GEMMA_LAYERS, frozenset({"rms_norm", "rotary"})),
    LanguageModel("SmolLM3", "smollm3", {"no_rope_layers": [1, 0]}),
    LanguageModel("OLMo", "olmo", {"clip_qkv": 2.0}, frozenset({"rotary", "swiglu"})),
    LanguageModel("OLMo-2", "olmo2"),
    LanguageModel("GLM-4", "glm", {"head_dim": 16}),
    LanguageModel("GLM-4-0414", "glm4", {"head_dim": 16}),
    LanguageModel("StableLM-2", "stablelm", {"use_qkv_bias": True}, frozenset({"rotary", "swiglu"})),
    LanguageModel("Granite", "granite", SCALES),
    LanguageModel("Cohere Command-R", "cohere", {"logit_scale": 0.25}, frozenset({"rotary", "swiglu"})),
)


class Case:
    """One language model's folder, and what is made of it once."""

    def __init__(self, row: LanguageModel, folder: Path, clip: Path) -> None:
        self.row, self.folder, self._clip = row, folder, clip
        words = tiny.tokenizer()
        torch.manual_seed(0)
        config = CONFIG_MAPPING[row.model_type](**{**SIZES, **row.changes})
        self.reference: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in self.reference.parameters():
            if parameter.ndim == 1:  # norms and biases: not ones and zeros, which would hide much
                torch.nn.init.normal_(parameter, parameter.data.mean().item(), 0.3)
        self.reference.save_pretrained(folder / "lm")
        words.save_pretrained(folder / "lm")

    @functools.cached_property
    def composed(self) -> LoadedModel:
        loaded = compose(str(self._clip), str(self.folder / "lm"))
        loaded.model.eval()
        return loaded

    def on(self, device: torch.device) -> LoadedModel:
        """A copy as it is trained and answers."""
        model = copy.deepcopy(self.composed.model).to(device)
        install_kernels(model, device)
        return self.composed._replace(model=model)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.models.split(",")[0].split(" (")[0])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param.model_type), clip)


# ---- the columns ----

SAMPLES = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [20, 21, 22], [33, 34, 35, 36, 37]]  # one leaves a window


def batch(samples: list[list[int]], device: torch.device) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
    """A pack as training makes it: all but each sample's first two tokens are supervised."""
    ids = torch.tensor([[token for sample in samples for token in sample]])
    places = torch.tensor([[place for sample in samples for place in range(len(sample))]])
    tensors = {
        "input_ids": ids,
        "position_ids": places,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(places < 2, -100, ids),
        "supervised_positions": (places[0, 1:] >= 2).nonzero().squeeze(1),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}, tuple(map(len, samples))


def loss_and_gradients(model: Any, packs: list[list[list[int]]], device: torch.device) -> dict[str, torch.Tensor]:
    """Of the language model; the projector has a gradient of zeros."""
    objective = SupervisedLoss(model)
    model.zero_grad()
    total = torch.zeros((), device=device)
    for samples in packs:
        loss = objective(*batch(samples, device))
        loss.backward()
        total += loss.detach()
    text = {
        name.removeprefix("model.language_model."): parameter.grad.cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and ("language_model" in name or "lm_head" in name)
    }
    return {"loss": total.cpu(), **text}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    scale = max(tensor.abs().max().item() for name, tensor in theirs.items() if name != "loss")
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=2e-4, atol=2e-5 * max(1.0, scale), msg=name)


def test_compose(case: Case, device: torch.device) -> None:
    """Logits, loss and gradients are those of the language model's own class."""
    model, reference = case.on(device).model, case.reference
    ids = torch.tensor([SAMPLES[0]])
    with torch.no_grad():
        ours = model(input_ids=ids.to(device), use_cache=False).logits.cpu()
        theirs = reference(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())

    ours = loss_and_gradients(model, [[SAMPLES[0]]], device)
    reference.zero_grad()
    logits = reference(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits[0, 1:-1], ids[0, 2:], reduction="sum")
    loss.backward()
    gradients = {name.removeprefix("model."): each.grad for name, each in reference.named_parameters()}
    assert_close(ours, {"loss": loss.detach(), **gradients})


def test_pack(case: Case, device: torch.device) -> None:
    model = case.on(device).model
    packed = loss_and_gradients(model, [SAMPLES], device)
    one_by_one = loss_and_gradients(model, [[sample] for sample in SAMPLES], device)
    assert_close(packed, one_by_one)


def test_fuse(case: Case, device: torch.device) -> None:
    """What the table names is fused, on every kind of device, and computes the same."""
    model = copy.deepcopy(case.composed.model).to(device)
    fused = fuse(model.model.language_model, device, ALL)
    assert {module.operation for module in fused.fused} == case.row.fused
    assert {module.operation for module in fused.left}.isdisjoint(case.row.fused)
    with_operators = loss_and_gradients(model, [[SAMPLES[0]]], device)
    fused.undo()
    assert_close(with_operators, loss_and_gradients(model, [[SAMPLES[0]]], device))


QUESTION = [{"from": "human", "value": "What is a red square, and a blue square?"}]


def prompts(loaded: LoadedModel) -> list[Prompt]:
    words = [QUESTION, [{"from": "human", "value": "a"}]]
    return [prepare_prompt(loaded.processor, turns, [], name="test") for turns in words]


def test_cache(case: Case, device: torch.device) -> None:
    """The engine's greedy answers, of two sequences at once, are those of computing the whole text for each token."""
    loaded = case.on(device)
    engine = InferenceEngine(loaded, max_batch=2, max_length=128)
    sampling = Sampling(max_new_tokens=8)
    for _ in range(2):  # the second time, what is kept of the first is used
        texts = engine.run([Request(prompt, sampling) for prompt in prompts(loaded)])
        for text, prompt in zip(texts, prompts(loaded), strict=True):
            assert text.strip() == greedy(case, loaded, list(prompt.input_ids)).strip()


def greedy(case: Case, loaded: LoadedModel, ids: list[int]) -> str:
    answer: list[int] = []
    ends = {loaded.processor.tokenizer.eos_token_id, case.reference.config.eos_token_id}
    with torch.no_grad():
        while len(answer) < 8:
            logits = case.reference(input_ids=torch.tensor([[*ids, *answer]]), use_cache=False).logits[0, -1]
            token = int(logits.argmax())
            if token in ends:
                break
            answer.append(token)
    return str(loaded.processor.tokenizer.decode(answer, skip_special_tokens=True))


def test_save_and_chat(case: Case, device: torch.device, tmp_path: Path) -> None:
    """What is saved loads as the same model, and answers about an image as transformers' generation does."""
    case.composed.save_pretrained(tmp_path)
    loaded = load(tmp_path, device)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor.cpu(), case.composed.model.state_dict()[name]), name
    image = Image.new("RGB", (30, 20), (220, 30, 30))
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}]
    prompt = prepare_prompt(loaded.processor, turns, [image], name="test")
    text = "".join(
        delta.text
        for delta in InferenceEngine(loaded, max_batch=1, max_length=128).generate(prompt, Sampling(max_new_tokens=8))
    )
    ids = torch.tensor([list(prompt.input_ids)])
    plain = case.composed.model.generate(
        input_ids=ids, pixel_values=prompt.images[0].pixel_values, max_new_tokens=8, do_sample=False
    )
    expected = loaded.processor.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    assert text.strip() == expected.strip()


# ---- the table ----


def table() -> str:
    """As docs/parts.md has it: every cell is a test above, on the CPU and on the simulated NPU."""
    lines = [
        "| language model | `model_type` | compose | pack | one operator each on NPUs | cache | save, chat |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        fused = ", ".join(name for name in ALL if name in row.fused)
        lines.append(f"| {row.models} | `{row.model_type}` | ✓ | ✓ | {fused} | ✓ | ✓ |")
    return "\n".join(lines)


def test_the_docs_have_this_table() -> None:
    assert table() in DOCS.read_text(encoding="utf-8"), f"docs/parts.md should have\n{table()}"
