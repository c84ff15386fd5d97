"""`mla_decode` on a GPU: the same answers as on the CPU, and replayable from a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from cases import Case
from mla_backend import DecodeSchedule, mla_decode
from mla_backend.schedule import ScheduleBuffers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("causal", [True, False])
def test_agrees_with_the_cpu(page_size: int, causal: bool) -> None:
    shape = {"seq_lens": [1, 0, 2000, 77], "query_lens": [1, 1, 3, 2], "page_size": page_size, "causal": causal}
    on_cpu = Case(**shape, dtype=torch.bfloat16).inputs()
    on_gpu = Case(**shape, dtype=torch.bfloat16, device="cuda").inputs()
    expected, expected_lse = mla_decode(**on_cpu, return_lse=True)
    out, lse = mla_decode(**on_gpu, return_lse=True)
    torch.testing.assert_close(out.cpu(), expected, rtol=1.6e-2, atol=1e-3)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-5, atol=1e-4)


def test_a_captured_step_replays_with_other_lengths() -> None:
    """Capture at the longest lengths, as vLLM does, and replay with shorter ones: schedule and all."""
    arguments = Case(seq_lens=[640] * 4, query_lens=[1] * 4, dtype=torch.bfloat16, device="cuda").inputs()
    del arguments["schedule"]
    seq_lens, out = arguments["seq_lens"], torch.empty(4, 16, 512, dtype=torch.bfloat16, device="cuda")
    buffers = ScheduleBuffers.allocate(4, seq_lens.device)

    def step() -> None:
        schedule = DecodeSchedule.plan(seq_lens, heads=16, max_query_len=1, max_seq_len=640, buffers=buffers)
        mla_decode(**arguments, schedule=schedule, out=out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    seq_lens.copy_(torch.tensor([640, 3, 0, 100], dtype=torch.int32))
    out.fill_(torch.nan)
    graph.replay()
    replayed, replayed_splits = out.clone(), buffers.splits.tolist()
    step()
    torch.testing.assert_close(replayed, out)
    # 13 workers have one tile each, ten of them of the first request and two of the last.
    assert replayed_splits == buffers.splits.tolist() == [0, 10, 10, 10, 12]
