"""Attention for generation: `npu_prompt_flash_attention` (prefill), `npu_incre_flash_attention` (one new token per
sequence) and `npu_fused_infer_attention_score` (both). None of them has a gradient, and none takes float32.
"""

from __future__ import annotations

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
    HALF,
    UNLIMITED,
    fused_operator,
    require,
    require_dtype,
    require_npu,
    require_unused,
)

PROMPT = "npu_prompt_flash_attention"
INCREMENTAL = "npu_incre_flash_attention"
FUSED_INFER = "npu_fused_infer_attention_score"
MASKED_KEYS_READ = 512  # by FUSED_INFER, for one query

RANKS = {"BSH": 3, "BSND": 4, "BNSD": 4, "BNSD_BSND": 4}
MAX_HEADS = 256
MAX_HEAD_SIZE = 512
MAX_WIDTH = 65535  # heads * head size, for layouts that keep them together
MAX_GROUP = 64  # query heads per key head
FULL_MASK, ALL_MASK, TOP_LEFT_CAUSAL, BOTTOM_RIGHT_CAUSAL, BAND = range(5)  # sparse_mode


@fused_operator(
    "npu_prompt_flash_attention(Tensor query, Tensor key, Tensor value, *, Tensor? padding_mask=None, "
    "Tensor? atten_mask=None, Tensor? pse_shift=None, int[]? actual_seq_lengths=None, Tensor? deq_scale1=None, "
    "Tensor? quant_scale1=None, Tensor? deq_scale2=None, Tensor? quant_scale2=None, Tensor? quant_offset2=None, "
    "int num_heads=1, float scale_value=1.0, int pre_tokens=2147483647, int next_tokens=0, "
    'str input_layout="BSH", int num_key_value_heads=0, int[]? actual_seq_lengths_kv=None, int sparse_mode=0) '
    "-> Tensor"
)
def npu_prompt_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    pse_shift: torch.Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    deq_scale1: torch.Tensor | None = None,
    quant_scale1: torch.Tensor | None = None,
    deq_scale2: torch.Tensor | None = None,
    quant_scale2: torch.Tensor | None = None,
    quant_offset2: torch.Tensor | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    pre_tokens: int = UNLIMITED,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    actual_seq_lengths_kv: list[int] | None = None,
    sparse_mode: int = 0,
) -> torch.Tensor:
    require_unused(PROMPT, {"padding_mask": padding_mask, "pse_shift": pse_shift, "deq_scale1": deq_scale1})
    require_unused(PROMPT, {"quant_scale1": quant_scale1, "deq_scale2": deq_scale2, "quant_scale2": quant_scale2})
    require_unused(PROMPT, {"quant_offset2": quant_offset2})
    # The default next_tokens=0 reads as causal, yet without a mask it is ignored: whoever wants full attention says so.
    require(
        atten_mask is not None or sparse_mode != FULL_MASK or next_tokens == UNLIMITED,
        PROMPT,
        f"without atten_mask every position attends to every other; pass next_tokens={UNLIMITED} if that is meant",
    )
    output, _, _ = _prompt(
        PROMPT, query, key, value, atten_mask, actual_seq_lengths, actual_seq_lengths_kv, num_heads, scale_value,
        pre_tokens, next_tokens, input_layout, num_key_value_heads, sparse_mode, inner_precise=0,
    )  # fmt: skip
    return output


@fused_operator(
    "npu_incre_flash_attention(Tensor query, Tensor key, Tensor value, *, Tensor? padding_mask=None, "
    "Tensor? atten_mask=None, Tensor? pse_shift=None, SymInt[]? actual_seq_lengths=None, "
    "Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, Tensor? block_table=None, "
    "Tensor? dequant_scale1=None, Tensor? quant_scale1=None, Tensor? dequant_scale2=None, Tensor? quant_scale2=None, "
    "Tensor? quant_offset2=None, Tensor? kv_padding_size=None, int num_heads=1, float scale_value=1.0, "
    'str input_layout="BSH", int num_key_value_heads=0, int block_size=0, int inner_precise=1) -> Tensor'
)
def npu_incre_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    pse_shift: torch.Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    antiquant_scale: torch.Tensor | None = None,
    antiquant_offset: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    dequant_scale1: torch.Tensor | None = None,
    quant_scale1: torch.Tensor | None = None,
    dequant_scale2: torch.Tensor | None = None,
    quant_scale2: torch.Tensor | None = None,
    quant_offset2: torch.Tensor | None = None,
    kv_padding_size: torch.Tensor | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    block_size: int = 0,
    inner_precise: int = 1,
) -> torch.Tensor:
    require_unused(INCREMENTAL, {"padding_mask": padding_mask, "pse_shift": pse_shift, "block_table": block_table})
    require_unused(INCREMENTAL, {"antiquant_scale": antiquant_scale, "antiquant_offset": antiquant_offset})
    require_unused(INCREMENTAL, {"dequant_scale1": dequant_scale1, "quant_scale1": quant_scale1})
    require_unused(INCREMENTAL, {"dequant_scale2": dequant_scale2, "quant_scale2": quant_scale2})
    require_unused(INCREMENTAL, {"quant_offset2": quant_offset2})
    require(block_size == 0, INCREMENTAL, "paged key/value caches are not simulated")
    require(inner_precise in (0, 1), INCREMENTAL, f"inner_precise must be 0 or 1, got {inner_precise}")
    require(input_layout != "BNSD_BSND", INCREMENTAL, "input_layout must be BSH, BSND or BNSD")
    output, _, _ = _incremental(
        INCREMENTAL, query, key, value, atten_mask, actual_seq_lengths, kv_padding_size, num_heads, scale_value,
        input_layout, num_key_value_heads,
    )  # fmt: skip
    return output


