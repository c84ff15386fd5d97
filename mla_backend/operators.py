"""The torch operators under `mla_decode`: their schemas, the PyTorch reference, and the compiled Hopper kernels.

The schemas are defined here; whichever implementations exist are registered under them. The compiled library
(csrc/bindings.cpp) registers itself for CUDA when it is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mla_backend.arguments import check_arguments
from mla_backend.reference import mla_decode_reference

LIBRARY = Path(__file__).parent / "_kernels.so"

_library = torch.library.Library("mla_backend", "DEF")
_library.define(
    "mla_decode(Tensor q_nope, Tensor q_pe, Tensor kv_cache, Tensor block_table, Tensor seq_lens,"
    " Tensor query_start_loc, Tensor shares, Tensor splits, Tensor(c!) partial_out, Tensor(d!) partial_lse,"
    " Tensor(e!) arrivals, SymInt planned_heads, SymInt max_query_len, SymInt max_seq_len, float softmax_scale,"
    " bool causal, bool batch_invariant, bool quantized, Tensor? kv_scale, Tensor(a!) out, Tensor(b!)? lse) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "plan(Tensor seq_lens, SymInt heads, SymInt max_query_len, SymInt max_seq_len, bool batch_invariant,"
    " bool quantized, Tensor(a!) shares, Tensor(b!) splits) -> SymInt",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "mla_decode", "CompositeExplicitAutograd")
def _mla_decode(*arguments: Any) -> None:
    check_arguments(*arguments)
    # The reference is not divided among workers: it takes all but the schedule and its buffers.
    mla_decode_reference(*arguments[:6], *arguments[12:16], *arguments[18:])


@torch.library.impl(_library, "plan", "CompositeExplicitAutograd")
def _plan(*arguments: Any) -> int:
    return 0  # workers: nothing is divided


# The operators return nothing and write into what they are given, so there are no shapes to tell of tensors without
# data; but what is wrong with theirs is said as early as a graph is traced.
torch.library.register_fake("mla_backend::mla_decode", check_arguments, lib=_library)
torch.library.register_fake("mla_backend::plan", _plan, lib=_library)


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
