"""What the arguments of the operator `mla_decode` must be, and the error that names one which is something else.

The compiled kernels check for themselves, in csrc/bindings.cpp; there these functions only find the error's type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla_backend.dimensions import (
    HEAD_DIM,
    KV_LORA_RANK,
    MAX_HEADS,
    MAX_TOKENS,
    PARTIAL_ROWS,
    QK_ROPE_HEAD_DIM,
    SHARE_NUMBERS,
    TILE_TOKENS,
    max_pages,
)

QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMPILED_DTYPES = (torch.bfloat16, torch.float16)
QUANTIZED_DTYPE = torch.float8_e4m3fn


def check_arguments(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    shares: torch.Tensor,
    splits: torch.Tensor,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    arrivals: torch.Tensor,
    planned_heads: int,
    max_query_len: int,
    max_seq_len: int,
    softmax_scale: float,
    causal: bool,
    batch_invariant: bool,
    quantized: bool,
    kv_scale: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Check everything that `mla_decode` asks of its arguments, on any device.

    Raises:
        ValueError, TypeError: as `mla_decode`.
    """
    device, dtype = q_nope.device, q_nope.dtype
    if dtype not in QUERY_DTYPES:
        raise _wrong_dtype("q_nope", q_nope, "bfloat16, float16 or float32")
    _check("q_nope", q_nope, ("tokens", "heads", KV_LORA_RANK), dtype, device)
    tokens, heads, _ = q_nope.shape
    if not 1 <= heads <= MAX_HEADS:
        raise _wrong_shape("q_nope", q_nope, ("tokens", f"1 to {MAX_HEADS} heads", KV_LORA_RANK))
    if heads != planned_heads:
        raise ValueError(
            f"mla_decode: schedule was made for {planned_heads} heads, but q_nope has {heads}; "
            f"make it with DecodeSchedule.plan(..., heads={heads})."
        )
    _check("q_pe", q_pe, (tokens, heads, QK_ROPE_HEAD_DIM), dtype, device)

    if kv_cache.dtype not in (dtype, QUANTIZED_DTYPE):
        raise _wrong_dtype("kv_cache", kv_cache, f"{dtype}, the dtype of q_nope, or {QUANTIZED_DTYPE} with kv_scale")
    _check("kv_cache", kv_cache, ("pages", "page_size", HEAD_DIM), kv_cache.dtype, device)
    page_size = kv_cache.shape[1]
    if page_size != 1 and (page_size % 16 or page_size == 0):
        raise _wrong_shape("kv_cache", kv_cache, ("pages", "1 or a multiple of 16", HEAD_DIM))
    if (kv_scale is not None) != (kv_cache.dtype == QUANTIZED_DTYPE):
        raise TypeError(
            f"mla_decode: kv_cache is {kv_cache.dtype} and kv_scale is {'missing' if kv_scale is None else 'given'}; a "
            f"{QUANTIZED_DTYPE} cache needs one and no other cache takes one."
        )
    if quantized != (kv_cache.dtype == QUANTIZED_DTYPE):
        raise TypeError(
            f"mla_decode: schedule was made for {'a' if quantized else 'no'} quantised cache, but kv_cache is "
            f"{kv_cache.dtype}; make it with DecodeSchedule.plan(..., quantized={not quantized})."
        )
    if kv_scale is not None:
        _check("kv_scale", kv_scale.flatten(), (1,), torch.float32, device)

    _check("seq_lens", seq_lens, ("requests",), torch.int32, device)
    requests = seq_lens.shape[0]
    _check("block_table", block_table, (requests, "max_pages"), torch.int32, device)
    _check("query_start_loc", query_start_loc, (requests + 1,), torch.int32, device)
    if splits.numel() != requests + 1:
        raise ValueError(
            f"mla_decode: schedule was made for {splits.numel() - 1} requests, but seq_lens has {requests}; "
            f"make it with DecodeSchedule.plan(seq_lens, ...)."
        )
    _check("schedule.splits", splits, (requests + 1,), torch.int32, device)
    _check("schedule.shares", shares, ("workers", SHARE_NUMBERS), torch.int32, device)
    _check("schedule.buffers.partial_lse", partial_lse, ("workers", 2, PARTIAL_ROWS), torch.float32, device)
    parts = (partial_lse.shape[0], 2, PARTIAL_ROWS, KV_LORA_RANK)
    _check("schedule.buffers.partial_out", partial_out, parts, torch.float32, device)
    _check("schedule.buffers.arrivals", arrivals, ("counters",), torch.int32, device)
    contiguous = {"shares": shares, "buffers.partial_lse": partial_lse, "buffers.partial_out": partial_out}
    for name, tensor in contiguous.items():
        if not tensor.is_contiguous():
            raise _wrong_strides(f"schedule.{name}", tensor, "it must be contiguous")

    if not softmax_scale > 0:
        raise ValueError(f"mla_decode: softmax_scale is {softmax_scale}, wanted a positive number.")
    _check("out", out, (tokens, heads, KV_LORA_RANK), dtype, device)
    if lse is not None:
        _check("lse", lse, (tokens, heads), torch.float32, device)


