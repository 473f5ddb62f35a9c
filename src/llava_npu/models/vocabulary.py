"""Rows for added tokens in a language model's embedding and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava_npu.files.cache import build_once, cache_root, digest_of
from llava_npu.models.sources import model_fingerprint

EMBEDDING_MULTIPLE = 64  # vocabulary rows are padded to this multiple, as in transformers' LLaVA (32064)
_SMALL = 64 * 2**20  # bytes of tables that every process may have to itself
_FILE = "tables.safetensors"


def enlarged_rows(rows: int, tokens: int) -> int:
    """How many rows a vocabulary of `rows` has once there are as many `tokens`; it is never shrunk."""
    return rows if tokens <= rows else -(-tokens // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE


def enlarge_vocabulary(decoder: Any, tokens: int) -> None:
    """Gives a language model rows for this number of tokens, the new ones drawn near the mean of the old ones."""
    decoder.resize_token_embeddings(tokens, pad_to_multiple_of=EMBEDDING_MULTIPLE)


def enlarge_vocabulary_once(decoder: Any, tokens: int) -> None:
    """As `enlarge_vocabulary`, in float32, for a model whose weights are mapped (`mapped.py`).

    Tables that were enlarged are in no file of the model. One process of the host makes them and writes them into the
    user's cache; all map them from there. The random numbers that follow are those that would follow the drawing.
    """
    modules = _tables(decoder)
    if 4 * sum(table.weight.numel() for table in modules.values()) <= _SMALL:
        _enlarge_in_float32(decoder, tokens)
        return
    facts = [tokens, EMBEDDING_MULTIPLE, torch.initial_seed()]
    folder = cache_root() / "vocabularies" / digest_of(model_fingerprint(decoder.config.name_or_path), *facts)

    def write(target: Path) -> None:
        _enlarge_in_float32(decoder, tokens)
        made = {name: table.weight.detach() for name, table in _tables(decoder).items()}
        save_file({**made, "random": torch.get_rng_state()}, target / _FILE)

    build_once(folder, write)
    stored = load_file(folder / _FILE)
    for table in modules.values():  # on meta, where enlarging costs nothing
        table.weight = nn.Parameter(torch.empty_like(table.weight, dtype=torch.float32, device="meta"))
    decoder.tie_weights()
    decoder.resize_token_embeddings(tokens, pad_to_multiple_of=EMBEDDING_MULTIPLE, mean_resizing=False)
    for name, table in _tables(decoder).items():
        table.weight = nn.Parameter(stored[name])
    decoder.tie_weights()
    torch.set_rng_state(stored["random"])


def _enlarge_in_float32(decoder: Any, tokens: int) -> None:
    for table in _tables(decoder).values():
        table.weight = nn.Parameter(table.weight.detach().float())
    decoder.tie_weights()
    enlarge_vocabulary(decoder, tokens)


def _tables(decoder: Any) -> dict[str, Any]:
    """The embedding, and the head where it has weights of its own."""
    embedding, head = decoder.get_input_embeddings(), decoder.get_output_embeddings()
    tied = head.weight is embedding.weight
    return {"embedding": embedding} if tied else {"embedding": embedding, "head": head}
