"""The dense decoding functions of the package flash_mla, on top of `mla_decode`.

Code written for flash_mla runs with one import changed:

    from mla_backend.flash_mla import flash_mla_with_kvcache, get_mla_metadata

Names, shapes and conventions are those of https://github.com/deepseek-ai/FlashMLA.
"""

from __future__ import annotations

import torch

from mla_backend.decode import mla_decode
from mla_backend.dimensions import HEAD_DIM, KV_LORA_RANK, MAX_HEADS, PARTIAL_ROWS
from mla_backend.schedule import DecodeSchedule, ScheduleBuffers

# flash_mla's functions tell only one of the two what the tensors' sizes are, and both must choose the same kernel.
NO_BOUND = 2**31 - 1


def get_mla_metadata(
    cache_seqlens: torch.Tensor, num_heads_per_head_k: int, num_heads_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan a step: called once, its results passed to `flash_mla_with_kvcache` of every layer.

    Args:
        cache_seqlens: [batch] int32, cached tokens per request.
        num_heads_per_head_k: query rows per key head, seq_len_q * num_heads_q / num_heads_k.
        num_heads_k: key heads.

    Returns:
        tile_scheduler_metadata, [workers, 8] int32, and num_splits, [batch + 1] int32: `shares` and `splits` of a
        `DecodeSchedule`, and only of use to this package.
    """
    queries = -(-num_heads_per_head_k // MAX_HEADS)
    heads = min(num_heads_per_head_k, MAX_HEADS)
    schedule = DecodeSchedule.plan(cache_seqlens, heads=heads, max_query_len=queries, max_seq_len=NO_BOUND)
    return schedule.shares, schedule.splits


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: torch.Tensor,
    num_splits: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend queries to a paged latent cache.

    Args:
        q: [batch, seq_len_q, num_heads_q, 576].
        k_cache: [num_blocks, page_block_size, num_heads_k, 576]; num_heads_q is a multiple of num_heads_k.
        block_table: [batch, max_num_blocks_per_seq] int32.
        cache_seqlens: [batch] int32.
        head_dim_v: 512.
        tile_scheduler_metadata, num_splits: from `get_mla_metadata`.
        softmax_scale: by default 576 ** -0.5.
        causal: whether query i of n sees cached tokens up to seq_len - n + i only.

    Returns:
        out, [batch, seq_len_q, num_heads_q, 512], and the natural log of the softmax denominator,
        [batch, num_heads_q, seq_len_q] fp32, +inf where a query sees no token (and out is 0).

    Raises:
        ValueError, TypeError: as `mla_decode`; or a head dimension that this package does not serve.
    """
    batch, queries, heads, head_dim = q.shape
    heads_k = k_cache.shape[2]
    if (head_dim, head_dim_v) != (HEAD_DIM, KV_LORA_RANK) or heads % heads_k:
        raise ValueError(
            f"flash_mla_with_kvcache: q has {heads} heads of {head_dim}, k_cache {heads_k}, head_dim_v is "
            f"{head_dim_v}; wanted heads of {HEAD_DIM}, a multiple of k_cache's, and head_dim_v {KV_LORA_RANK}."
        )
    group = heads // heads_k
    # Blocks of query rows are whole tokens, so that of several blocks none need be full.
    one_block = queries * group <= MAX_HEADS
    most_rows = queries * group if one_block else -(-queries // max(1, MAX_HEADS // group)) * MAX_HEADS
    places = -(-tile_scheduler_metadata.shape[0] * most_rows // PARTIAL_ROWS)
    buffers = ScheduleBuffers(
        tile_scheduler_metadata,
        num_splits,
        partial_out=q.new_empty(places, 2, PARTIAL_ROWS, KV_LORA_RANK, dtype=torch.float32),
        partial_lse=q.new_empty(places, 2, PARTIAL_ROWS, dtype=torch.float32),
        # There are no more blocks of rows than query tokens.
        arrivals=q.new_zeros(tile_scheduler_metadata.shape[0] * max(1, queries), dtype=torch.int32),
    )
    schedule = DecodeSchedule(tile_scheduler_metadata, num_splits, buffers, group, queries, NO_BOUND)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * queries
    out = q.new_empty(batch, queries, heads, KV_LORA_RANK)
    lse = q.new_empty(batch, queries, heads, dtype=torch.float32)
    for head_k in range(heads_k):
        mine = slice(head_k * group, (head_k + 1) * group)
        rows = q[:, :, mine].flatten(0, 1)
        _, lse_part = mla_decode(
            rows[..., :KV_LORA_RANK],
            rows[..., KV_LORA_RANK:],
            k_cache[:, :, head_k],
            block_table,
            cache_seqlens,
            starts,
            softmax_scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
            schedule=schedule,
            causal=causal,
            out=out.flatten(0, 1)[:, mine],
            return_lse=True,
        )
        lse[:, :, mine] = lse_part.unflatten(0, (batch, queries))
    return out, torch.where(lse == -torch.inf, torch.inf, lse).transpose(1, 2)
