"""What a rank of several sees of a request's tokens, with one query or more."""

from __future__ import annotations

import pytest
import torch

from mla_backend import DecodeSchedule, mla_decode
from mla_backend.plugin.context_parallel import TokensAsRequests, cached_here

PAGE = 16


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("interleave", [1, 4, 16])
def test_every_token_lies_on_one_rank(ranks: int, interleave: int) -> None:
    lengths = torch.arange(200, dtype=torch.int32)
    owner = torch.arange(200) // interleave % ranks
    for rank in range(ranks):
        counted = torch.tensor([int((owner[:n] == rank).sum()) for n in range(200)])
        assert torch.equal(cached_here(lengths, ranks, rank, interleave), counted)


@pytest.mark.parametrize("interleave", [1, 16])
def test_ranks_together_find_what_one_finds(interleave: int) -> None:
    """Requests of 1 to 4 queries, one shorter than there are ranks, padded by tokens and a request that see nothing."""
    ranks, heads, padding = 3, 2, 2
    generator = torch.Generator().manual_seed(0)
    seq_lens = torch.tensor([2, 100, 33, 75, 0], dtype=torch.int32)
    query_lens = torch.tensor([1, 4, 2, 3, 0])
    starts = torch.nn.functional.pad(query_lens.cumsum(0), (1, 0)).int()
    tokens = int(starts[-1])
    q_nope = torch.randn(tokens + padding, heads, 512, generator=generator)
    q_pe = torch.randn(tokens + padding, heads, 64, generator=generator)
    caches = [torch.randn(int(n), 576, generator=generator) for n in seq_lens]

    def attend(
        rows: list[torch.Tensor], lens: torch.Tensor, starts: torch.Tensor, owner: list[int]
    ) -> list[torch.Tensor]:
        """Attend the requests or tokens `owner` to the cached tokens `rows` of each request."""
        width = 1 + max(len(r) for r in rows) // PAGE
        pages = torch.full((len(rows) * width, PAGE, 576), torch.nan)
        for i, r in enumerate(rows):
            pages[i * width : (i + 1) * width].view(-1, 576)[: len(r)] = r
        table = torch.arange(len(rows) * width, dtype=torch.int32).view(len(rows), width)
        schedule = DecodeSchedule.plan(lens, heads=heads, max_query_len=4, max_seq_len=100)
        return list(
            mla_decode(
                q_nope, q_pe, pages, table[owner], lens, starts, softmax_scale=0.1, schedule=schedule, return_lse=True
            )
        )

    expected, _ = attend(caches, seq_lens, starts, list(range(5)))
    outs, lses = [], []
    for rank in range(ranks):
        here = [cache[torch.arange(len(cache)) // interleave % ranks == rank] for cache in caches]
        divided = TokensAsRequests(tokens + padding, ranks, rank, interleave, torch.device("cpu"))
        table = torch.arange(5, dtype=torch.int32)[:, None]
        owner, lens, token_starts = divided.fill(tokens + padding, table, seq_lens, starts)
        assert lens[tokens:].tolist() == [0] * padding
        out, lse = attend(here, lens, token_starts, owner[:, 0].tolist())
        outs.append(out)
        lses.append(lse)
    weights = torch.stack(lses).softmax(0)
    merged = (torch.stack(outs) * weights[..., None]).sum(0)
    assert torch.allclose(merged[:tokens], expected[:tokens], atol=1e-5)
