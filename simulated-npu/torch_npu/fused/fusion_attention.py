"""`npu_fusion_attention`: flash attention for training, dense and of variable length (TND)."""

from __future__ import annotations

from itertools import pairwise

import torch

from torch_npu.fused._attention import (
    COMPRESSED_MASK_SIZE,
    attend,
    compressed_mask,
    join_heads,
    outside_band,
    split_heads,
)
from torch_npu.fused._operator import (
    FLOATING,
    UNLIMITED,
    fused_operator,
    require,
    require_dtype,
    require_npu,
    require_unused,
)

NAME = "npu_fusion_attention"
DENSE_LAYOUTS = ("BSH", "SBH", "BSND", "BNSD")
RANKS = {"BSH": 3, "SBH": 3, "BSND": 4, "BNSD": 4, "TND": 3}
MAX_HEADS = 256
MAX_HEAD_SIZE = 768
MAX_SEQUENCES = 1024  # in one TND call

FULL_MASK, ALL_MASK, TOP_LEFT_CAUSAL, BOTTOM_RIGHT_CAUSAL, BAND = range(5)  # sparse_mode
COMPRESSED_MODES = (TOP_LEFT_CAUSAL, BOTTOM_RIGHT_CAUSAL, BAND)
ROBUST_TO_EMPTY_ROWS = 2  # inner_precise


@fused_operator(
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None, "
    "Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
    "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
    "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    'bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, int offset=0) '
    "-> (Tensor, Tensor, Tensor, Tensor, int, int, int)",
    held_outputs=(0, 1, 2),  # the output, the maxima and sums of the softmax
)
def npu_fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    pse: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = UNLIMITED,
    next_tockens: int = UNLIMITED,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: torch.Tensor | None = None,
    dropout_mask: torch.Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, int]:
    """Returns (output, softmax maxima, softmax sums, an unused tensor, dropout seed, offset, length)."""
    # pse: the documentation contradicts itself on whether it is added before or after the scale.
    require_unused(NAME, {"pse": pse, "padding_mask": padding_mask, "prefix": prefix, "sink": sink})
    require_unused(NAME, {"dropout_mask": dropout_mask})
    require(seed == 0 and offset == 0, NAME, "a seed or offset of the caller's is not simulated")
    require_npu(NAME, query=query, key=key, value=value, atten_mask=atten_mask)
    require_dtype(NAME, FLOATING, query=query, key=key, value=value)
    require(0 < keep_prob <= 1, NAME, f"keep_prob is the probability to keep, in (0, 1], got {keep_prob}")
    require(input_layout in RANKS, NAME, f"input_layout must be one of {', '.join(RANKS)}, got {input_layout!r}")
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        shape = tuple(tensor.shape)
        require(tensor.dim() == RANKS[input_layout], NAME, f"{name} {shape} does not fit layout {input_layout}")
    require(1 <= head_num <= MAX_HEADS, NAME, f"head_num must be 1 to {MAX_HEADS}, got {head_num}")
    _check_mask_is_meant(atten_mask, sparse_mode, pre_tockens, next_tockens)
    _check_mask_values(atten_mask, sparse_mode)

    if input_layout == "TND":
        require(softmax_layout in ("", "TND"), NAME, f"softmax_layout must be '' or 'TND', got {softmax_layout!r}")
        output, maxima, sums = _variable_length(
            query, key, value, head_num, atten_mask, scale, keep_prob, pre_tockens, next_tockens, inner_precise,
            actual_seq_qlen, actual_seq_kvlen, sparse_mode,
        )  # fmt: skip
    else:
        require(softmax_layout == "", NAME, "softmax_layout is for layout TND")
        require(actual_seq_qlen is None and actual_seq_kvlen is None, NAME, "actual_seq_qlen/kvlen are for layout TND")
        output, maxima, sums = _dense(
            query, key, value, head_num, input_layout, atten_mask, scale, keep_prob, pre_tockens, next_tockens,
            inner_precise, sparse_mode,
        )  # fmt: skip
    return output, maxima, sums, query.new_empty(0), 0, 0, 0


def _check_mask_is_meant(mask: torch.Tensor | None, sparse_mode: int, before: int, after: int) -> None:
    """Without a mask the real operator ignores every other sign of causality and attends to everything."""
    require(sparse_mode in range(9), NAME, f"sparse_mode must be 0 to 8, got {sparse_mode}")
    require(sparse_mode <= BAND, NAME, f"sparse_mode {sparse_mode} is not simulated (0 to 4 are)")
    if mask is None:
        require(
            sparse_mode == FULL_MASK,
            NAME,
            f"sparse_mode={sparse_mode} without atten_mask: the hardware would compute full attention",
        )
        require(
            before == UNLIMITED and after == UNLIMITED,
            NAME,
            f"pre_tockens={before}, next_tockens={after} without atten_mask: the hardware would compute full attention",
        )


