"""What a rank of several sees of a request's tokens, with one query or more, and what ranks find together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.ops.dcp import mask_dcp_empty_shards_

from mla_backend import DecodeSchedule, mla_decode
from mla_backend.plugin.context_parallel import TokensAsRequests, cached_here
from mla_backend.plugin.impl import HopperMLAImpl
from mla_backend.plugin.metadata import HopperMLADecodeMetadata, HopperMLAMetadataBuilder
from mla_backend.schedule import ScheduleBuffers

HEADS, PAGE, SCALE = 2, 16, 0.1
CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("interleave", [1, 4, 16])
def test_every_token_lies_on_one_rank(ranks: int, interleave: int) -> None:
    lengths = torch.arange(200, dtype=torch.int32)
    owner = torch.arange(200) // interleave % ranks
    for rank in range(ranks):
        counted = torch.tensor([int((owner[:n] == rank).sum()) for n in range(200)])
        assert torch.equal(cached_here(lengths, ranks, rank, interleave), counted)


def paged(caches: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pages with the cached tokens of each request, NaN after them, and the block table."""
    width = 1 + max(len(cache) for cache in caches) // PAGE
    pages = torch.full((len(caches) * width, PAGE, 576), torch.nan)
    for i, cache in enumerate(caches):
        pages[i * width : (i + 1) * width].view(-1, 576)[: len(cache)] = cache
    return pages, torch.arange(len(caches) * width, dtype=torch.int32).view(len(caches), width)


def builder_of(tokens: TokensAsRequests | None, max_requests: int) -> Any:
    """Return a builder of a rank, with what is its own; vLLM refuses to start engines with several ranks on the CPU."""
    builder: Any = object.__new__(HopperMLAMetadataBuilder)
    builder._tokens, builder._heads, builder._max_seq_len = tokens, HEADS, None
    builder._schedule_buffers = ScheduleBuffers.allocate(max_requests, CPU)
    return builder


def decode(
    metadata: HopperMLADecodeMetadata, query: torch.Tensor, pages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    impl: Any = object.__new__(HopperMLAImpl)
    impl.scale, impl.need_to_return_lse_for_decode = SCALE, True
    out, lse = impl.forward_mqa(query, pages, SimpleNamespace(decode=metadata), None)
    return out, lse


@pytest.mark.parametrize("guessing", [True, False])
@pytest.mark.parametrize("interleave", [1, 16])
def test_ranks_together_find_what_one_finds(interleave: int, guessing: bool) -> None:
    """Of requests of 1 to 4 queries, one shorter than there are ranks, and one of none; tokens pad the step."""
    ranks, padding = 3, 2 if guessing else 0
    generator = torch.Generator().manual_seed(0)
    seq_lens = torch.tensor([2, 100, 33, 75, 0], dtype=torch.int32)
    query_lens = torch.tensor([1, 4, 2, 3, 0] if guessing else [1, 1, 1, 1, 0])
    starts = torch.nn.functional.pad(query_lens.cumsum(0), (1, 0)).int()
    tokens = int(starts[-1])
    query = torch.randn(tokens + padding, HEADS, 576, generator=generator)
    caches = [torch.randn(int(n), 576, generator=generator) for n in seq_lens]

    pages, table = paged(caches)
    schedule = DecodeSchedule.plan(seq_lens, heads=HEADS, max_query_len=4, max_seq_len=100)
    rows = (query[..., :512], query[..., 512:], pages, table, seq_lens, starts)
    expected = mla_decode(*rows, softmax_scale=SCALE, schedule=schedule)

    outs, lses = [], []
    for rank in range(ranks):
        pages, table = paged([cache[torch.arange(len(cache)) // interleave % ranks == rank] for cache in caches])
        local = cached_here(seq_lens, ranks, rank, interleave)
        division = TokensAsRequests(tokens + padding, ranks, rank, interleave, CPU) if guessing else None
        metadata = builder_of(division, 16)._build_decode(
            block_table_tensor=table,
            seq_lens_device=local,
            max_seq_len=100,
            query_start_loc_cpu=starts,
            query_start_loc_device=starts,
            num_decode_tokens=tokens + padding,
            dcp_tot_seq_lens_device=seq_lens,
        )
        out, lse = decode(metadata, query, pages)
        before = lse.clone()
        mask_dcp_empty_shards_(lse, metadata.seq_lens, starts)  # vLLM does so before it merges
        assert torch.equal(lse, before)
        outs.append(out)
        lses.append(lse)
    weights = torch.stack(lses).softmax(0)
    merged = (torch.stack(outs) * weights[..., None]).sum(0)
    assert torch.allclose(merged[:tokens], expected[:tokens], atol=1e-5)
    assert all(out.isfinite().all() for out in outs)
    assert all((lse[tokens:] == -torch.inf).all() for lse in lses)
