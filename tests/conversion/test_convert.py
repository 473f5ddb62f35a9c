"""Whole checkpoints in and out, against transformers' LLaVA with the same weights and official LLaVA's key layout."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaForConditionalGeneration,
    SiglipImageProcessor,
)
from typer.testing import CliRunner

from llava_npu import UserError
from llava_npu.cli import app
from llava_npu.models import compose, load
from llava_npu.models.checkpoints.adapters import merged, read_adapter
from llava_npu.models.checkpoints.convert import Help, convert
from llava_npu.models.checkpoints.projectors import LLAVA_NPU_2024, to_original
from llava_npu.models.projectors import build_projector
from support import tiny
from support.official_models import (
    IMAGE_TOKEN_ID,
    ROWS,
    official_config,
    official_weights,
    reference_model,
    tokenizer_length,
    write_language_model,
    write_official,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_tower(folder: Path, kind: str = "clip") -> Path:
    """The tower of the reference model, in a folder of its own."""
    reference_model(kind).model.vision_tower.save_pretrained(folder)
    if kind == "clip":
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    else:
        SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of a question about one image; the columns that an official model has."""
    torch.manual_seed(7)
    input_ids = torch.randint(3, ROWS, (1, 30))
    input_ids[0, 4:20] = IMAGE_TOKEN_ID
    with torch.no_grad():
        return model(input_ids=input_ids, pixel_values=torch.randn(1, 3, 28, 28)).logits[..., :ROWS]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def without_tower(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if "vision_tower" not in name}


# ---- official in ----


@pytest.mark.parametrize("form", ["bin", "safetensors", "shards"])
@pytest.mark.parametrize("holds_tower", [True, False])
def test_an_official_model_computes_what_transformers_computes(tmp_path: Path, form: str, holds_tower: bool) -> None:
    reference = reference_model()
    weights = official_weights(reference)
    tower = write_tower(tmp_path / "tower")
    if holds_tower:  # it was trained: the one that the model names is another
        untrained = load_file(tower / "model.safetensors")
        save_file(
            {name: tensor + 1 for name, tensor in untrained.items()}, tower / "model.safetensors", {"format": "pt"}
        )
    # Its name says nothing: what a folder is, its content tells.
    source = write_official(tmp_path / "x", tower, weights if holds_tower else without_tower(weights), form)
    assert "official" in run(source, tmp_path / "hf", "--to", "hf")
    model, processor = load(tmp_path / "hf")
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-5, rtol=0)
    assert processor.template == "v1"
    assert processor.image_aspect_ratio == "pad"
    plain, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(plain.eval()), logits(reference), atol=1e-5, rtol=0)
    names = load_file(tmp_path / "hf/model.safetensors").keys()
    assert "vision_tower.vision_model.pre_layrnorm.weight" in names  # the spelling that vLLM reads
    assert "language_model.model.embed_tokens.weight" in names


@pytest.mark.slow
def test_an_official_model_loads_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = reference_model()
    source = write_official(tmp_path / "x", write_tower(tmp_path / "tower"), official_weights(reference), "bin")
    torch.testing.assert_close(logits(load(source)[0]), logits(reference), atol=1e-5, rtol=0)
    assert "a copy in Hugging Face's is made once" in capsys.readouterr().err
    load(source)
    assert "is made once" not in capsys.readouterr().err
    copied = Path(shutil.copytree(source, tmp_path / "moved"))
    load(copied)  # the same content elsewhere
    assert "is made once" not in capsys.readouterr().err
    tower = tmp_path / "tower/preprocessor_config.json"
    tower.write_text(tower.read_text().replace("0.48145466", "0.5"))  # of another part of it
    load(source)
    assert "is made once" in capsys.readouterr().err
    for damaged in (tmp_path / "cache/converted").glob("*/model.safetensors"):
        damaged.write_bytes(b"")
    load(source), load(copied)
    assert "is made once" in capsys.readouterr().err


