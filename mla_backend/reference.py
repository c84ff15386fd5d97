"""MLA decode in plain PyTorch: the oracle of every test, and what runs where there is no compiled kernel.

The formula is the absorbed form of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1.2): all
heads attend to one shared sequence of 576-vectors, whose first 512 numbers serve as the value too. The softmax is
computed online over chunks of the sequence (Milakov and Gimelshein, arXiv 1805.02867), in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mla_backend.dimensions import HEAD_DIM

CHUNK_TOKENS = 1024
"""Cached tokens of a request that are expanded to fp32 at a time."""

CHUNK_ROWS = 4096
"""Query rows (token and head) of a request that are attended at a time."""

CHUNK_ELEMENTS = 1 << 24
"""Bound on the fp32 numbers of one chunk, over all its requests (64 MiB): decides how many requests go together."""


def mla_decode_reference(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    max_seq_len: int,
    softmax_scale: float,
    causal: bool,
    kv_scale: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Compute `mla_decode` (see there for shapes) into `out` and, where given, `lse`.

    Synchronises with the host only where requests have different numbers of queries.
    """
    tokens, heads, rank = q_nope.shape
    device = q_nope.device
    query = torch.cat((q_nope, q_pe), dim=-1).float() * softmax_scale
    # One row more than there are tokens: rows of shorter queries in a padded group are sent there and dropped.
    result = torch.zeros(tokens + 1, heads, rank, dtype=torch.float32, device=device)
    result_lse = torch.full((tokens + 1, heads), -torch.inf, dtype=torch.float32, device=device)
    query_lens = query_start_loc.diff()

    for members, steps in _groups(query_lens, tokens, heads, max_query_len):
        step = torch.arange(steps.start, steps.stop, device=device)
        owned = step < query_lens[members, None]
        rows = torch.where(owned, query_start_loc[members, None] + step, tokens)
        last_visible = (seq_lens - query_lens if causal else seq_lens - 1)[members, None] + step * causal
        result[rows], result_lse[rows] = _attend(
            query[rows.clamp(max=tokens - 1)],
            kv_cache,
            block_table[members],
            seq_lens[members],
            last_visible,
            max_seq_len,
            kv_scale,
            rank,
        )

    result[tokens], result_lse[tokens] = 0, 0
    out.copy_(result[:tokens])
    if lse is not None:
        lse.copy_(result_lse[:tokens])


def _groups(
    query_lens: torch.Tensor, tokens: int, heads: int, max_query_len: int
) -> Iterator[tuple[torch.Tensor, range]]:
    """Yield (request indices, which of their query tokens) such that a group's chunk fits CHUNK_ELEMENTS."""
    requests = query_lens.shape[0]
    if tokens == 0 or requests == 0:
        return
    everyone = torch.arange(requests, device=query_lens.device)
    if tokens == requests * max_query_len:
        by_length = {max_query_len: everyone}
    else:
        by_length = {n: everyone[query_lens == n] for n in sorted(set(query_lens.tolist())) if n > 0}
    for length, members in by_length.items():
        width = min(length, max(1, CHUNK_ROWS // heads))
        elements = CHUNK_TOKENS * HEAD_DIM + width * heads * (CHUNK_TOKENS + 2 * HEAD_DIM)
        for group in members.split(max(1, CHUNK_ELEMENTS // elements)):
            for first in range(0, length, width):
                yield group, range(first, min(first + width, length))


def _attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    last_visible: torch.Tensor,
    max_seq_len: int,
    kv_scale: torch.Tensor | None,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend `query` [requests, queries, heads, 576] (scaled, fp32) to each request's cached tokens.

    `last_visible` [requests, queries] is the position of the last token that a query sees. Returns the output
    [requests, queries, heads, rank] and the natural log of the softmax denominator [requests, queries, heads].
    """
    requests, queries, heads, dim = query.shape
    page_size = kv_cache.shape[1]
    query = query.view(requests, queries * heads, dim)
    acc = query.new_zeros(requests, queries * heads, rank)
    total = query.new_zeros(requests, queries * heads, 1)
    peak = torch.full_like(total, -torch.inf)

    pages = min(-(-max_seq_len // page_size), block_table.shape[1]) if kv_cache.shape[0] else 0
    chunk_pages = max(1, CHUNK_TOKENS // page_size)
    for first in range(0, pages, chunk_pages):
        page = torch.arange(first, min(first + chunk_pages, pages), device=query.device)
        position = torch.arange(first * page_size, (first + len(page)) * page_size, device=query.device)
        exists = position < seq_lens[:, None]
        # Neither garbage page numbers nor values past a request's length (NaN included) may be followed or read.
        numbers = torch.where(page * page_size < seq_lens[:, None], block_table[:, page], 0)
        kv = kv_cache[numbers].reshape(requests, len(position), dim).float()
        if kv_scale is not None:
            kv = kv * kv_scale
        kv = torch.where(exists[..., None], kv, 0)

        visible = (position <= last_visible[..., None]) & exists[:, None]
        score = torch.bmm(query, kv.transpose(1, 2)).view(requests, queries, heads, len(position))
        score = score.masked_fill(~visible[:, :, None], -torch.inf).view(requests, queries * heads, len(position))

        new_peak = torch.maximum(peak, score.amax(-1, keepdim=True))
        # Where nothing has been visible so far the peak is -inf, and -inf - -inf would be NaN.
        shift = torch.where(new_peak == -torch.inf, 0, new_peak)
        weight = torch.exp(score - shift)
        decay = torch.exp(peak - shift)
        total = total * decay + weight.sum(-1, keepdim=True)
        acc = torch.baddbmm(acc * decay, weight, kv[..., :rank])
        peak = new_peak

    acc = torch.where(total > 0, acc / total, 0)
    lse = (peak + total.log()).view(requests, queries, heads)
    return acc.view(requests, queries, heads, rank), lse