def _check_mask_values(mask: torch.Tensor | None, sparse_mode: int) -> None:
    if mask is None:
        return
    require(mask.dtype in (torch.bool, torch.uint8), NAME, f"atten_mask must be bool or uint8, got {mask.dtype}")
    require(
        mask.dtype == torch.bool or int(mask.max()) <= 1,
        NAME,
        "a uint8 atten_mask must hold 0 (keep) and 1 (mask) only",
    )
    if sparse_mode in COMPRESSED_MODES:
        size = COMPRESSED_MASK_SIZE
        require(
            tuple(mask.shape) == (size, size),
            NAME,
            f"sparse_mode={sparse_mode} takes the compressed mask of shape ({size}, {size}), got {tuple(mask.shape)}",
        )
        require(
            torch.equal(mask.bool(), compressed_mask(mask.device)),
            NAME,
            f"sparse_mode={sparse_mode} takes an atten_mask that is True (masked) strictly above the diagonal",
        )


def _check_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, head_num: int) -> None:
    """All as (batch, heads, length, size)."""
    heads, key_heads = query.shape[1], key.shape[1]
    require(heads == head_num, NAME, f"head_num is {head_num}, query has {heads} heads")
    require(key.shape[:3] == value.shape[:3], NAME, "key and value must agree in batch, heads and length")
    require(query.shape[0] == key.shape[0], NAME, f"batch of query is {query.shape[0]}, of key {key.shape[0]}")
    require(heads % key_heads == 0, NAME, f"query's {heads} heads must be a multiple of key's {key_heads}")
    require(
        query.shape[3] == key.shape[3] >= value.shape[3],
        NAME,
        f"head sizes must be query = key >= value, got {query.shape[3]}, {key.shape[3]}, {value.shape[3]}",
    )
    require(1 <= query.shape[3] <= MAX_HEAD_SIZE, NAME, f"head size must be 1 to {MAX_HEAD_SIZE}")


def _masked(
    mask: torch.Tensor | None, sparse_mode: int, queries: int, keys: int, before: int, after: int, inner_precise: int
) -> torch.Tensor | None:
    """What is masked for one length of queries and keys; `mask` ends in (queries, keys) unless it is compressed."""
    if mask is None:
        return None
    rows = torch.arange(queries, device=mask.device)[:, None]
    columns = torch.arange(keys, device=mask.device)[None, :]
    shift = 0 if sparse_mode in (FULL_MASK, TOP_LEFT_CAUSAL) else keys - queries
    if sparse_mode in (TOP_LEFT_CAUSAL, BOTTOM_RIGHT_CAUSAL):
        masked = outside_band(rows, columns, UNLIMITED, 0, shift)
    elif sparse_mode == BAND:
        require(before + after >= 0, NAME, f"pre_tockens={before} and next_tockens={after} leave no band")
        masked = outside_band(rows, columns, before, after, shift)
    else:
        masked = mask.bool()
        contradicted = sparse_mode == FULL_MASK and bool((outside_band(rows, columns, before, after) & ~masked).any())
        require(
            not contradicted,
            NAME,
            f"atten_mask keeps positions that pre_tockens={before}, next_tockens={after} exclude (sparse_mode 0)",
        )
    finds_empty_rows_itself = sparse_mode == BOTTOM_RIGHT_CAUSAL
    require(
        finds_empty_rows_itself or inner_precise == ROBUST_TO_EMPTY_ROWS or not bool(masked.all(dim=-1).any()),
        NAME,
        "atten_mask masks a whole row: its result is undefined unless inner_precise=2",
    )
    return masked


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    layout: str,
    mask: torch.Tensor | None,
    scale: float,
    keep_prob: float,
    before: int,
    after: int,
    inner_precise: int,
    sparse_mode: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    key_heads = head_num
    if layout in ("BSH", "SBH"):
        width = query.shape[-1]
        require(width % head_num == 0, NAME, f"head_num {head_num} does not divide query's width {width}")
        size = width // head_num
        require(key.shape[-1] % size == 0, NAME, f"key's width {key.shape[-1]} is no multiple of the head size {size}")
        key_heads = key.shape[-1] // size
        require(
            value.shape[-1] % key_heads == 0, NAME, f"value's width {value.shape[-1]} does not fit {key_heads} heads"
        )
    query = split_heads(query, layout, head_num)
    key, value = (split_heads(tensor, layout, key_heads) for tensor in (key, value))
    _check_shapes(query, key, value, head_num)

    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if mask is not None and sparse_mode not in COMPRESSED_MODES:
        allowed = {
            (batch, heads, queries, keys),
            (batch, 1, queries, keys),
            (1, 1, queries, keys),
            (queries, keys),
        }
        require(tuple(mask.shape) in allowed, NAME, f"atten_mask {tuple(mask.shape)} is none of {sorted(allowed)}")
    masked = _masked(mask, sparse_mode, queries, keys, before, after, inner_precise)
    output, maxima, sums = attend(query, key, value, masked, scale, keep_prob)
    return join_heads(output, layout), maxima.expand(-1, -1, -1, 8), sums.expand(-1, -1, -1, 8)


