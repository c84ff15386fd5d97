"""Whole vLLM engines on two GPUs with the compiled kernel: tensor, expert, pipeline and data parallel."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from engine import GREEDY, MODEL, ONLY_OURS, Run, run_engine
from gpu_engine import BESIDE, GAP, GRAPHS, ON_RAY, OURS
from mla_backend import has_compiled_kernels
from server import Server, serving
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two engines with a GPU each, which share the experts and so make every step together."""
    engines = ["--data-parallel-size", "2", "--enable-expert-parallel", "--api-server-count", "1"]
    model = ["--dtype", BESIDE["dtype"], "--max-model-len", str(BESIDE["max_model_len"])]
    graphs = ["--compilation-config", json.dumps(GRAPHS["compilation_config"])]
    beside = ["--gpu-memory-utilization", str(BESIDE["gpu_memory_utilization"]), "--no-enable-flashinfer-autotune"]
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(*engines, *model, *graphs, *beside, log=log, env=OURS) as server:
        yield server


def ask(server: Server, prompt: list[int]) -> list[int]:
    completion = server.client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=GREEDY["max_tokens"],
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    tokens: list[int] = completion.choices[0].token_ids  # type: ignore[attr-defined]
    return tokens


def test_data_parallel_engines_busy_and_idle(server: Server) -> None:
    """One request at a time leaves the other engine to steps without any; eight at once keep both busy."""
    prompts = tokenized(200)
    one_by_one = [ask(server, prompt) for prompt in prompts[:2]]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: ask(server, prompt), prompts))
    assert [len(tokens) for tokens in one_by_one + together] == [64] * 10
    assert gaps_of(prompts[:2], one_by_one).max() < GAP
    assert gaps_of(prompts, together).max() < GAP
    by_engine = [server.metric("vllm:generation_tokens_total", f'engine="{engine}"') for engine in (0, 1)]
    assert sum(by_engine) == 10 * 64
    assert min(by_engine) >= 2 * 64
    # vLLM writes what it chose for the first engine only; the variable would have stopped another without it.
    assert "Using HOPPER_MLA attention backend: mla_decode by compiled kernel for sm_90a." in server.log.read_text()
