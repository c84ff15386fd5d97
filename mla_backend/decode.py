"""The operation `mla_decode`: its contract."""

from __future__ import annotations

from typing import Literal, overload

import torch

from mla_backend.arguments import check_arguments, check_compiled
from mla_backend.operators import has_compiled_kernels
from mla_backend.schedule import DecodeSchedule


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

    Tensors lie on one device and may have any strides, but their last dimension is contiguous. On a GPU the compiled
    kernels take bf16 and fp16 queries, a cache in pages of 16, 32 or a multiple of 64 tokens, and every cached token at
    a multiple of 16 bytes. Over a float8 cache they multiply in fp16 with up to 64 query rows (tokens x heads), of bf16
    queries each row divided by a power of two; with more, and in batch-invariant steps, in the queries' dtype.

    Args:
        q_nope: [tokens, heads, 512] queries after absorption of W_UK; bf16, fp16 or fp32; 1 to 128 heads.
        q_pe: [tokens, heads, 64] rotary part of the queries, of the same dtype.
        kv_cache: [pages, page_size, 576] latent cache, 512 latent numbers and then 64 rotary ones per token. Of the
            queries' dtype, or float8_e4m3fn with `kv_scale`. The page size is 1 or a multiple of 16.
        block_table: [requests, max_pages] int32 page numbers. On a GPU max_pages x page_size^2 is at most 2^42.
        seq_lens: [requests] int32 cached tokens per request, this step's included; 0 is allowed.
        query_start_loc: [requests + 1] int32; request r owns rows query_start_loc[r]:query_start_loc[r + 1].
        softmax_scale: factor on the scores, before the softmax; positive.
        schedule: of this step, made from the same `seq_lens`, unchanged since, for as many heads, and as `quantized`
            where the cache is float8. Calls that share its buffers follow each other on one stream; at the same time,
            or with other lengths, they may never end.
        causal: see above.
        kv_scale: one fp32 number, the factor from a float8 cache's numbers to their true values; not negative.
        out: [tokens, heads, 512] of the queries' dtype, written to. Allocated by default.
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
    lse = q_nope.new_empty(q_nope.shape[:2], dtype=torch.float32) if return_lse else None
    arguments = (
        q_nope,
        q_pe,
        kv_cache,
        block_table,
        seq_lens,
        query_start_loc,
        schedule.shares,
        schedule.splits,
        schedule.buffers.partial_out,
        schedule.buffers.partial_lse,
        schedule.buffers.arrivals,
        schedule.heads,
        schedule.max_query_len,
        schedule.max_seq_len,
        softmax_scale,
        causal,
        schedule.batch_invariant,
        schedule.quantized,
        kv_scale,
        out,
        lse,
    )
    try:
        torch.ops.mla_backend.mla_decode(*arguments)
    except RuntimeError:
        # The only type that the compiled kernels can raise. If an argument is wrong, these raise the promised one.
        check_arguments(*arguments)
        if q_nope.is_cuda and has_compiled_kernels():
            check_compiled(q_nope, kv_cache, block_table, schedule.shares, schedule.buffers.partial_out)
        raise
    return out if lse is None else (out, lse)
