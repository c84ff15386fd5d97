"""Whole vLLM engines on two GPUs with the compiled kernel: tensor, expert and pipeline parallel."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from engine import GREEDY, ONLY_OURS, Run, run_engine
from gpu_engine import BESIDE, GAP, GRAPHS, ON_RAY
from mla_backend import has_compiled_kernels
from tiny import gaps_of, tokenized

pytestmark = pytest.mark.skipif(
    not (torch.cuda.device_count() > 1 and has_compiled_kernels() and importlib.util.find_spec("vllm")),
    reason="needs two Hopper GPUs, the compiled kernels and vLLM",
)

# The tiny model has 8 heads, 4 for each GPU by tensors, and 3 layers, one or two for each in a pipeline.
DIVIDED: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "tensor and expert": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "tensor, on Ray": {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
    "pipeline": {"pipeline_parallel_size": 2},
}


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[Run]]]:
    prompts = tokenized(200)
    with ThreadPoolExecutor(len(DIVIDED)) as pool:
        yield {
            name: pool.submit(run_engine, prompts, GREEDY, env=ON_RAY, **BESIDE, **GRAPHS, **sizes)
            for name, sizes in DIVIDED.items()
        }


@pytest.mark.parametrize("name", DIVIDED)
def test_every_token_is_likely(runs: dict[str, Future[Run]], name: str) -> None:
    if "Ray" in name:
        pytest.importorskip("ray")
    run = runs[name].result()
    assert "Using HOPPER_MLA attention backend: mla_decode by compiled kernel for sm_90a." in run.log
    assert run.backends == [ONLY_OURS] * 2
    assert [len(tokens) for tokens in run.tokens] == [64] * 8
    assert gaps_of(tokenized(200), run.tokens).max() < GAP