def check_compiled(
    q_nope: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    shares: torch.Tensor,
    partial_out: torch.Tensor,
) -> None:
    """Check what the compiled kernels ask beyond `check_arguments`.

    Raises:
        ValueError, TypeError: as `mla_decode`.
    """
    if q_nope.dtype not in COMPILED_DTYPES:
        raise _wrong_dtype("q_nope", q_nope, "bfloat16 or float16 on a GPU")
    if q_nope.shape[0] > MAX_TOKENS:
        raise _wrong_shape("q_nope", q_nope, (f"at most {MAX_TOKENS} tokens on a GPU", "heads", KV_LORA_RANK))
    page_size = kv_cache.shape[1]
    if page_size not in (16, 32) and page_size % TILE_TOKENS:
        wanted = ("pages", f"16, 32 or a multiple of {TILE_TOKENS} on a GPU", HEAD_DIM)
        raise _wrong_shape("kv_cache", kv_cache, wanted)
    if block_table.shape[1] > max_pages(page_size):
        few = f"at most {max_pages(page_size)} pages of {page_size} tokens on a GPU"
        raise _wrong_shape("block_table", block_table, ("requests", few))
    aligned = {"kv_cache": kv_cache, "schedule.shares": shares, "schedule.buffers.partial_out": partial_out}
    for name, tensor in aligned.items():
        starts = (tensor.data_ptr(), *(stride * tensor.element_size() for stride in tensor.stride()[:-1]))
        if any(start % 16 for start in starts):
            raise _wrong_strides(
                name, tensor, f"every row must start at a multiple of 16 bytes, and the first is at {starts[0]:#x}"
            )


def _check(
    name: str, tensor: torch.Tensor, shape: Sequence[int | str], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise unless `tensor` is as wanted and its last dimension contiguous; a word in `shape` stands for any size."""
    if tensor.device != device:
        raise ValueError(f"mla_decode: {name} is on {tensor.device}, but q_nope is on {device}; move it there.")
    if tensor.ndim != len(shape) or any(
        not isinstance(wanted, str) and size != wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    ):
        raise _wrong_shape(name, tensor, shape)
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise _wrong_strides(name, tensor, "its last dimension must be contiguous")
    if tensor.dtype != dtype:
        raise _wrong_dtype(name, tensor, str(dtype))


def _wrong_shape(name: str, tensor: torch.Tensor, wanted: Sequence[int | str]) -> ValueError:
    return ValueError(f"mla_decode: {name} has shape {list(tensor.shape)}, wanted [{', '.join(map(str, wanted))}].")


def _wrong_strides(name: str, tensor: torch.Tensor, wanted: str) -> ValueError:
    return ValueError(f"mla_decode: {name} has strides {list(tensor.stride())}, but {wanted}.")


def _wrong_dtype(name: str, tensor: torch.Tensor, wanted: str) -> TypeError:
    return TypeError(f"mla_decode: {name} is {tensor.dtype}, wanted {wanted}.")
