"""What a rank of several sees of a request's tokens, with one query or more, and what ranks find together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens
from vllm.v1.attention.ops.dcp import mask_dcp_empty_shards_

from cases import Case
from mla_backend.plugin.context_parallel import TokensAsRequests, cached_here
from mla_backend.plugin.impl import HopperMLAImpl
from mla_backend.plugin.metadata import HopperMLADecodeMetadata, HopperMLAMetadataBuilder
from mla_backend.schedule import ScheduleBuffers
from oracle import mla_decode_fp64

HEADS, PAGE = 2, 16
CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("interleave", [1, 4, 16])
def test_every_token_lies_on_one_rank(ranks: int, interleave: int) -> None:
    lengths = torch.arange(200, dtype=torch.int32)
    owner = torch.arange(200) // interleave % ranks
    for rank in range(ranks):
        counted = torch.tensor([int((owner[:n] == rank).sum()) for n in range(200)])
        assert torch.equal(cached_here(lengths, ranks, rank, interleave), counted)
        assert torch.equal(get_dcp_local_seq_lens(lengths, ranks, rank, interleave), counted.int())


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
    builder._tokens, builder._heads, builder._max_seq_len, builder._quantized = tokens, HEADS, None, False
    builder._schedule_buffers = ScheduleBuffers.allocate(max_requests, CPU)
    return builder


def decode(
    metadata: HopperMLADecodeMetadata, query: tuple[torch.Tensor, torch.Tensor], pages: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    impl: Any = object.__new__(HopperMLAImpl)
    impl.scale, impl.need_to_return_lse_for_decode = scale, True
    out, lse = impl.forward_mqa(query, pages, SimpleNamespace(decode=metadata), None)
    return out, lse


@pytest.mark.parametrize("guessing", [True, False])
@pytest.mark.parametrize("interleave", [1, 16])
def test_ranks_together_find_what_one_finds(interleave: int, guessing: bool) -> None:
    """Of requests of 1 to 4 queries, one shorter than there are ranks, and one of none; tokens pad the step."""
    ranks, padding = 3, 2 if guessing else 0
    query_lens = [1, 4, 2, 3, 0] if guessing else [1, 1, 1, 1, 0]
    step = Case([2, 100, 33, 75, 0], query_lens, HEADS, PAGE, padding_rows=padding).inputs()
    del step["schedule"]
    expected, _ = mla_decode_fp64(**step)
    query, scale = (step["q_nope"], step["q_pe"]), step["softmax_scale"]
    seq_lens, starts, tokens = step["seq_lens"], step["query_start_loc"], sum(query_lens)
    rows = [
        step["kv_cache"][table[: -(-length // PAGE)].long()].flatten(0, 1)[:length]
        for table, length in zip(step["block_table"], seq_lens.tolist(), strict=True)
    ]

    outs, lses = [], []
    for rank in range(ranks):
        pages, table = paged([cache[torch.arange(len(cache)) // interleave % ranks == rank] for cache in rows])
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
        out, lse = decode(metadata, query, pages, scale)
        before = lse.clone()
        mask_dcp_empty_shards_(lse, metadata.seq_lens, starts)  # vLLM does so before it merges
        assert torch.equal(lse, before)
        outs.append(out)
        lses.append(lse)
    weights = torch.stack(lses).softmax(0)
    merged = (torch.stack(outs) * weights[..., None]).sum(0)
    assert torch.allclose(merged[:tokens].double(), expected[:tokens], atol=1e-5)
    assert all(out.isfinite().all() for out in outs)
    assert all((lse[tokens:] == -torch.inf).all() for lse in lses)
