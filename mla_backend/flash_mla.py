"""The dense decoding functions of the package flash_mla, on top of `mla_decode`.

Code written for flash_mla runs with one import changed:

    from mla_backend.flash_mla import flash_mla_with_kvcache, get_mla_metadata

Names, shapes and conventions are those of https://github.com/deepseek-ai/FlashMLA.
"""

from __future__ import annotations

import torch

from mla_backend.decode import mla_decode
from mla_backend.dimensions import HEAD_DIM, KV_LORA_RANK
from mla_backend.schedule import DecodeSchedule, ScheduleBuffers

METADATA_COLUMNS = 8
"""Width of flash_mla's tile scheduler metadata."""


def get_mla_metadata(
    cache_seqlens: torch.Tensor, num_heads_per_head_k: int, num_heads_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan a step: called once, its results passed to `flash_mla_with_kvcache` of every layer.

    Args:
        cache_seqlens: [batch] int32, cached tokens per request.
        num_heads_per_head_k: query rows per key head, seq_len_q * num_heads_q / num_heads_k.
        num_heads_k: key heads.

    Returns:
        tile_scheduler_metadata, [workers, 8] int32, and num_splits, [batch + 1] int32. Their contents are the plan of
        this package, and only of use to it.
    """
    schedule = DecodeSchedule.plan(cache_seqlens, max_query_len=0, max_seq_len=0)
    workers = schedule.buffers.partial_lse.shape[0]
    metadata = torch.zeros(workers, METADATA_COLUMNS, dtype=torch.int32, device=cache_seqlens.device)
    return metadata, schedule.request_tiles


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
    buffers = ScheduleBuffers.allocate(0, q.device)
    schedule = DecodeSchedule(num_splits, buffers, queries, block_table.shape[1] * k_cache.shape[1])
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * queries
    out = q.new_empty(batch, queries, heads, KV_LORA_RANK)
    lse = q.new_empty(batch, queries, heads, dtype=torch.float32)
    group = heads // heads_k
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