def test_rotary_settings_of_llama_3(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 256
    weights = official_weights(reference_model())
    tower = write_tower(tmp_path / "tower")
    source = write_official(tmp_path / "x", tower, weights, "bin", rope_theta=500000.0, rope_scaling=rope)
    assert load(source).model.config.text_config.rope_parameters == {**rope, "rope_theta": 500000.0}


def test_a_projector_alone_with_its_base(tmp_path: Path) -> None:
    reference = reference_model()
    weights = official_weights(reference)
    base = write_language_model(tmp_path / "base", weights)
    folder = tmp_path / "stage-1"
    folder.mkdir()
    projector = {name: tensor for name, tensor in weights.items() if "mm_projector" in name}
    torch.save(projector, folder / "mm_projector.bin")
    tower = write_tower(tmp_path / "tower")
    (folder / "config.json").write_text(json.dumps(official_config(tower, _name_or_path=str(tmp_path / "elsewhere"))))
    with pytest.raises(UserError, match=r"holds a projector alone.*elsewhere.*--base"):
        convert(str(folder), tmp_path / "hf", "hf")
    run(folder, tmp_path / "hf", "--base", base)
    torch.testing.assert_close(logits(load(tmp_path / "hf")[0]), logits(reference), atol=1e-5, rtol=0)


def test_lora_weights_with_their_base_equal_what_peft_merges(tmp_path: Path) -> None:
    reference = reference_model()
    weights = official_weights(reference)
    base = write_language_model(tmp_path / "base", weights)
    decoder = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.get_peft_model(decoder, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path / "adapted"
    wrapped.save_pretrained(folder)
    projector = {f"base_model.model.{name}": tensor for name, tensor in weights.items() if "mm_projector" in name}
    torch.save(projector, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(official_config(write_tower(tmp_path / "tower"))))
    run(folder, tmp_path / "hf", "--base", base)
    model, _ = load(tmp_path / "hf")
    merged = wrapped.merge_and_unload()
    for name, tensor in merged.model.state_dict().items():
        rows = tensor.shape[0]
        torch.testing.assert_close(model.model.language_model.state_dict()[name][:rows], tensor, atol=1e-6, rtol=0)
    assert not torch.allclose(logits(model), logits(reference), atol=1e-2)


def _lora(tmp_path: Path, **settings: object) -> tuple[Path, object]:
    weights = official_weights(reference_model())
    base = write_language_model(tmp_path / "base", weights)
    decoder = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings}
    wrapped = peft.get_peft_model(decoder, peft.LoraConfig(**chosen))
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path / "adapted")
    return tmp_path / "adapted", wrapped