def _variable_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    mask: torch.Tensor | None,
    scale: float,
    keep_prob: float,
    before: int,
    after: int,
    inner_precise: int,
    query_ends: list[int] | None,
    key_ends: list[int] | None,
    sparse_mode: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    require(bool(query_ends) and bool(key_ends), NAME, "layout TND needs actual_seq_qlen and actual_seq_kvlen")
    assert query_ends is not None
    assert key_ends is not None
    require(len(query_ends) == len(key_ends), NAME, "actual_seq_qlen and actual_seq_kvlen must be equally long")
    require(len(query_ends) <= MAX_SEQUENCES, NAME, f"at most {MAX_SEQUENCES} sequences fit one TND call")
    query_ends = _check_ends("actual_seq_qlen", query_ends, query.shape[0])
    key_ends = _check_ends("actual_seq_kvlen", key_ends, key.shape[0])
    if mask is not None and sparse_mode not in COMPRESSED_MODES:
        longest = tuple(max(b - a for a, b in pairwise([0, *ends])) for ends in (query_ends, key_ends))
        require(
            tuple(mask.shape) == longest,
            NAME,
            f"with TND, atten_mask must have shape {longest}, got {tuple(mask.shape)}",
        )

    outputs, all_maxima, all_sums = [], [], []
    require(len(query_ends) == len(key_ends), NAME, "actual_seq_qlen and actual_seq_kvlen leave out other sequences")
    for (q0, q1), (k0, k1) in zip(pairwise([0, *query_ends]), pairwise([0, *key_ends]), strict=True):
        if q0 == q1:
            continue  # an empty sequence
        require(k0 < k1, NAME, f"a sequence of {q1 - q0} queries has no keys")
        # (length, heads, size) -> (1, heads, length, size)
        one_query, one_key, one_value = (
            part.transpose(0, 1)[None] for part in (query[q0:q1], key[k0:k1], value[k0:k1])
        )
        _check_shapes(one_query, one_key, one_value, head_num)
        queries, keys = q1 - q0, k1 - k0
        require(
            mask is None
            or sparse_mode != BOTTOM_RIGHT_CAUSAL
            or queries <= keys
            or inner_precise == ROBUST_TO_EMPTY_ROWS,
            NAME,
            f"sparse_mode=3 with {queries} queries on {keys} keys masks whole rows, which layout TND does not take",
        )
        one_mask = mask if mask is None or sparse_mode in COMPRESSED_MODES else mask[:queries, :keys]
        masked = _masked(one_mask, sparse_mode, queries, keys, before, after, inner_precise)
        output, maxima, sums = attend(one_query, one_key, one_value, masked, scale, keep_prob)
        outputs.append(output[0].transpose(0, 1))
        all_maxima.append(maxima[0].transpose(0, 1).expand(-1, -1, 8))
        all_sums.append(sums[0].transpose(0, 1).expand(-1, -1, 8))
    # Rows of sequences left out (trailing zeros in the lengths) are never written: nobody may rely on them.
    rest = query.shape[0] - query_ends[-1]
    outputs.append(query.new_full((rest, head_num, value.shape[-1]), float("nan")))
    for statistics in (all_maxima, all_sums):
        statistics.append(query.new_full((rest, head_num, 8), float("nan"), dtype=torch.float32))
    return torch.cat(outputs), torch.cat(all_maxima), torch.cat(all_sums)


def _check_ends(name: str, ends: list[int], tokens: int) -> list[int]:
    """Checks cumulative lengths, and drops the trailing zeros that leave sequences out."""
    require(ends[0] != 0, NAME, f"{name} holds the sequences' ends, without a leading 0: {ends}")
    kept = list(ends)
    while kept[-1] == 0:
        kept.pop()
    require(all(a <= b for a, b in pairwise(kept)), NAME, f"{name} must be cumulative, got {ends}")
    complete = kept[-1] == tokens if len(kept) == len(ends) else kept[-1] <= tokens
    require(complete, NAME, f"{name} ends at {kept[-1]}, the tensor has {tokens} tokens")
    return kept
