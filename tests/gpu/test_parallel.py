"""Whole vLLM engines on two GPUs with the compiled kernel: by tensors, contexts, experts, layers and requests."""

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
    # Each GPU caches every second token of a request: of one token, one of them has none.
    "decode context": {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
    "decode context, guessing": {
        "tensor_parallel_size": 2,
        "decode_context_parallel_size": 2,
        "cp_kv_cache_interleave_size": 4,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    },
    "pipeline": {"pipeline_parallel_size": 2},
}


def prompts() -> list[list[int]]:
    """Eight, and one of a single token."""
    return [*tokenized(200), tokenized(200)[0][:1]]


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[Run]]]:
    with ThreadPoolExecutor(len(DIVIDED)) as pool:
        yield {
            name: pool.submit(run_engine, prompts(), GREEDY, env=ON_RAY, **BESIDE, **GRAPHS, **sizes)
            for name, sizes in DIVIDED.items()
        }


@pytest.mark.parametrize("name", DIVIDED)
def test_every_token_is_likely(runs: dict[str, Future[Run]], name: str) -> None:
    if "Ray" in name:
        pytest.importorskip("ray")
    run = runs[name].result()
    assert "Using HOPPER_MLA attention backend: mla_decode by compiled kernel for sm_90a." in run.log
    assert run.backends == [ONLY_OURS] * 2
    assert [len(tokens) for tokens in run.tokens] == [64] * 9
    assert gaps_of(prompts(), run.tokens).max() < GAP
    assert (run.accepted > 0) == ("guessing" in name)


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
    two, eight = tokenized(200)[:2], tokenized(200)
    one_by_one = [ask(server, prompt) for prompt in two]
    with ThreadPoolExecutor(len(eight)) as pool:
        together = list(pool.map(lambda prompt: ask(server, prompt), eight))
    assert [len(tokens) for tokens in one_by_one + together] == [64] * 10
    assert gaps_of(two, one_by_one).max() < GAP
    assert gaps_of(eight, together).max() < GAP
    by_engine = [server.metric("vllm:generation_tokens_total", f'engine="{engine}"') for engine in (0, 1)]
    assert sum(by_engine) == 10 * 64
    assert min(by_engine) >= 2 * 64
    # vLLM writes what it chose for the first engine only; the variable would have stopped another without it.
    assert "Using HOPPER_MLA attention backend: mla_decode by compiled kernel for sm_90a." in server.log.read_text()