def test_ranks_and_scales_of_single_layers_are_those_of_peft(tmp_path: Path) -> None:
    folder, wrapped = _lora(
        tmp_path,
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 2, "down_proj": 8},
        alpha_pattern={"model.layers.1.mlp.down_proj": 3},
    )
    settings = json.loads((folder / "adapter_config.json").read_text())
    updates = read_adapter(folder, settings)
    before = load_file(tmp_path / "base/model.safetensors")
    merged = wrapped.merge_and_unload().state_dict()  # type: ignore[attr-defined]
    assert len(updates) == 4
    for name, update in updates.items():
        torch.testing.assert_close(update.added_to(before[name]), merged[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("lora_bias", True),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("something_of_next_year", {"a": 1}),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key} is .*merge_and_unload"):
        read_adapter(tmp_path, {"peft_type": "LORA", "r": 4, "lora_alpha": 8, key: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r is 0; it takes a whole number above 0"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; it takes a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"use_rslora": "no"}, "use_rslora is 'no'; it takes true or false"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\.q_proj is 0"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern: '\(' is not a regular expression"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]"),
    ],
)
def test_numbers_that_no_adapter_has_are_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=rf"adapter_config\.json: {message}"):
        read_adapter(tmp_path, {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings})


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        (torch.zeros(2, 6), torch.zeros(6, 2), r"have shapes \(2, 6\) and \(6, 2\); adapter_config\.json says rank 4"),
        (torch.zeros(4), torch.zeros(4), r"have shapes \(4,\) and \(4,\)"),
        (torch.zeros(4, 6).int(), torch.zeros(6, 4), r"are torch\.int32 and torch\.float32, not floating-point"),
        (
            torch.zeros(4, 6),
            torch.zeros(5, 4),
            r"changes q\.weight as a matrix of \(5, 6\); the base model's is \(6, 6\)",
        ),
        (None, None, "holds no weights"),
    ],
)
def test_updates_that_do_not_fit_are_refused(
    tmp_path: Path, down: torch.Tensor | None, up: torch.Tensor | None, message: str
) -> None:
    weights = {} if down is None or up is None else {"q.lora_A.weight": down, "q.lora_B.weight": up}
    save_file(weights, tmp_path / "adapter_model.safetensors")

    def merge() -> None:
        adapter = read_adapter(tmp_path, {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
        list(merged(iter([("q.weight", torch.zeros(6, 6))]), adapter, "base"))

    with pytest.raises(UserError, match=message):
        merge()


PREDECESSOR = {
    "ldpv2": ("ldp", {}),
    "resampler": ("resampler", {"num_queries": 4, "output_projection": False}),
    "c_abstractor": ("abs", {"hidden_size": 48, "num_input_tokens": 16}),
}


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear"])
def test_siglip_of_the_predecessor(tmp_path: Path, kind: str) -> None:
    reference = reference_model("siglip")
    weights = official_weights(reference)
    if kind == "linear":
        weights = {name: tensor for name, tensor in weights.items() if "mm_projector" not in name}
        torch.manual_seed(0)
        layer = torch.nn.Linear(32, 48)
        weights |= {f"model.mm_projector.{name}": tensor.detach() for name, tensor in layer.named_parameters()}
    tower = write_tower(tmp_path / "tower", "siglip")
    source = write_official(tmp_path / "x", tower, weights, "safetensors", mm_projector_type=kind)
    model, processor = load(source)
    assert processor.num_image_tokens == 16  # all patches: there is no class token to drop
    if kind == "mlp2x_gelu":
        torch.testing.assert_close(logits(model), logits(reference), atol=1e-5, rtol=0)
    else:
        features = torch.randn(1, 16, 32)
        torch.testing.assert_close(model.model.project(features), layer(features))


@pytest.mark.slow
@pytest.mark.parametrize("kind", PREDECESSOR)
def test_a_projector_of_the_predecessor_goes_in_and_out(tmp_path: Path, kind: str) -> None:
    named, options = PREDECESSOR[kind]
    torch.manual_seed(0)
    projector = build_projector(kind, vision_hidden_size=32, text_hidden_size=48, **options).eval()
    theirs = to_original(kind, LLAVA_NPU_2024, projector.state_dict())
    weights = {
        **{n: t for n, t in official_weights(reference_model()).items() if "mm_projector" not in n},
        **{f"model.mm_projector.{name}": tensor.contiguous() for name, tensor in theirs.items()},
    }
    tower = write_tower(tmp_path / "tower")
    source = write_official(tmp_path / "x", tower, weights, "bin", mm_projector_type=named)
    model, _ = load(source)
    features = torch.randn(1, 16, 32)
    torch.testing.assert_close(model.model.project(features), projector(features, grid=(4, 4)))
    convert(str(source), tmp_path / "hf", "hf")
    convert(str(tmp_path / "hf"), tmp_path / "back", "official")
    back = load_file(tmp_path / "back/model.safetensors")
    assert json.loads((tmp_path / "back/config.json").read_text())["mm_projector_type"] == named
    for name, tensor in without_tower(weights).items():
        if "output_linear" not in name:  # which was never applied
            assert torch.equal(back[name], tensor), name


# ---- out, and round ----


@pytest.mark.slow
def test_official_to_hugging_face_and_back_is_exact_to_the_bit(tmp_path: Path) -> None:
    weights = official_weights(reference_model())
    tower = write_tower(tmp_path / "tower")
    source = write_official(tmp_path / "x", tower, {n: t.bfloat16() for n, t in weights.items()}, "shards")
    convert(str(source), tmp_path / "hf", "hf", shard_bytes=50_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    run(tmp_path / "hf", tmp_path / "back", "--to", "official")
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == without_tower(weights).keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, weights[name].bfloat16()), name
    own_tower = load_file(tmp_path / "back/vision_tower/model.safetensors")
    for name, tensor in own_tower.items():
        assert torch.equal(tensor, weights[f"model.vision_tower.vision_tower.{name}"].bfloat16()), name
    values = json.loads((tmp_path / "back/config.json").read_text())
    before = json.loads((source / "config.json").read_text())
    changed = {key for key in before if values.get(key) != before[key]}
    assert changed <= {"model_type", "mm_vision_tower", "torch_dtype", "bos_token_id"}
    assert tokenizer_length(tmp_path / "back") == ROWS
    convert(str(tmp_path / "hf"), tmp_path / "named", "official", Help(vision_tower=str(tower)))
    assert not (tmp_path / "named/vision_tower").exists()
    trained = load_file(tower / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in trained.items()}, tower / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"weights of the vision tower in .*hf are not those of"):
        convert(str(tmp_path / "hf"), tmp_path / "lost", "official", Help(vision_tower=str(tower)))
    moved = (tmp_path / "back").rename(tmp_path / "moved")  # its tower is found beside it, wherever it goes
    torch.testing.assert_close(logits(load(moved)[0].float()), logits(load(tmp_path / "hf")[0].float()))


def test_added_tokens_keep_their_rows(tmp_path: Path) -> None:
    tower = write_tower(tmp_path / "tower")
    convert(
        str(write_official(tmp_path / "x", tower, official_weights(reference_model()), "bin")), tmp_path / "hf", "hf"
    )
    model, processor = load(tmp_path / "hf")
    processor.tokenizer.add_tokens(["<point>"])
    point = processor.tokenizer.convert_tokens_to_ids("<point>")
    torch.nn.init.normal_(model.get_input_embeddings().weight[point].data)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "trained")
    convert(str(tmp_path / "trained"), tmp_path / "official", "official")
    convert(str(tmp_path / "official"), tmp_path / "back", "hf")
    for folder in ("official", "back"):
        words = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert words("<point>", add_special_tokens=False)["input_ids"] == [point]
    again, _ = load(tmp_path / "back")
    assert torch.equal(again.get_input_embeddings().weight[point], model.get_input_embeddings().weight[point])


