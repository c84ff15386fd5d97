"""The torch operators under `mla_decode`: their schemas, the PyTorch reference, and the compiled Hopper kernels.

The schemas are defined here; whichever implementations exist are registered under them. The compiled library
(csrc/bindings.cpp) registers itself for CUDA when it is loaded.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mla_backend.reference import mla_decode_reference

TILE_TOKENS = 64
"""Cached tokens that a worker handles at a time: the unit in which requests are split. As in csrc/decode.h."""

LIBRARY = Path(__file__).parent / "_kernels.so"

_library = torch.library.Library("mla_backend", "DEF")
_library.define(
    "mla_decode(Tensor q_nope, Tensor q_pe, Tensor kv_cache, Tensor block_table, Tensor seq_lens,"
    " Tensor query_start_loc, Tensor request_tiles, Tensor(c!) partial_out, Tensor(d!) partial_lse,"
    " SymInt max_query_len, SymInt max_seq_len, float softmax_scale, bool causal, Tensor? kv_scale,"
    " Tensor(a!) out, Tensor(b!)? lse) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("plan(Tensor seq_lens, Tensor(a!) request_tiles) -> ()", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(_library, "mla_decode", "CompositeExplicitAutograd")
def _mla_decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    request_tiles: torch.Tensor,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    max_query_len: int,
    max_seq_len: int,
    softmax_scale: float,
    causal: bool,
    kv_scale: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    mla_decode_reference(
        q_nope,
        q_pe,
        kv_cache,
        block_table,
        seq_lens,
        query_start_loc,
        max_query_len,
        max_seq_len,
        softmax_scale,
        causal,
        kv_scale,
        out,
        lse,
    )


@torch.library.impl(_library, "plan", "CompositeExplicitAutograd")
def _plan(seq_lens: torch.Tensor, request_tiles: torch.Tensor) -> None:
    request_tiles[0] = 0
    torch.cumsum((seq_lens - 1) // TILE_TOKENS + 1, 0, dtype=torch.int32, out=request_tiles[1:])


@torch.library.register_fake("mla_backend::mla_decode", lib=_library)
@torch.library.register_fake("mla_backend::plan", lib=_library)
def _fake(*arguments: object) -> None:
    """Nothing to say about shapes: the operators return nothing and write into what they are given."""


def has_compiled_kernels() -> bool:
    """Whether the compiled library is part of this installation and can run here."""
    return torch.version.cuda is not None and LIBRARY.exists()


if has_compiled_kernels():
    torch.ops.load_library(str(LIBRARY))


def kernel_name(device: torch.device) -> str:
    """Say in words what computes `mla_decode` for tensors on `device`."""
    if device.type == "cuda" and has_compiled_kernels():
        return "compiled kernel for sm_90a"
    return f"PyTorch reference on {device.type}"
