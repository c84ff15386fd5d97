"""MLA decode written out in fp64, one query at a time: slow, and simple enough to be believed."""

from __future__ import annotations

import torch


def mla_decode_fp64(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    kv_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [tokens, heads, 512] and lse [tokens, heads], both fp64."""
    tokens, heads, rank = q_nope.shape
    query = torch.cat((q_nope, q_pe), dim=-1).double()
    out = torch.zeros(tokens, heads, rank, dtype=torch.float64)
    lse = torch.full((tokens, heads), -torch.inf, dtype=torch.float64)
    page_size = kv_cache.shape[1]
    starts = query_start_loc.tolist()
    for request, length in enumerate(seq_lens.tolist()):
        position = torch.arange(length)
        keys = kv_cache[block_table[request, position // page_size].long(), position % page_size].double()
        if kv_scale is not None:
            keys = keys * kv_scale.double()
        count = starts[request + 1] - starts[request]
        for i in range(count):
            visible = keys[: max(0, length - count + i + 1)] if causal else keys
            if len(visible) == 0:
                continue
            row = starts[request] + i
            scores = query[row] @ visible.T * softmax_scale
            lse[row] = scores.logsumexp(-1)
            out[row] = scores.softmax(-1) @ visible[:, :rank]
    return out, lse