def _classic(name: str) -> str:
    name = name.replace("model.language_model.", "language_model.model.").replace(
        "model.vision_tower.", "vision_tower."
    )
    return name.replace("lm_head", "language_model.lm_head").replace("model.multi_modal", "multi_modal")


def _as_of_4_52(name: str) -> str:
    return name.replace("model.vision_tower.", "model.vision_tower.vision_model.")


@pytest.mark.parametrize("spelling", [_classic, _as_of_4_52, lambda name: name])
def test_every_spelling_of_hugging_face_is_read(tmp_path: Path, spelling: object) -> None:
    assert callable(spelling)
    model, processor = compose(
        str(tiny.write_clip(tmp_path / "clip")),
        str(tiny.write_language_model(tmp_path / "lm", tie_word_embeddings=False)),
    )
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    renamed = {spelling(name): tensor for name, tensor in model.state_dict().items()}
    save_file(renamed, tmp_path / "source/model.safetensors")
    run(tmp_path / "source", tmp_path / "out")
    again, _ = load(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.slow
def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model, processor = compose(
        str(tiny.write_clip(tmp_path / "clip")),
        str(tiny.write_language_model(tmp_path / "lm")),
        "ldpv2",
        {"num_queries": 4},
    )
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    assert "llava-npu" in run(tmp_path / "source", tmp_path / "out")
    again, _ = load(tmp_path / "out")
    assert again.lm_head.weight is again.get_input_embeddings().weight
    torch.testing.assert_close(logits_of(again), logits_of(model.eval()))


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    input_ids = torch.randint(3, 280, (1, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=input_ids).logits


# ---- what may be wrong ----


class _Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("this must not run",))


def _official(tmp_path: Path, weights: dict[str, torch.Tensor], **config: object) -> Path:
    return write_official(tmp_path / "x", write_tower(tmp_path / "tower"), weights, "bin", **config)


def test_weights_that_do_not_fit_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    weights = official_weights(reference_model())
    lost = "model.layers.1.mlp.up_proj.weight"
    cases = {
        "language_model.model.layers.1.mlp.up_proj.weight": {n: t for n, t in weights.items() if n != lost},
        "model.extra": {**weights, "model.extra": torch.ones(2)},
        r"up_proj.weight has shape \(3, 3\)": {**weights, lost: torch.ones(3, 3)},
        "no projector": {name: tensor for name, tensor in weights.items() if "mm_projector" not in name},
    }
    for message, wrong in cases.items():
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        source = _official(tmp_path, wrong)
        with pytest.raises(UserError, match=message):
            convert(str(source), tmp_path / "out", "hf")
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _official(tmp_path, official_weights(reference_model()))
    with (source / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"model.norm.weight": _Harm()}, file)
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        convert(str(source), tmp_path / "out", "hf")
    assert "this must not run" not in capsys.readouterr().out


