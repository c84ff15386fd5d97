"""The operation `mla_decode`: its contract and its checks."""

from __future__ import annotations

from typing import Literal, overload

import torch

from mla_backend.dimensions import HEAD_DIM, KV_LORA_RANK, QK_ROPE_HEAD_DIM
from mla_backend.schedule import DecodeSchedule

MAX_HEADS = 128
QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUANTIZED_DTYPE = torch.float8_e4m3fn


@overload
def mla_decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    softmax_scale: float,
    schedule: DecodeSchedule,
    causal: bool = ...,
    kv_scale: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def mla_decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    softmax_scale: float,
    schedule: DecodeSchedule,
    causal: bool = ...,
    kv_scale: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def mla_decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    softmax_scale: float,
    schedule: DecodeSchedule,
    causal: bool = True,
    kv_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend absorbed queries to the paged latent cache of their requests.

    Query i of the n queries of a request with s cached tokens sees tokens 0 to s - n + i with `causal`, else all s.
    Cache entries past a request's length, NaN included, never reach the output, and block table entries past it are
    never followed. Rows that see no token, or that no request owns, are 0 in `out` and -inf in `lse`.

    Args:
        q_nope: [tokens, heads, 512] queries after absorption of W_UK; bf16, fp16 or fp32; 1 to 128 heads.
        q_pe: [tokens, heads, 64] rotary part of the queries, of the same dtype.
        kv_cache: [pages, page_size, 576] latent cache, 512 latent numbers and then 64 rotary ones per token; any
            strides with a contiguous last dimension. Of the queries' dtype, or float8_e4m3fn with `kv_scale`. The page
            size is 1 or a multiple of 16.
        block_table: [requests, max_pages] int32 page numbers.
        seq_lens: [requests] int32 cached tokens per request, this step's included; 0 is allowed.
        query_start_loc: [requests + 1] int32; request r owns rows query_start_loc[r]:query_start_loc[r + 1].
        softmax_scale: factor on the scores, before the softmax; positive.
        schedule: of this step, made from the same `seq_lens`.
        causal: see above.
        kv_scale: one fp32 number, the factor from a float8 cache's numbers to their true values.
        out: [tokens, heads, 512] of the queries' dtype, written to; any strides with a contiguous last
            dimension. Allocated by default.
        return_lse: also return the natural log of the softmax denominator, [tokens, heads] fp32.

    Returns:
        `out`, or `(out, lse)`.

    Raises:
        ValueError: an argument has a wrong shape, stride or device.
        TypeError: an argument has a wrong dtype.
        RuntimeError: an argument requires a gradient.
    """
    if out is None:
        out = torch.empty_like(q_nope, memory_format=torch.contiguous_format)
    if torch.is_grad_enabled() and (q_nope.requires_grad or q_pe.requires_grad or kv_cache.requires_grad):
        raise RuntimeError("mla_decode: an argument requires a gradient, and there is none; use torch.no_grad().")
    if not softmax_scale > 0:
        raise ValueError(f"mla_decode: softmax_scale is {softmax_scale}, wanted a positive number.")
    _check(q_nope, q_pe, kv_cache, block_table, seq_lens, query_start_loc, schedule, kv_scale, out)
    lse = q_nope.new_empty(q_nope.shape[:2], dtype=torch.float32) if return_lse else None
    torch.ops.mla_backend.mla_decode(
        q_nope,
        q_pe,
        kv_cache,
        block_table,
        seq_lens,
        query_start_loc,
        schedule.request_tiles,
        schedule.buffers.partial_out,
        schedule.buffers.partial_lse,
        schedule.max_query_len,
        schedule.max_seq_len,
        softmax_scale,
        causal,
        kv_scale,
        out,
        lse,
    )
    return out if lse is None else (out, lse)


def _check(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    schedule: DecodeSchedule,
    kv_scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    if q_nope.ndim != 3 or q_nope.shape[2] != KV_LORA_RANK or not 1 <= q_nope.shape[1] <= MAX_HEADS:
        _wrong_shape("q_nope", q_nope, f"[tokens, 1 to {MAX_HEADS} heads, {KV_LORA_RANK}]")
    tokens, heads, _ = q_nope.shape
    if q_pe.shape != (tokens, heads, QK_ROPE_HEAD_DIM):
        _wrong_shape("q_pe", q_pe, f"[{tokens}, {heads}, {QK_ROPE_HEAD_DIM}], to go with q_nope")
    if kv_cache.ndim != 3 or kv_cache.shape[2] != HEAD_DIM:
        _wrong_shape("kv_cache", kv_cache, f"[pages, page_size, {HEAD_DIM}]")
    if kv_cache.shape[1] != 1 and (kv_cache.shape[1] % 16 or kv_cache.shape[1] == 0):
        _wrong_shape("kv_cache", kv_cache, f"[pages, 1 or a multiple of 16, {HEAD_DIM}]")
    if kv_cache.stride(2) != 1:
        raise ValueError(
            f"mla_decode: kv_cache has strides {kv_cache.stride()}, but its last dimension must be contiguous."
        )
    if seq_lens.ndim != 1:
        _wrong_shape("seq_lens", seq_lens, "[requests]")
    requests = seq_lens.shape[0]
    if block_table.ndim != 2 or block_table.shape[0] != requests:
        _wrong_shape("block_table", block_table, f"[{requests}, max_pages], a row per entry of seq_lens")
    if query_start_loc.shape != (requests + 1,):
        _wrong_shape("query_start_loc", query_start_loc, f"[{requests + 1}], one more than seq_lens")
    if schedule.request_tiles.shape != (requests + 1,):
        raise ValueError(
            f"mla_decode: schedule was made for {schedule.request_tiles.shape[0] - 1} requests, but seq_lens has "
            f"{requests}; make it with DecodeSchedule.plan(seq_lens, ...)."
        )
    if out.shape != q_nope.shape:
        _wrong_shape("out", out, f"{list(q_nope.shape)}, the shape of q_nope")
    if out.stride(2) != 1:
        raise ValueError(f"mla_decode: out has strides {out.stride()}, but its last dimension must be contiguous.")

    if q_nope.dtype not in QUERY_DTYPES:
        _wrong_dtype("q_nope", q_nope, "bfloat16, float16 or float32")
    for name, tensor in {"q_pe": q_pe, "out": out}.items():
        if tensor.dtype != q_nope.dtype:
            _wrong_dtype(name, tensor, f"{q_nope.dtype}, the dtype of q_nope")
    if kv_cache.dtype not in (q_nope.dtype, QUANTIZED_DTYPE):
        _wrong_dtype("kv_cache", kv_cache, f"{q_nope.dtype}, the dtype of q_nope, or {QUANTIZED_DTYPE} with kv_scale")
    indices = {"block_table": block_table, "seq_lens": seq_lens, "query_start_loc": query_start_loc}
    for name, tensor in indices.items():
        if tensor.dtype != torch.int32:
            _wrong_dtype(name, tensor, "torch.int32")
    if (kv_scale is not None) != (kv_cache.dtype == QUANTIZED_DTYPE):
        raise TypeError(
            f"mla_decode: kv_cache is {kv_cache.dtype} and kv_scale is {'missing' if kv_scale is None else 'given'}; a "
            f"{QUANTIZED_DTYPE} cache needs one and no other cache takes one."
        )
    scale = {} if kv_scale is None else {"kv_scale": kv_scale}
    for name, tensor in scale.items():
        if tensor.numel() != 1:
            _wrong_shape(name, tensor, "one number")
        if tensor.dtype != torch.float32:
            _wrong_dtype(name, tensor, "torch.float32")

    everything = {
        "q_pe": q_pe,
        "kv_cache": kv_cache,
        "out": out,
        "schedule": schedule.request_tiles,
        **indices,
        **scale,
    }
    for name, tensor in everything.items():
        if tensor.device != q_nope.device:
            raise ValueError(
                f"mla_decode: {name} is on {tensor.device}, but q_nope is on {q_nope.device}; move it there."
            )


def _wrong_shape(name: str, tensor: torch.Tensor, wanted: str) -> None:
    raise ValueError(f"mla_decode: {name} has shape {list(tensor.shape)}, wanted {wanted}.")


def _wrong_dtype(name: str, tensor: torch.Tensor, wanted: str) -> None:
    raise TypeError(f"mla_decode: {name} is {tensor.dtype}, wanted {wanted}.")
