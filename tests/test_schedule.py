"""The schedule's buffers stay where they are; what is in them is for GPUs (tests/gpu/test_plan.py)."""

from __future__ import annotations

import pytest
import torch

from mla_backend.schedule import DecodeSchedule, ScheduleBuffers


def plan(seq_lens: list[int], buffers: ScheduleBuffers | None = None) -> DecodeSchedule:
    lengths = torch.tensor(seq_lens, dtype=torch.int32)
    longest = max(seq_lens, default=0)
    return DecodeSchedule.plan(lengths, heads=16, max_query_len=1, max_seq_len=longest, buffers=buffers)


def test_the_cpu_divides_nothing() -> None:
    schedule = plan([100, 3000, 5])
    assert schedule.shares.shape == (0, 8)
    assert schedule.splits.tolist() == [0, 0, 0, 0]


def test_buffers_keep_their_addresses() -> None:
    buffers = ScheduleBuffers.allocate(8, torch.device("cpu"))
    first, second = plan([100, 3000, 5], buffers), plan([64] * 8, buffers)
    assert first.splits.data_ptr() == second.splits.data_ptr()
    assert first.buffers is second.buffers


def test_too_many_requests_for_the_buffers() -> None:
    with pytest.raises(ValueError, match="4 requests, but the buffers have room for 3"):
        plan([1] * 4, ScheduleBuffers.allocate(3, torch.device("cpu")))