def test_other_mistakes_are_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _official(tmp_path, official_weights(reference_model()))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(UserError, match="not empty"):
        convert(str(source), tmp_path / "full", "hf")
    with pytest.raises(UserError, match="is not a folder"):
        convert(str(tmp_path / "absent"), tmp_path / "out", "hf")
    with pytest.raises(UserError, match="whole model and needs no base"):
        convert(str(source), tmp_path / "out", "hf", Help(base="anything"))
    convert(str(source), tmp_path / "hf", "hf")
    with pytest.raises(UserError, match="is of Hugging Face's layout"):
        convert(str(tmp_path / "hf"), tmp_path / "out", "hf", Help(base="anything"))
    with pytest.raises(UserError, match="is not a LLaVA model"):
        convert(str(tiny.write_language_model(tmp_path / "lm")), tmp_path / "out", "hf")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match="needs about"):
        convert(str(source), tmp_path / "out", "hf")


@pytest.mark.slow
def test_vicunas_vocabulary_grows_to_32064_and_shrinks_back(tmp_path: Path) -> None:
    """As `llava-hf/llava-1.5-7b-hf` has it: 32000 pieces, `<image>` behind them, padded to a multiple of 64."""
    tower = write_tower(tmp_path / "tower")
    weights = official_weights(reference_model())
    torch.manual_seed(0)
    weights["model.embed_tokens.weight"] = torch.randn(32000, 48)
    weights["lm_head.weight"] = torch.randn(32000, 48)
    source = write_official(tmp_path / "x", tower, weights, "safetensors", vocab_size=32000)
    for path in source.glob("*token*"):
        path.unlink()
    shutil.copy(Path(__file__).parent.parent / "golden/llama_tokenizer.model", source / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "unk_token": "<unk>"}
    settings |= {"pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))

    convert(str(source), tmp_path / "hf", "hf")
    model, processor = load(tmp_path / "hf")
    assert model.config.text_config.vocab_size == 32064
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>") == 32000
    ids = processor.encode_prompt([{"from": "human", "value": "<image>\nWhat"}], [(9, 9)], "prompt")
    assert ids[0] == 1
    assert ids[ids.index(32000) - 2 :][:2] == [29901, 29871]
    assert ids[ids.index(32000) + 16 :][:3] == [29871, 13, 5618]  # official LLaVA's extra ▁ (llava-facts, C.4)
    convert(str(tmp_path / "hf"), tmp_path / "back", "official")
    assert json.loads((tmp_path / "back/config.json").read_text())["vocab_size"] == 32000
    assert (tmp_path / "back/tokenizer.model").is_file()
    assert tokenizer_length(tmp_path / "back") == 32000
    back = load_file(tmp_path / "back/model.safetensors")
    assert torch.equal(back["lm_head.weight"], weights["lm_head.weight"])