@fused_operator(
    "npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None, "
    "Tensor? atten_mask=None, SymInt[]? actual_seq_lengths=None, SymInt[]? actual_seq_lengths_kv=None, "
    "Tensor? dequant_scale1=None, Tensor? quant_scale1=None, Tensor? dequant_scale2=None, Tensor? quant_scale2=None, "
    "Tensor? quant_offset2=None, Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, "
    "Tensor? key_antiquant_scale=None, Tensor? key_antiquant_offset=None, Tensor? value_antiquant_scale=None, "
    "Tensor? value_antiquant_offset=None, Tensor? block_table=None, Tensor? query_padding_size=None, "
    "Tensor? kv_padding_size=None, Tensor? key_shared_prefix=None, Tensor? value_shared_prefix=None, "
    "SymInt[]? actual_shared_prefix_len=None, Tensor? query_rope=None, Tensor? key_rope=None, "
    "Tensor? key_rope_antiquant_scale=None, int num_heads=1, float scale=1.0, int pre_tokens=2147483647, "
    'int next_tokens=2147483647, str input_layout="BSH", int num_key_value_heads=0, int sparse_mode=0, '
    "int inner_precise=0, int block_size=0, int antiquant_mode=0, int key_antiquant_mode=0, "
    "int value_antiquant_mode=0, bool softmax_lse_flag=False) -> (Tensor, Tensor)"
)
def npu_fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    pse_shift: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    dequant_scale1: torch.Tensor | None = None,
    quant_scale1: torch.Tensor | None = None,
    dequant_scale2: torch.Tensor | None = None,
    quant_scale2: torch.Tensor | None = None,
    quant_offset2: torch.Tensor | None = None,
    antiquant_scale: torch.Tensor | None = None,
    antiquant_offset: torch.Tensor | None = None,
    key_antiquant_scale: torch.Tensor | None = None,
    key_antiquant_offset: torch.Tensor | None = None,
    value_antiquant_scale: torch.Tensor | None = None,
    value_antiquant_offset: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    query_padding_size: torch.Tensor | None = None,
    kv_padding_size: torch.Tensor | None = None,
    key_shared_prefix: torch.Tensor | None = None,
    value_shared_prefix: torch.Tensor | None = None,
    actual_shared_prefix_len: list[int] | None = None,
    query_rope: torch.Tensor | None = None,
    key_rope: torch.Tensor | None = None,
    key_rope_antiquant_scale: torch.Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = UNLIMITED,
    next_tokens: int = UNLIMITED,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    antiquant_mode: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (output, log-sum-exp of the scores), the latter (batch, heads, queries, 1) if asked for, else [0.0]."""
    require_unused(FUSED_INFER, {"pse_shift": pse_shift, "block_table": block_table})
    require_unused(FUSED_INFER, {"dequant_scale1": dequant_scale1, "quant_scale1": quant_scale1})
    require_unused(FUSED_INFER, {"dequant_scale2": dequant_scale2, "quant_scale2": quant_scale2})
    require_unused(FUSED_INFER, {"quant_offset2": quant_offset2, "query_padding_size": query_padding_size})
    require_unused(FUSED_INFER, {"antiquant_scale": antiquant_scale, "antiquant_offset": antiquant_offset})
    require_unused(FUSED_INFER, {"key_antiquant_scale": key_antiquant_scale})
    require_unused(FUSED_INFER, {"key_antiquant_offset": key_antiquant_offset})
    require_unused(FUSED_INFER, {"value_antiquant_scale": value_antiquant_scale})
    require_unused(FUSED_INFER, {"value_antiquant_offset": value_antiquant_offset})
    require_unused(FUSED_INFER, {"key_shared_prefix": key_shared_prefix, "value_shared_prefix": value_shared_prefix})
    require_unused(FUSED_INFER, {"actual_shared_prefix_len": actual_shared_prefix_len})
    require_unused(FUSED_INFER, {"query_rope": query_rope, "key_rope": key_rope})
    require_unused(FUSED_INFER, {"key_rope_antiquant_scale": key_rope_antiquant_scale})
    require(block_size == 0, FUSED_INFER, "paged key/value caches are not simulated")
    quantisation = (antiquant_mode, key_antiquant_mode, value_antiquant_mode)
    require(quantisation == (0, 0, 0), FUSED_INFER, "quantised key/value caches are not simulated")

    _check_inputs(FUSED_INFER, query, key, value, atten_mask, input_layout)
    if _length(query, input_layout) == 1:
        require(inner_precise in (0, 1), FUSED_INFER, f"one query takes inner_precise 0 or 1, got {inner_precise}")
        require(input_layout != "BNSD_BSND", FUSED_INFER, "layout BNSD_BSND is for more than one query")
        require(
            sparse_mode == FULL_MASK and pre_tokens == UNLIMITED and next_tokens == UNLIMITED,
            FUSED_INFER,
            "with one query per sequence, sparse_mode, pre_tokens and next_tokens have no effect: leave them out",
        )
        mask = _as_far_as_it_is_read(atten_mask)
        output, maxima, sums = _incremental(
            FUSED_INFER, query, key, value, mask, actual_seq_lengths_kv, kv_padding_size, num_heads, scale,
            input_layout, num_key_value_heads,
        )  # fmt: skip
    else:
        require(inner_precise in range(4), FUSED_INFER, f"inner_precise must be 0 to 3, got {inner_precise}")
        require_unused(FUSED_INFER, {"kv_padding_size (with more than one query)": kv_padding_size})
        output, maxima, sums = _prompt(
            FUSED_INFER, query, key, value, atten_mask, actual_seq_lengths, actual_seq_lengths_kv, num_heads, scale,
            pre_tokens, next_tokens, input_layout, num_key_value_heads, sparse_mode, inner_precise,
        )  # fmt: skip
        size = query.shape[-1] // num_heads if input_layout == "BSH" else query.shape[-1]
        require(size % 16 == 0, FUSED_INFER, f"with several queries the head size must be a multiple of 16, got {size}")
    if not softmax_lse_flag:
        return output, query.new_zeros(1, dtype=torch.float32)
    return output, sums.log() + maxima


def _as_far_as_it_is_read(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask that one query is computed with: users report that keys past the 512th are attended to although masked
    (vllm-project/vllm-ascend issue 15503: bool mask, sparse_mode 0, torch_npu 2.10). Silently, as there.
    """
    if mask is None or mask.shape[-1] <= MASKED_KEYS_READ:
        return mask
    read = torch.arange(mask.shape[-1], device=mask.device) < MASKED_KEYS_READ
    return mask.bool() & read


