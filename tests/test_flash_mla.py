"""The flash_mla drop-in: its shapes and conventions, against fp64."""

from __future__ import annotations

import pytest
import torch

from cases import Case
from mla_backend.flash_mla import flash_mla_with_kvcache, get_mla_metadata
from oracle import mla_decode_fp64


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads_k", [1, 2])
@pytest.mark.parametrize("queries", [1, 2])
def test_agrees_with_fp64(queries: int, heads_k: int, causal: bool) -> None:
    lengths, heads = [70, 0, 1, 130], 8
    caches = [
        Case(lengths, [queries] * 4, heads // heads_k, causal=causal, seed=seed).inputs() for seed in range(heads_k)
    ]
    # One block table serves all key heads: bring each head's pages into the order of the first.
    table, k_cache = caches[0]["block_table"], []
    for one in caches:
        pages = torch.full_like(one["kv_cache"], torch.nan)
        for request, length in enumerate(lengths):
            count = -(-length // 64)
            pages[table[request, :count]] = one["kv_cache"][one["block_table"][request, :count]]
        k_cache.append(pages)
    k = torch.stack(k_cache, dim=2)
    q = torch.cat([torch.cat((one["q_nope"], one["q_pe"]), -1) for one in caches], 1).unflatten(0, (4, queries))
    seq_lens = caches[0]["seq_lens"]

    metadata, num_splits = get_mla_metadata(seq_lens, queries * heads // heads_k, heads_k)
    assert metadata.shape[1] == 8
    assert num_splits.shape == (5,)
    out, lse = flash_mla_with_kvcache(q, k, table, seq_lens, 512, metadata, num_splits, 0.07, causal)
    assert out.shape == (4, queries, heads, 512)
    assert lse.shape == (4, heads, queries)
    for j, one in enumerate(caches):
        tensors = (one[n] for n in ("q_nope", "q_pe", "kv_cache", "block_table", "seq_lens", "query_start_loc"))
        expected, expected_lse = mla_decode_fp64(*tensors, softmax_scale=0.07, causal=causal)
        mine = slice(j * heads // heads_k, (j + 1) * heads // heads_k)
        torch.testing.assert_close(out[:, :, mine].flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-5)
        expected_lse[expected_lse == -torch.inf] = torch.inf
        torch.testing.assert_close(
            lse[:, mine].transpose(1, 2).flatten(0, 1).double(), expected_lse, rtol=1e-5, atol=1e-4
        )


def test_default_scale_and_wrong_dimensions() -> None:
    q, k = torch.randn(1, 1, 4, 576), torch.randn(2, 64, 1, 576)
    lengths, table = torch.tensor([90], dtype=torch.int32), torch.tensor([[1, 0]], dtype=torch.int32)
    plan = get_mla_metadata(lengths, 4, 1)
    default, _ = flash_mla_with_kvcache(q, k, table, lengths, 512, *plan)
    explicit, _ = flash_mla_with_kvcache(q, k, table, lengths, 512, *plan, softmax_scale=576**-0.5)
    assert default.equal(explicit)
    with pytest.raises(ValueError, match="head_dim_v is 256; wanted"):
        flash_mla_with_kvcache(q, k, table, lengths, 256, *plan)
