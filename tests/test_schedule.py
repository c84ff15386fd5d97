"""The schedule counts every tile, in buffers that stay where they are."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_backend.dimensions import TILE_TOKENS
from mla_backend.schedule import DecodeSchedule, ScheduleBuffers


def plan(seq_lens: list[int], buffers: ScheduleBuffers | None = None) -> DecodeSchedule:
    lengths = torch.tensor(seq_lens, dtype=torch.int32)
    return DecodeSchedule.plan(lengths, max_query_len=1, max_seq_len=max(seq_lens, default=0), buffers=buffers)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.just(0), st.integers(0, 200), st.integers(0, 1 << 20)), max_size=50))
def test_tiles_are_counted_up(seq_lens: list[int]) -> None:
    tiles = [-(-length // TILE_TOKENS) for length in seq_lens]
    assert plan(seq_lens).request_tiles.tolist() == [0, *accumulate(tiles)]


def test_buffers_keep_their_addresses() -> None:
    buffers = ScheduleBuffers.allocate(8, torch.device("cpu"))
    first, second = plan([100, 3000, 5], buffers), plan([64] * 8, buffers)
    assert first.request_tiles.data_ptr() == second.request_tiles.data_ptr()
    assert first.buffers is second.buffers
    assert second.request_tiles.tolist() == list(range(9))


def test_too_many_requests_for_the_buffers() -> None:
    with pytest.raises(ValueError, match="4 requests, but the buffers have room for 3"):
        plan([1] * 4, ScheduleBuffers.allocate(3, torch.device("cpu")))