def _prompt(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    query_lengths: list[int] | None,
    key_lengths: list[int] | None,
    num_heads: int,
    scale: float,
    before: int,
    after: int,
    layout: str,
    num_key_value_heads: int,
    sparse_mode: int,
    inner_precise: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Several queries per sequence. Rows beyond a sequence's length are zero."""
    _check_inputs(name, query, key, value, mask, layout)
    for tensor_name, tensor in {"query": query, "key": key, "value": value}.items():
        require(tensor.is_contiguous(), name, f"{tensor_name} must be contiguous")
    _check_prompt_mask(name, mask, sparse_mode, before, after)
    query, key, value = _split(name, query, key, value, layout, num_heads, num_key_value_heads)
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    q_len = _lengths(name, "actual_seq_lengths", query_lengths, batch, queries, query.device)  # (batch, 1, 1, 1)
    k_len = _lengths(name, "actual_seq_lengths_kv", key_lengths, batch, keys, query.device)
    rows = torch.arange(queries, device=query.device)[:, None]
    columns = torch.arange(keys, device=query.device)[None, :]

    masked = columns >= k_len  # (batch, 1, 1, keys)
    if mask is not None:
        masked = masked | _prompt_mask(name, mask, sparse_mode, rows, columns, before, after, k_len - q_len, batch)
    padding_rows = rows >= q_len  # (batch, 1, queries, 1)
    masked = (masked | padding_rows).expand(batch, -1, queries, keys)
    empty_rows = masked.all(dim=-1, keepdim=True) & ~padding_rows
    require(
        inner_precise in (2, 3) or not bool(empty_rows.any()),
        name,
        "a whole row is masked: its result is undefined unless inner_precise is 2 or 3",
    )
    output, maxima, sums = attend(query, key, value, masked, scale)
    return join_heads(output, "BSND" if layout == "BNSD_BSND" else layout), maxima, sums


def _check_prompt_mask(name: str, mask: torch.Tensor | None, sparse_mode: int, before: int, after: int) -> None:
    require(sparse_mode in range(5), name, f"sparse_mode must be 0 to 4, got {sparse_mode}")
    if mask is None:
        require(
            sparse_mode == FULL_MASK, name, f"sparse_mode={sparse_mode} needs atten_mask; without it nothing is masked"
        )
        default_after = (0, UNLIMITED) if name == PROMPT else (UNLIMITED,)
        require(
            before == UNLIMITED and after in default_after,
            name,
            f"pre_tokens={before}, next_tokens={after} without atten_mask are ignored: nothing would be masked",
        )
        return
    if sparse_mode in (TOP_LEFT_CAUSAL, BOTTOM_RIGHT_CAUSAL, BAND):
        size = COMPRESSED_MASK_SIZE
        require(
            tuple(mask.shape) in {(size, size), (1, size, size), (1, 1, size, size)},
            name,
            f"sparse_mode={sparse_mode} takes the compressed mask of shape ({size}, {size}), got {tuple(mask.shape)}",
        )
        require(
            torch.equal(mask.view(size, size).bool(), compressed_mask(mask.device)),
            name,
            f"sparse_mode={sparse_mode} takes an atten_mask that is True (masked) strictly above the diagonal",
        )


def _prompt_mask(
    name: str,
    mask: torch.Tensor,
    sparse_mode: int,
    rows: torch.Tensor,
    columns: torch.Tensor,
    before: int,
    after: int,
    shift: torch.Tensor,
    batch: int,
) -> torch.Tensor:
    """True = masked, broadcast to (batch, heads, queries, keys)."""
    if sparse_mode == TOP_LEFT_CAUSAL:
        return outside_band(rows, columns, UNLIMITED, 0)
    if sparse_mode == BOTTOM_RIGHT_CAUSAL:
        return outside_band(rows, columns, UNLIMITED, 0, shift)
    if sparse_mode == BAND:
        return outside_band(rows, columns, before, after, shift)
    queries, keys = rows.shape[0], columns.shape[1]
    allowed = {(1, queries, keys), (batch, 1, queries, keys), (1, 1, queries, keys), (queries, keys)}
    if name == PROMPT:
        allowed.add((batch, queries, keys))
    require(tuple(mask.shape) in allowed, name, f"atten_mask {tuple(mask.shape)} is none of {sorted(allowed)}")
    masked = mask.bool()
    if masked.dim() == 3:  # (batch or 1, queries, keys): the heads' axis is missing
        masked = masked[:, None]
    if sparse_mode == FULL_MASK:
        contradicted = bool((outside_band(rows, columns, before, after) & ~masked).any())
        require(
            not contradicted,
            name,
            f"atten_mask keeps positions that pre_tokens={before}, next_tokens={after} exclude (sparse_mode 0)",
        )
    return masked


def _incremental(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    key_lengths: list[int] | None,
    kv_padding_size: torch.Tensor | None,
    num_heads: int,
    scale: float,
    layout: str,
    num_key_value_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One query per sequence, on a cache of keys and values of which `key_lengths` are valid.

    The valid keys are the first ones, or, with `kv_padding_size` (left padding), those that end so far from the end.
    """
    _check_inputs(name, query, key, value, mask, layout)
    query, key, value = _split(name, query, key, value, layout, num_heads, num_key_value_heads)
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    require(queries == 1, name, f"takes one query per sequence, got {queries}")
    k_len = _lengths(name, "actual_seq_lengths", key_lengths, batch, keys, query.device)  # (batch, 1, 1, 1)
    columns = torch.arange(keys, device=query.device)
    start: int | torch.Tensor = 0
    if kv_padding_size is not None:
        require(key_lengths is not None, name, "kv_padding_size has no effect without actual_seq_lengths")
        require_npu(name, kv_padding_size=kv_padding_size)
        require(
            kv_padding_size.dtype == torch.int64 and kv_padding_size.numel() == 1, name, "kv_padding_size is one int64"
        )
        start = keys - kv_padding_size.clamp(min=0).view(1, 1, 1, 1) - k_len
        require(bool((start >= 0).all()), name, "kv_padding_size and actual_seq_lengths reach beyond the cache's start")
    masked = (columns < start) | (columns >= start + k_len)  # (batch, 1, 1, keys)
    if mask is not None:
        allowed = {(batch, keys), (batch, 1, keys), (batch, 1, 1, keys)}
        require(tuple(mask.shape) in allowed, name, f"atten_mask {tuple(mask.shape)} is none of {sorted(allowed)}")
        masked = masked | mask.bool().view(batch, 1, 1, keys)
    require(not bool(masked.all(dim=-1).any()), name, "every key of a sequence is masked")
    output, maxima, sums = attend(query, key, value, masked, scale)
    return join_heads(output, layout), maxima, sums


def _check_inputs(
    name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, layout: str
) -> None:
    # The hardware takes TND here for head size 192 in bfloat16 without grouped heads only: no LLaVA model has that.
    require(layout != "TND", name, "layout TND is not simulated: it takes a head size of 192 only")
    require(layout in RANKS, name, f"input_layout must be one of {', '.join(RANKS)}, got {layout!r}")
    require_npu(name, query=query, key=key, value=value, atten_mask=mask)
    require_dtype(name, HALF, query=query, key=key, value=value)
    inputs = (query, key, value)
    requires_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    require(not requires_grad, name, "has no gradient: call it under torch.no_grad() or torch.inference_mode()")
    for tensor in inputs:
        require(tensor.dim() == RANKS[layout], name, f"{tuple(tensor.shape)} does not fit layout {layout}")
    require(key.shape == value.shape, name, f"key {tuple(key.shape)} and value {tuple(value.shape)} must be equal")
    require(query.shape[0] == key.shape[0], name, f"batch of query is {query.shape[0]}, of key {key.shape[0]}")
    require(
        mask is None or mask.dtype in (torch.bool, torch.int8, torch.uint8),
        name,
        f"atten_mask must be bool, int8 or uint8, got {None if mask is None else mask.dtype}",
    )


def _length(tensor: torch.Tensor, layout: str) -> int:
    return tensor.shape[1] if layout in ("BSH", "BSND") else tensor.shape[2]


def _split(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: str,
    num_heads: int,
    num_key_value_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All as (batch, heads, length, size), after checking the numbers of heads that the call states."""
    key_heads = num_key_value_heads or num_heads
    require(1 <= num_heads <= MAX_HEADS, name, f"num_heads must be 1 to {MAX_HEADS}, got {num_heads}")
    require(
        num_heads % key_heads == 0 and num_heads // key_heads <= MAX_GROUP,
        name,
        f"num_heads {num_heads} must be a multiple, at most {MAX_GROUP} times, of num_key_value_heads {key_heads}",
    )
    if layout == "BSH":
        for tensor, heads in ((query, num_heads), (key, key_heads)):
            require(tensor.shape[-1] % heads == 0, name, f"{heads} heads do not divide the width {tensor.shape[-1]}")
    source_layout = "BNSD" if layout == "BNSD_BSND" else layout
    query = split_heads(query, source_layout, num_heads)
    key, value = (split_heads(tensor, source_layout, key_heads) for tensor in (key, value))
    require(query.shape[1] == num_heads, name, f"num_heads is {num_heads}, query has {query.shape[1]}")
    require(key.shape[1] == key_heads, name, f"num_key_value_heads is {key_heads}, key has {key.shape[1]}")
    size = query.shape[3]
    require(size == key.shape[3], name, f"head size of query is {size}, of key {key.shape[3]}")
    require(size <= MAX_HEAD_SIZE, name, f"head size must be at most {MAX_HEAD_SIZE}, got {size}")
    require(
        layout not in ("BSH", "BSND") or num_heads * size < MAX_WIDTH,
        name,
        f"heads * head size must be below {MAX_WIDTH} in layout {layout}",
    )
    return query, key, value


def _lengths(
    name: str, argument: str, lengths: list[int] | None, batch: int, longest: int, device: torch.device
) -> torch.Tensor:
    """Lengths per sequence as (batch, 1, 1, 1)."""
    if lengths is None:
        lengths = [longest]
    require(len(lengths) == 1 or len(lengths) >= batch, name, f"{argument} must have 1 or {batch} entries")
    lengths = list(lengths[:batch]) if len(lengths) > 1 else [lengths[0]] * batch
    require(all(0 <= n <= longest for n in lengths), name, f"{argument} must be 0 to {longest}, got {lengths}")
    return torch.tensor(lengths, device=device).view(batch, 1, 1, 1)
