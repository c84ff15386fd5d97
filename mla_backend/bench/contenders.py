"""The kernels that are compared: each takes a step's tensors and returns a function that computes the output once.

What a kernel prepares once per step, and vLLM shares between layers (a schedule, a plan), is prepared outside of that
function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mla_backend import DecodeSchedule, mla_decode

Call = Callable[[], torch.Tensor]


@dataclass
class Step:
    """Tensors of a decode step with as many queries in every request, pages of 64 tokens; float8 ones with a scale."""

    q_nope: torch.Tensor
    q_pe: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    queries: int
    max_seq_len: int
    scale: float
    kv_scale: torch.Tensor | None

    @property
    def query(self) -> torch.Tensor:
        """[requests, queries, heads, 576], contiguous."""
        both = torch.cat((self.q_nope, self.q_pe), dim=-1)
        return both.view(len(self.seq_lens), self.queries, *both.shape[1:])


def ours(step: Step) -> Call:
    schedule = DecodeSchedule.plan(
        step.seq_lens,
        heads=step.q_nope.shape[1],
        max_query_len=step.queries,
        max_seq_len=step.max_seq_len,
        quantized=step.kv_scale is not None,
    )
    out = torch.empty_like(step.q_nope, memory_format=torch.contiguous_format)
    tensors = (step.q_nope, step.q_pe, step.kv_cache, step.block_table, step.seq_lens, step.query_start_loc)
    shared: dict[str, Any] = {"softmax_scale": step.scale, "kv_scale": step.kv_scale, "schedule": schedule, "out": out}
    return lambda: mla_decode(*tensors, **shared)


def of_flash_mla(step: Step, query: torch.Tensor) -> dict[str, Any]:
    """Return what FlashMLA's functions are given over either kind of cache."""
    return {
        "q": query,
        "k_cache": step.kv_cache.unsqueeze(-2),
        "block_table": step.block_table,
        "cache_seqlens": step.seq_lens,
        "head_dim_v": 512,
        "softmax_scale": step.scale,
        "causal": True,
    }


def flash_mla_fp8(step: Step) -> Call:
    from vllm.v1.attention.ops.flashmla import flash_mla_with_kvcache_fp8, get_mla_metadata_dense_fp8

    query = step.query
    one, cache_scale = torch.ones(1, device="cuda"), torch.as_tensor(step.kv_scale).reshape(1)
    metadata, splits = get_mla_metadata_dense_fp8(step.seq_lens, step.queries * query.shape[2], 1)
    # Queries become float8 outside of what is timed, as vLLM's layers do that for the backend.
    shared = of_flash_mla(step, query.to(torch.float8_e4m3fn))

    def call() -> torch.Tensor:
        out, _ = flash_mla_with_kvcache_fp8(
            **shared,
            tile_scheduler_metadata=metadata,
            num_splits=splits,
            descale_q=one,
            descale_k=cache_scale,
        )
        return torch.as_tensor(out).flatten(0, 1)

    return call


def flash_mla(step: Step) -> Call:
    if step.kv_scale is not None:
        return flash_mla_fp8(step)
    from vllm.v1.attention.ops.flashmla import flash_mla_with_kvcache, get_mla_metadata

    query = step.query
    metadata, _ = get_mla_metadata(step.seq_lens, step.queries * query.shape[2], 1, is_fp8_kvcache=False)
    shared = of_flash_mla(step, query)

    def call() -> torch.Tensor:
        out, _ = flash_mla_with_kvcache(**shared, tile_scheduler_metadata=metadata, is_fp8_kvcache=False)
        return torch.as_tensor(out).flatten(0, 1)

    return call


def flash_attention_3(step: Step) -> Call:
    if step.kv_scale is not None:
        raise NotImplementedError("takes no float8 cache with values of 512 numbers")
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    shared: dict[str, Any] = {
        "max_seqlen_q": step.queries,
        "max_seqlen_k": step.max_seq_len,
        "cu_seqlens_q": step.query_start_loc,
    }
    metadata = get_scheduler_metadata(
        batch_size=len(step.seq_lens),
        num_heads_q=step.q_nope.shape[1],
        num_heads_kv=1,
        headdim=64,
        headdim_v=512,
        cache_seqlens=step.seq_lens,
        qkv_dtype=step.q_nope.dtype,
        page_size=step.kv_cache.shape[1],
        causal=True,
        **shared,
    )

    def call() -> torch.Tensor:
        out: torch.Tensor = flash_attn_varlen_func(
            q=step.q_pe,
            k=step.kv_cache[..., 512:].unsqueeze(-2),
            v=step.kv_cache[..., :512].unsqueeze(-2),
            q_v=step.q_nope,
            seqused_k=step.seq_lens,
            block_table=step.block_table,
            softmax_scale=step.scale,
            causal=True,
            fa_version=3,
            scheduler_metadata=metadata,
            **shared,
        )
        return out

    return call


def flash_infer(step: Step) -> Call:
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    if step.kv_scale is not None:
        raise NotImplementedError("takes no float8 cache on Hopper")
    if step.queries != 1:
        raise NotImplementedError("measured with one query per request")
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), backend="fa3")
    pages = (step.seq_lens + 63) // 64
    indptr = torch.nn.functional.pad(pages.cumsum(0, dtype=torch.int32), (1, 0))
    indices = torch.cat([row[:n] for row, n in zip(step.block_table, pages.tolist(), strict=True)])
    heads, dtype = step.q_nope.shape[1], step.q_nope.dtype
    wrapper.plan(
        step.query_start_loc, indptr, indices, step.seq_lens, heads, 512, 64, 64, True, step.scale, dtype, dtype
    )
    latent, rotary = step.kv_cache[..., :512], step.kv_cache[..., 512:]
    return lambda: wrapper.run(step.q_nope, step.q_pe, latent, rotary)


def triton(step: Step) -> Call:
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    if step.queries != 1:
        raise NotImplementedError("takes one query per request")
    query = step.query.flatten(0, 1)
    heads, splits = query.shape[1], 8
    out, lse = torch.empty_like(query[..., :512]), query.new_empty(query.shape[:2])
    scratch = query.new_empty(len(query), heads, splits, 513, dtype=torch.float32)
    cache = step.kv_cache.unsqueeze(2)
    cache_scale = torch.ones(1, device="cuda") if step.kv_scale is None else step.kv_scale.reshape(1)
    scales = {"k_scale": cache_scale, "v_scale": cache_scale}

    def call() -> torch.Tensor:
        tables = (step.block_table, step.seq_lens, scratch, splits, step.scale, cache.shape[1])
        decode_attention_fwd(query, cache, cache[..., :512], out, lse, *tables, **scales, is_mla=True)
        return out

    return call


OURS = "mla_backend"
MULTIPLIES_FP8 = ("FlashMLA",)
"""Those that over a float8 cache also make queries and probabilities float8."""

CONTENDERS: dict[str, Callable[[Step], Call]] = {
    OURS: ours,
    "FlashMLA": flash_mla,
    "FlashAttention-3": flash_attention_3,
    "FlashInfer": flash_infer,
    "Triton": triton,
}
